"""Heads that predict masked words or patches. They belong to the model and are shared by all models.

M masked positions, D width of the tower, W width of the word embeddings, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vlp.encoders.base import ImageTower, PatchTower, TextTower, TextTowerSpec
from vlp.encoders.initialisation import Init, init_std
from vlp.encoders.text import read_encoder
from vlp.errors import UserError
from vlp.weights import reading
from vlp.weights.reading import LoadReport
from vlp.weights.run import is_run

# Names of this head's dense layer, norm and bias in BERT; in RoBERTa, MPNet and the like; in DistilBERT.
LAYOUTS = (
    ("cls.predictions.transform.dense", "cls.predictions.transform.LayerNorm", "cls.predictions"),
    ("lm_head.dense", "lm_head.layer_norm", "lm_head"),
    ("vocab_transform", "vocab_layer_norm", "vocab_projector"),
)


class VocabularyHead(nn.Module):
    """BERT's head for masked words, ``LayerNorm(gelu(W h + b)) E^T + c`` (Devlin et al. 2019).

    E are the word embeddings of the text tower. They are an argument of each call and not a parameter of the head:
    registered twice they would be saved twice, which safetensors refuses.

    Args:
        width: D of the states.
        words: The word embeddings, read for their sizes only.
        eps: Of the norm.
        std: Standard deviation of the random weights.
    """

    def __init__(self, width: int, words: nn.Embedding, eps: float = 1e-12, std: float = 0.02):
        super().__init__()
        self.dense = nn.Linear(width, words.embedding_dim)
        self.norm = nn.LayerNorm(words.embedding_dim, eps=eps)
        self.bias = nn.Parameter(torch.zeros(words.num_embeddings))
        nn.init.normal_(self.dense.weight, std=std)
        nn.init.zeros_(self.dense.bias)
        self.report: LoadReport | None = None

    def forward(self, states: Tensor, words: nn.Embedding) -> Tensor:
        """Return (M, V) logits of the (M, D) states of masked tokens."""
        return F.linear(self.norm(F.gelu(self.dense(states))), words.weight, self.bias)

    def load(self, weights: str) -> None:
        """Load the head of a transformers folder and set ``report``. A folder without such a head has no effect.

        Raises:
            UserError: if the head in the folder has other sizes.
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


def vocabulary_head(
    spec: TextTowerSpec, tower: TextTower, load_weights: bool = True, init: Init = "published"
) -> VocabularyHead:
    """Build the head for masked words of a text tower, pre-trained where the tower's weights come with one.

    Args:
        spec: The spec of ``tower``.
        tower: The tower, whose word embeddings the head is tied to.
        load_weights: False leaves the head random.
        init: Rule for random weights.

    Raises:
        UserError: if the tower has no word embeddings, or the weights do not fit.
    """
    words = tower.get_input_embeddings()
    if words is None:
        raise UserError(f"{type(tower).__name__} has no word embeddings to predict masked words with; set mlm to false")
    head = VocabularyHead(tower.width, words, spec.layer_sizes().eps, init_std(init, tower.width))
    if load_weights and (weights := spec.head_weights()):
        head.load(weights)
    return head


class PatchHead(nn.Module):
    """The parts that masked image modelling adds to a ViT: a mask token, a linear layer and the prediction targets.

    Args:
        tower: The image encoder with the patches.
        targets: Module that computes the targets of masked patches, see `vlp.encoders.patch_targets`.
    """

    def __init__(self, tower: PatchTower, targets: nn.Module):
        super().__init__()
        self.grid: tuple[int, int] = tower.grid
        self.mask_token = nn.Parameter(torch.empty(tower.width))
        self.predict = nn.Linear(tower.width, targets.width)
        self.targets = targets
        nn.init.trunc_normal_(self.mask_token, std=0.02)
        nn.init.trunc_normal_(self.predict.weight, std=0.02)
        nn.init.zeros_(self.predict.bias)

    def forward(self, states: Tensor) -> Tensor:
        """Return (..., outputs) predictions of (..., D) states."""
        return self.predict(states)


def check_patch_masking(tower: ImageTower) -> None:
    """Raise UserError unless every patch of the tower stays one token from its embedding to the last layer."""
    if not tower.can_mask_patches:
        raise UserError(
            f"masked image modelling needs a ViT, not {type(tower).__name__}; choose a vit_ or beit_ of timm"
        )
