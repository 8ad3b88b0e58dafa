"""One step of ALBEF's pre-training as its paper draws it, pass by pass, on the modules of `vlp.models.albef`.

Nothing is shared and nothing left out: every pass projects its images, padding is computed, the vocabulary head sees every
position, the teacher reads the text twice, and negatives are picked row by row. It is what the product's step is compared
with: equal numbers in tests/test_albef_step.py, time, memory and operations in benchmarks/albef_step.py.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from vlp.encoders.fusion_layer import Attention
from vlp.losses.masked import IGNORED
from vlp.models.albef import AlbefModel
from vlp.models.base import l2_normalize
from vlp.objectives.queues import Queue
from vlp.types import Batch


def plain(model: AlbefModel, fused_attention: bool = False) -> AlbefModel:
    """Take out what saves work on padding, and write attention out, as in the published code.

    Args:
        fused_attention: keep torch's fused attention, which the published code predates.
    """
    model.text.length_groups = 1
    model.fusion.pack = False
    if fused_attention:
        return model
    model.text.model.set_attn_implementation("eager")
    for module in model.modules():
        if isinstance(module, Attention):
            module.attend = attend
        elif hasattr(module, "fused_attn"):
            module.fused_attn = False
    return model


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    """(n, heads, W, d) and (n, heads, P, d)."""
    scores = query @ key.mT / query.shape[-1] ** 0.5
    return (scores if mask is None else scores.masked_fill(~mask.to(scores.device), -10_000.0)).softmax(-1) @ value


def reference_step(
    model: AlbefModel,
    momentum: AlbefModel,
    batch: Batch,
    masked_ids: Tensor,
    labels: Tensor,
    queue: Queue,
    alpha: float = 0.4,
    pick: Callable[[Tensor], Tensor] = lambda weights: torch.multinomial(weights, 1),
) -> dict[str, Tensor]:
    """Losses by name; (B, L) int64 ``labels`` are -100 where nothing is masked; all pictures differ."""
    mask, size = batch.attention_mask, len(batch)

    def towers(of: AlbefModel) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        image, text = of.image(batch.image), of.text(batch.input_ids, mask)
        return image, text, l2_normalize(of.image_projection(image[:, 0])), l2_normalize(of.text_projection(text[:, 0]))

    image, text, image_embed, text_embed = towers(model)
    with torch.no_grad():
        image_m, _, image_embed_m, text_embed_m = towers(momentum)
        image_keys = torch.cat([image_embed_m, queue["image"]])
        text_keys = torch.cat([text_embed_m, queue["text"]])
        own = torch.eye(size, len(image_keys), dtype=image_keys.dtype, device=image_keys.device)
        i2t_targets = alpha * (image_embed_m @ text_keys.T * model.scale).softmax(1) + (1 - alpha) * own
        t2i_targets = alpha * (text_embed_m @ image_keys.T * model.scale).softmax(1) + (1 - alpha) * own
    i2t = image_embed @ text_keys.T * model.scale
    t2i = text_embed @ image_keys.T * model.scale
    itc = (F.cross_entropy(i2t, i2t_targets) + F.cross_entropy(t2i, t2i_targets)) / 2

    def fuse(of: AlbefModel, text: Tensor, mask: Tensor, image: Tensor) -> Tensor:
        return of.fusion(text, mask, of.fusion.project(image))

    positives = fuse(model, text, mask, image)[:, 0]
    with torch.no_grad():
        i2t_weights = i2t[:, :size].softmax(1).fill_diagonal_(0)
        t2i_weights = t2i[:, :size].softmax(1).fill_diagonal_(0)
    other_images = torch.stack([image[pick(row).item()] for row in t2i_weights])
    chosen = [pick(row).item() for row in i2t_weights]
    other_texts, other_masks = torch.stack([text[n] for n in chosen]), torch.stack([mask[n] for n in chosen])
    negatives = fuse(
        model, torch.cat([text, other_texts]), torch.cat([mask, other_masks]), torch.cat([other_images, image])
    )[:, 0]
    logits = model.itm(torch.cat([positives, negatives]))
    itm = F.cross_entropy(logits, torch.tensor([1] * size + [0] * 2 * size, device=logits.device))

    def words(of: AlbefModel, image: Tensor) -> Tensor:
        states = fuse(of, of.text(masked_ids, mask), mask, image)
        return of.mlm(states, of.text.get_input_embeddings())

    with torch.no_grad():
        soft = words(momentum, image_m).softmax(-1)
    scores = words(model, image)
    hard = F.cross_entropy(scores.flatten(0, 1), labels.flatten(), ignore_index=IGNORED)
    kl = -(soft * scores.log_softmax(-1)).sum(-1)
    kl = (kl * (labels != IGNORED)).sum() / (labels != IGNORED).sum()
    return {"itc": itc, "itm": itm, "mlm": (1 - alpha) * hard + alpha * kl}
