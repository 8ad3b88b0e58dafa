"""Heads that predict what was masked; they belong to the model, and every model with a text or an image tower uses these.

B pictures, M masked positions, P patches, D width of the tower, E width of the word embeddings, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vlp.encoders.image import TimmTower
from vlp.encoders.text import read_encoder
from vlp.errors import UserError
from vlp.weights import reading
from vlp.weights.reading import LoadReport
from vlp.weights.run import is_run

# where families of models keep the layers of this head: BERT; RoBERTa, MPNet and the like; DistilBERT
LAYOUTS = (
    ("cls.predictions.transform.dense", "cls.predictions.transform.LayerNorm", "cls.predictions"),
    ("lm_head.dense", "lm_head.layer_norm", "lm_head"),
    ("vocab_transform", "vocab_layer_norm", "vocab_projector"),
)


class VocabularyHead(nn.Module):
    """BERT's: ``LayerNorm(gelu(W h + b)) E^T + c``, E the word embeddings of the text tower (Devlin et al. 2019).

    The embeddings are not a parameter of the head but come with each call: registered twice they would be saved twice,
    which safetensors refuses.

    Args:
        words: the word embeddings, for their sizes.
        config: transformers' config of the tower, for the norm's epsilon.
    """

    def __init__(self, width: int, words: nn.Embedding, config: Any):
        super().__init__()
        eps = getattr(config, "layer_norm_eps", 1e-12)  # DistilBERT's is no setting
        self.dense = nn.Linear(width, words.embedding_dim)
        self.norm = nn.LayerNorm(words.embedding_dim, eps=eps)
        self.bias = nn.Parameter(torch.zeros(words.num_embeddings))
        nn.init.normal_(self.dense.weight, std=0.02)
        nn.init.zeros_(self.dense.bias)
        self.report: LoadReport | None = None

    def forward(self, states: Tensor, words: nn.Embedding) -> Tensor:
        """(M, D) states of masked tokens to (M, V) logits."""
        return F.linear(self.norm(F.gelu(self.dense(states))), words.weight, self.bias)

    def load(self, weights: str) -> None:
        """Takes the layers from a transformers folder, and says so in ``report``; not where it has no such head.

        Raises:
            UserError: if the layers there are of another size.
        """
        state = {} if is_run(weights) else read_encoder(weights, "")
        for dense, norm, bias in LAYOUTS:
            names = {"dense.": f"{dense}.", "norm.": f"{norm}.", "bias": f"{bias}.bias"}
            found = {
                own + k.removeprefix(old): v
                for own, old in names.items()
                for k, v in state.items()
                if k.startswith(old)
            }
            if found:
                self.report = reading.load(self, found)


class PatchHead(nn.Module):
    """What masked image modelling adds to a ViT: the mask token, a linear layer, and what it is to predict.

    Args:
        targets: of the masked patches: see `vlp.encoders.patch_targets`.
    """

    def __init__(self, tower: TimmTower, targets: nn.Module):
        super().__init__()
        self.grid: tuple[int, int] = tower.grid
        self.mask_token = nn.Parameter(torch.empty(tower.width))
        self.predict = nn.Linear(tower.width, targets.width)
        self.targets = targets
        nn.init.trunc_normal_(self.mask_token, std=0.02)
        nn.init.trunc_normal_(self.predict.weight, std=0.02)
        nn.init.zeros_(self.predict.bias)

    def forward(self, states: Tensor) -> Tensor:
        """(..., D) to (..., outputs)."""
        return self.predict(states)


def check_vit(tower: TimmTower) -> None:
    """Raises UserError unless every patch of the tower stays one token from its embedding to the end."""
    model = tower.model
    if not hasattr(getattr(model, "patch_embed", None), "grid_size") or not hasattr(model, "num_prefix_tokens"):
        raise UserError(
            f"masked image modelling needs a ViT, and {type(model).__name__} is none; choose a vit_ or beit_"
        )


def encode_masked(tower: TimmTower, image: Tensor, masked: Tensor, mask_token: Tensor) -> Tensor:
    """A ViT's last states where the embeddings of masked patches were replaced (Bao et al. 2022, eq. 2).

    ``train.compile`` does not reach this pass: a compiled tower would keep the mask of the first step.

    Args:
        image: (B, 3, H, W) normalised.
        masked: (B, P) bool.
        mask_token: (D,).

    Returns:
        (B, P, D) after the last norm; that of a tower which pools before it (`fc_norm`) is applied to each patch.
    """

    def replace(module: nn.Module, given: tuple[Tensor], patches: Tensor) -> Tensor:
        # (B, P, D), or (B, h, w, D) where the tower takes any size; positions are added later
        return torch.where(masked.view(*patches.shape[:-1], 1), mask_token.to(patches.dtype), patches)

    with tower.model.patch_embed.register_forward_hook(replace):
        states = tower.forward(image)[:, 1:]
    return tower.model.fc_norm(states) if isinstance(tower.model.norm, nn.Identity) else states
