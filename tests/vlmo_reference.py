"""One step of VLMo's pre-training as its published code runs it, pass by pass, on the modules of `vlp.models.vlmo`.

Nothing is shared and nothing left out: every pass embeds its images and texts again, texts are padded to one length and the padding
is computed, experts are split at that length, every layer gives out every token, and the vocabulary head sees all of them. It is
what the product's step is compared with: equal numbers in tests/models/test_vlmo.py, time, memory and operations in
benchmarks/vlmo_step.py.

B pairs, L padded text tokens, P image tokens, N tokens of a row, D width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from vlp.encoders.mome_layer import MomeLayer
from vlp.encoders.relative_position import image_index, text_index
from vlp.losses.masked import IGNORED
from vlp.models.base import l2_normalize
from vlp.models.vlmo import VlmoModel
from vlp.types import Batch


def position_bias(model: VlmoModel, length: int, image: bool) -> Tensor:
    """(layers, heads, N, N) by look-ups in one table, as published: images, text to image, image to text, texts."""
    positions, parts = model.encoder.positions, []
    table = torch.cat([positions.image, positions.cross, positions.text])
    first_text = len(positions.image) + 2
    index = None
    if length:
        index = first_text + text_index(length, positions.max_text_length, table.device)
        parts.append(index)
    if image:
        index = image_index(positions.grid, table.device)
        parts.append(index)
    if len(parts) == 2:
        text, patches = parts
        there = torch.full((length, len(patches)), first_text - 2, device=table.device)
        index = torch.cat([torch.cat([text, there], 1), torch.cat([there.T + 1, patches], 1)])
    return table[index].permute(2, 0, 1).unflatten(0, (positions.layers, -1))


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, bias: Tensor) -> Tensor:
    """Attention of (B, heads, N, d) with (B, N) mask and (heads, N, N) bias, written out as published."""
    scores = (query * query.shape[-1] ** -0.5).float() @ key.float().mT + bias[None]
    scores = scores.masked_fill(~mask[:, None, None], -torch.inf)
    return scores.softmax(-1).type_as(value) @ value


def attend_fused(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, bias: Tensor) -> Tensor:
    """The same by torch's fused attention, which the published code predates."""
    added = torch.where(mask[:, None, None], bias, -torch.inf).to(query.dtype)
    return F.scaled_dot_product_attention(query, key, value, added)


def layer(
    block: MomeLayer, x: Tensor, mask: Tensor, bias: Tensor, length: int, expert: str, attend: Callable[..., Tensor]
) -> Tensor:
    """(B, N, D); ``expert`` "split" = texts, the first ``length`` tokens, and images each by their own."""
    attention, (batch, count, width) = block.attention, x.shape
    own = torch.cat([attention.q_bias, torch.zeros_like(attention.q_bias), attention.v_bias])
    qkv = F.linear(block.norm(x), attention.qkv.weight, own)
    query, key, value = qkv.reshape(batch, count, 3, attention.heads, -1).permute(2, 0, 3, 1, 4)
    attended = attend(query, key, value, mask, bias).transpose(1, 2).reshape(batch, count, width)
    x = x + block.gamma_1 * attention.out(attended)

    def served(x: Tensor, name: str) -> Tensor:
        part = block.experts[name]
        return x + block.gamma_2 * part.contract(F.gelu(part.expand(part.norm(x))))

    if expert == "split":
        return torch.cat([served(x[:, :length], "text"), served(x[:, length:], "image")], 1)
    return served(x, expert)


def reference_step(
    model: VlmoModel,
    batch: Batch,
    masked_ids: Tensor,
    labels: Tensor,
    pick: Callable[[Tensor], Tensor] = lambda weights: torch.multinomial(weights, 1),
    attend: Callable[..., Tensor] = attend,
) -> dict[str, Tensor]:
    """Losses by name, unweighted; (B, L) int64 ``labels`` are -100 where nothing is masked; all pictures differ."""
    encoder, size, length = model.encoder, len(batch), batch.input_ids.shape[1]
    layers, fork = encoder.layers, encoder.vl_from

    def seen(image: Tensor) -> Tensor:
        return torch.ones(len(image), 1 + encoder.grid[0] * encoder.grid[1], dtype=torch.bool, device=image.device)

    def alone(x: Tensor, mask: Tensor, expert: str, words: int) -> tuple[Tensor, Tensor]:
        """First tokens by the modality's experts, and with the vision-language experts on top."""
        biases, hidden = position_bias(model, words, expert == "image"), []
        for block, bias in zip(layers, biases):
            x = layer(block, x, mask, bias, words, expert, attend)
            hidden.append(x)
        y = hidden[fork - 1]
        for block, bias in zip(layers[fork:], biases[fork:]):
            y = layer(block, y, mask, bias, words, "vl", attend)
        return encoder.norm(x)[:, 0], encoder.norm(y)[:, 0]

    def together(ids: Tensor, mask: Tensor, image: Tensor) -> Tensor:
        x = torch.cat([encoder.text(ids), encoder.image(image)], 1)
        mask, biases = torch.cat([mask, seen(image)], 1), position_bias(model, length, True)
        for number, (block, bias) in enumerate(zip(layers, biases)):
            x = layer(block, x, mask, bias, length, "vl" if number >= fork else "split", attend)
        return encoder.norm(x)

    images = alone(encoder.image(batch.image), seen(batch.image), "image", 0)
    texts = alone(encoder.text(batch.input_ids), batch.attention_mask, "text", length)
    losses, own = {}, torch.arange(size, device=batch.image.device)
    for name, head, image, text in zip(("itc", "itc_vl"), (model.itc, model.vl), images, texts):
        i2t = head.scale * l2_normalize(head.image(image)) @ l2_normalize(head.text(text)).T
        losses[name] = (F.cross_entropy(i2t, own) + F.cross_entropy(i2t.T, own)) / 2
        if name == "itc":
            with torch.no_grad():
                i2t_weights, t2i_weights = (s.softmax(1).fill_diagonal_(0) for s in (i2t, i2t.T))
    other_images = torch.stack([batch.image[pick(row).item()] for row in t2i_weights])
    chosen = [pick(row).item() for row in i2t_weights]
    other_ids, other_mask = (torch.stack([x[n] for n in chosen]) for x in (batch.input_ids, batch.attention_mask))
    pairs = (
        (batch.input_ids, batch.attention_mask, batch.image),
        (batch.input_ids, batch.attention_mask, other_images),
        (other_ids, other_mask, batch.image),
    )
    logits = model.itm(model.pooler(torch.cat([together(*pair)[:, 0] for pair in pairs])))
    losses["itm"] = F.cross_entropy(logits, torch.tensor([1] * size + [0] * 2 * size, device=logits.device))
    states = together(masked_ids, batch.attention_mask, batch.image)[:, :length]
    words = model.encoder.text.words if model.words is None else model.words
    losses["mlm"] = F.cross_entropy(model.mlm(states, words).flatten(0, 1), labels.flatten(), ignore_index=IGNORED)
    return losses
