"""Activation checkpointing does not change gradients, and recomputes only the documented operations."""

import copy

import pytest
import timm
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from vlp.encoders.activation_checkpointing import checkpoint_blocks, checkpointed
from vlp.encoders.image import TimmImage
from vlp.errors import UserError


@pytest.mark.parametrize("how", ["cheap", "full"])
def test_gradients_with_dropout_equal_those_without_checkpointing(how):
    blocks = nn.Sequential(
        *(
            nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 24), nn.GELU(), nn.Dropout(0.5), nn.Linear(24, 6))
            for _ in range(2)
        )
    )
    again = copy.deepcopy(blocks)
    checkpoint_blocks(again, how)
    x = torch.randn(3, 6)
    gradients = []
    for model in (blocks, again, copy.deepcopy(again)):  # a deep copy must run its own parameters
        torch.manual_seed(0)
        gradients.append(torch.autograd.grad(model(x).square().sum(), list(model.parameters())))
    for found in gradients[1:]:
        torch.testing.assert_close(found, gradients[0])


@pytest.mark.parametrize("how", ["cheap", "full"])
def test_second_pass_through_the_same_weights_under_autocast(how):
    """The second forward pass finds its casts in the cache of autocast, the backward pass does not."""
    block = timm.create_model("test_vit").blocks[0]
    x, gradients = torch.randn(2, 5, 64), []
    for kind in ("none", how):
        model = copy.deepcopy(block)
        with torch.autocast("cpu", torch.bfloat16):
            first = checkpointed(model, kind, x)
            second = checkpointed(model, kind, first + x)
        (first.float().square().sum() + second.float().square().sum()).backward()
        gradients.append([p.grad for p in model.parameters()])
    assert torch.is_autocast_cache_enabled()
    for kept, again in zip(*gradients):
        torch.testing.assert_close(again, kept, rtol=0.05, atol=0.02 * float(kept.abs().max()))


def test_cheap_checkpointing_repeats_no_matrix_product():
    block = timm.create_model("test_vit").blocks[0]
    counted = []
    for how in ("none", "cheap", "full"):
        x = torch.randn(2, 5, 64, requires_grad=True)
        with FlopCounterMode(display=False) as counter:
            checkpointed(block, how, x).sum().backward()
        counted.append(counter.get_total_flops())
    assert counted[0] == counted[1] < counted[2]


def test_no_checkpointing_without_gradient():
    calls = []
    block = nn.Linear(3, 3)
    block.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        checkpointed(block, "full", torch.randn(2, 3))
    assert calls == [1]


def test_tower_without_blocks_refuses_cheap_checkpointing():
    with pytest.raises(UserError, match="set it to full, or none"):
        TimmImage("test_resnet", image_size=64).build().set_activation_checkpointing("cheap")
