"""Parameter groups, optimizers against references, and the learning rate by step."""

import math

import pytest
import timm.optim
import torch
from torch import nn

from vlp.encoders.image import TimmImage
from vlp.errors import UserError
from vlp.optim.groups import describe_groups, parameter_groups
from vlp.optim.optimizers import AdamW, Lamb, Lars, Sgd
from vlp.optim.schedule import Schedule, set_lr


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.image = nn.Module()
        self.image.cls_token = nn.Parameter(torch.randn(1, 1, 4))
        self.image.relative = nn.Parameter(torch.randn(3, 4))
        self.image.proj = nn.Linear(4, 4)
        self.image.norm = nn.LayerNorm(4)
        self.words = nn.Embedding(5, 4)
        self.position_embeddings = nn.Embedding(5, 4)
        self.head = nn.Linear(4, 4)
        self.log_scale = nn.Parameter(torch.ones(1))

    def no_weight_decay(self):
        return {"image.rel*"}

    def layer_ids(self):
        return {name: 0 if name.startswith("image") else 1 if "head" not in name else 2 for name in self.state_dict()}


class Linear(nn.Linear):
    def no_weight_decay(self):
        return set()

    def layer_ids(self):
        raise NotImplementedError


def groups_by_name(groups):
    """Return parameter name -> group, after a check that each group lists names and params in the same number, each once."""
    names = [name for group in groups for name in group["names"]]
    assert len(names) == len(set(names))
    assert all(len(group["names"]) == len(group["params"]) for group in groups)
    return {name: group for group in groups for name in group["names"]}


def test_every_trainable_parameter_is_in_exactly_one_group():
    model = Model()
    model.words.weight.requires_grad_(False)
    groups = parameter_groups(model, 0.1, layer_decay=0.5, lr_scales={"image.proj": 3.0})
    groups_by_name(groups)
    grouped = {name: p for group in groups for name, p in zip(group["names"], group["params"])}
    expected = {name: p for name, p in model.named_parameters() if name != "words.weight"}
    assert grouped.keys() == expected.keys()
    assert all(grouped[name] is expected[name] for name in expected)


def test_only_matrices_and_word_embeddings_are_decayed():
    by_name = groups_by_name(parameter_groups(Model(), 0.1))
    decayed = {name for name, group in by_name.items() if group["weight_decay"] == 0.1}
    assert decayed == {"image.proj.weight", "words.weight", "head.weight"}
    assert all(group["weight_decay"] == 0 for name, group in by_name.items() if name not in decayed)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "xcit_nano_12_p16_224"])
def test_position_embeddings_of_timm_models_are_not_decayed(name):
    by_name = groups_by_name(parameter_groups(TimmImage(name, weights=None).build(), 0.1))
    special = [key for key in by_name if "pos_embed" in key or "cls_token" in key]
    assert special
    assert all(by_name[key]["weight_decay"] == 0 for key in special)
    assert by_name["model.blocks.0.attn.qkv.weight"]["weight_decay"] == 0.1


def test_learning_rate_scales_multiply_and_the_longest_prefix_counts():
    groups = parameter_groups(Model(), 0.1, layer_decay=0.5, lr_scales={"image": 10.0, "image.proj": 3.0, "head": 2.0})
    scale = {name: group["lr_scale"] for name, group in groups_by_name(groups).items()}
    assert scale["image.norm.weight"] == 0.25 * 10
    assert scale["image.proj.weight"] == 0.25 * 3
    assert scale["words.weight"] == 0.5
    assert scale["head.bias"] == 2


def test_tied_weights_are_counted_once():
    model = Model()
    model.head.weight = model.image.proj.weight
    by_name = groups_by_name(parameter_groups(model, 0.1))
    assert "image.proj.weight" in by_name
    assert "head.weight" not in by_name


def test_misspelt_prefix_gets_a_suggestion():
    with pytest.raises(UserError, match="did you mean 'image.proj'"):
        parameter_groups(Model(), 0.1, lr_scales={"image.porj": 2.0})


def test_prefix_ends_at_a_dot():
    with pytest.raises(UserError, match="matches no trainable parameter"):
        parameter_groups(Model(), 0.1, lr_scales={"imag": 2.0})


def test_layer_decay_without_layer_ids_and_frozen_model_are_user_errors():
    with pytest.raises(UserError, match="layer_ids"):
        parameter_groups(Linear(2, 2), 0.1, layer_decay=0.9)
    with pytest.raises(UserError, match="no parameter is trainable"):
        parameter_groups(Linear(2, 2).requires_grad_(False), 0.1)


def test_audit_table_shows_every_group():
    groups = parameter_groups(Model(), 0.1)
    header, *lines = describe_groups(groups).splitlines()
    assert len(lines) == len(groups)
    assert sum(int(line.split()[1].replace(",", "")) for line in lines) == sum(p.numel() for p in Model().parameters())
    assert any("words.weight" in line and " 0.1 " in line for line in lines)


def lamb_by_algorithm_2(weight, gradients, spec, adapt):
    """Reference: You et al. 2020, algorithm 2, one number at a time."""
    (beta1, beta2), w = spec.betas, weight.flatten().tolist()
    m, v = [0.0] * len(w), [0.0] * len(w)
    for t, gradient in enumerate(gradients, start=1):
        g = gradient.flatten().tolist()
        m = [beta1 * a + (1 - beta1) * b for a, b in zip(m, g)]
        v = [beta2 * a + (1 - beta2) * b * b for a, b in zip(v, g)]
        ratio = [(a / (1 - beta1**t)) / (math.sqrt(b / (1 - beta2**t)) + spec.eps) for a, b in zip(m, v)]
        step = [a + (spec.weight_decay if adapt else 0.0) * b for a, b in zip(ratio, w)]
        trust = math.hypot(*w) / math.hypot(*step) if adapt and math.hypot(*w) > 0 else 1.0
        w = [a - spec.lr * trust * b for a, b in zip(w, step)]
    return torch.tensor(w, dtype=weight.dtype).view_as(weight)


def run(optimizer, model, gradients):
    for by_name in gradients:
        for name, parameter in model.named_parameters():
            parameter.grad = by_name[name].clone()
        optimizer.step()


def random_gradients(model, steps=5):
    return [{name: 3 * torch.randn_like(p) for name, p in model.named_parameters()} for _ in range(steps)]


def test_lamb_equals_algorithm_2():
    spec = Lamb(lr=0.05, weight_decay=0.3)
    model = Linear(3, 2).double()
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    gradients = random_gradients(model)
    run(spec.build(parameter_groups(model, spec.weight_decay)), model, gradients)
    for name, adapt in (("weight", True), ("bias", False)):
        expected = lamb_by_algorithm_2(start[name], [g[name] for g in gradients], spec, adapt)
        torch.testing.assert_close(model.get_parameter(name), nn.Parameter(expected), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("adapt_undecayed", [False, True])
def test_lamb_equals_timm_without_clipping(adapt_undecayed):
    spec = Lamb(lr=0.05, weight_decay=0.3, adapt_undecayed=adapt_undecayed)
    ours, theirs = Linear(3, 2).double(), Linear(3, 2).double()
    for model in (ours, theirs):
        nn.init.constant_(model.weight, 0.0 if adapt_undecayed else 0.5)  # a zero weight has trust ratio 1
        nn.init.constant_(model.bias, 0.1)
    gradients = random_gradients(ours)
    run(spec.build(parameter_groups(ours, spec.weight_decay)), ours, gradients)
    groups = [{"params": [theirs.weight]}, {"params": [theirs.bias], "weight_decay": 0.0}]
    settings = {"betas": spec.betas, "eps": spec.eps, "weight_decay": spec.weight_decay}
    timm_lamb = timm.optim.Lamb(groups, lr=spec.lr, max_grad_norm=None, always_adapt=adapt_undecayed, **settings)
    run(timm_lamb, theirs, gradients)
    for one, other in zip(ours.parameters(), theirs.parameters()):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


def test_lamb_without_weight_decay_still_adapts_its_matrices():
    model = Linear(3, 2)
    optimizer = Lamb(lr=0.1, weight_decay=0.0).build(parameter_groups(model, 0.0))
    before = model.weight.detach().clone()
    run(optimizer, model, random_gradients(model, steps=1))
    assert (model.weight - before).norm().item() == pytest.approx(0.1 * before.norm().item(), rel=1e-4)


@pytest.mark.parametrize("nesterov", [False, True])
def test_sgd_equals_the_recurrence(nesterov):
    spec = Sgd(lr=0.1, momentum=0.9, nesterov=nesterov, weight_decay=0.3)
    model = Linear(3, 2).double()
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    gradients = random_gradients(model)
    run(spec.build(parameter_groups(model, spec.weight_decay)), model, gradients)
    for name, decay in (("weight", 0.3), ("bias", 0.0)):
        w, b = start[name], torch.zeros_like(start[name])
        for g in (step[name] for step in gradients):
            b = 0.9 * b + g + decay * w
            w = w - 0.1 * (g + decay * w + 0.9 * b if nesterov else b)
        torch.testing.assert_close(model.get_parameter(name), nn.Parameter(w), rtol=1e-10, atol=1e-12)


def test_lars_steps_in_proportion_to_the_weights():
    spec = Lars(lr=0.7, momentum=0.9, trust=0.01, weight_decay=0.3)
    model = Linear(3, 2).double()
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    gradients = random_gradients(model)
    run(spec.build(parameter_groups(model, spec.weight_decay)), model, gradients)
    for name, decay in (("weight", 0.3), ("bias", 0.0)):
        w, b = start[name], torch.zeros_like(start[name])
        for g in (step[name] for step in gradients):
            trust = 0.01 * w.norm() / (g.norm() + decay * w.norm()) if decay else 1.0
            b = 0.9 * b + trust * (g + decay * w)
            w = w - 0.7 * b
        torch.testing.assert_close(model.get_parameter(name), nn.Parameter(w), rtol=1e-10, atol=1e-12)


def test_nesterov_without_momentum_is_a_user_error():
    with pytest.raises(UserError, match="more than 0 with nesterov"):
        Sgd(momentum=0.0, nesterov=True)


STATE = {AdamW: {"step", "exp_avg", "exp_avg_sq"}, Lamb: {"step", "exp_avg", "exp_avg_sq"}}


@pytest.mark.parametrize("spec", [AdamW(lr=0.01), Lamb(lr=0.01), Sgd(lr=0.01), Sgd(nesterov=True), Lars(lr=0.1)])
def test_state_is_named_tensors_per_parameter_and_resumes_bitwise(spec):
    torch.manual_seed(0)
    model = Model()
    gradients = random_gradients(model, steps=6)
    start = {name: value.clone() for name, value in model.state_dict().items()}

    def build():
        return spec.build(parameter_groups(model, spec.weight_decay))

    run(build(), model, gradients)
    straight = {name: value.clone() for name, value in model.state_dict().items()}

    model.load_state_dict(start)
    first = build()
    run(first, model, gradients[:3])
    saved = first.state_dict()
    for state in saved["state"].values():
        assert state.keys() == STATE.get(type(spec), {"momentum_buffer"})
        assert all(isinstance(value, torch.Tensor) for value in state.values())
    second = build()
    second.load_state_dict(
        {**saved, "state": {k: {n: t.clone() for n, t in s.items()} for k, s in saved["state"].items()}}
    )
    run(second, model, gradients[3:])
    assert all(torch.equal(value, straight[name]) for name, value in model.state_dict().items())


def test_warm_up_starts_above_zero_and_ends_at_one():
    schedule = Schedule(warmup_steps=4)
    assert [schedule.factor(step, 100) for step in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]


@pytest.mark.parametrize("kind", ["cosine", "linear"])
def test_decay_is_halfway_in_the_middle_and_ends_one_past_the_last_step(kind):
    schedule = Schedule(warmup_steps=10, kind=kind, final_fraction=0.2)
    assert schedule.factor(10, 110) == 1
    assert schedule.factor(60, 110) == pytest.approx(0.6)
    assert schedule.factor(109, 110) > 0.2
    assert schedule.factor(110, 110) == pytest.approx(0.2)
    assert schedule.factor(500, 110) == pytest.approx(0.2)
    factors = [schedule.factor(step, 110) for step in range(10, 111)]
    assert factors == sorted(factors, reverse=True)


def test_cosine_without_warm_up_equals_torch():
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    reference = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=20, eta_min=0.1)
    for step in range(20):
        assert Schedule(final_fraction=0.1).factor(step, 20) == pytest.approx(optimizer.param_groups[0]["lr"])
        optimizer.step()
        reference.step()


def test_constant_stays_and_a_run_inside_its_warm_up_never_decays():
    assert Schedule(kind="constant", warmup_steps=2).factor(1000, 10) == 1
    assert Schedule(warmup_steps=10).factor(4, 5) == 0.5


def test_drops_are_to_a_tenth_each():
    schedule = Schedule(kind="constant", drops=(0.6, 0.8))
    factors = [schedule.factor(step, 10) for step in range(10)]
    assert factors == pytest.approx([1] * 6 + [0.1] * 2 + [0.01] * 2)
    with pytest.raises(UserError, match="of kind='constant'"):
        Schedule(kind="cosine", drops=(0.5,))


def test_set_lr_writes_every_group_with_its_scale():
    groups = parameter_groups(Model(), 0.1, lr_scales={"head": 10.0})
    optimizer = AdamW().build(groups)
    lr = set_lr(optimizer, Schedule(warmup_steps=4), base_lr=0.1, step=1, total_steps=100)
    assert lr == pytest.approx(0.05)
    assert {group["lr"] for group in optimizer.param_groups} == {lr, lr * 10}


def test_unknown_kind_is_a_user_error():
    with pytest.raises(UserError, match="cosine, linear or constant"):
        Schedule(kind="step")
