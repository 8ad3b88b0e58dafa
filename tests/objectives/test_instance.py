import math
from dataclasses import replace

import pytest
import torch

from tests.objectives.toys import ROWS, SAMPLES, WIDTH, assert_two_are_one, forward_of, queues_of, step, views
from vlp.config import Data, Experiment
from vlp.encoders.image import TimmImage
from vlp.errors import NonFiniteLoss
from vlp.losses.nce import draw_noise
from vlp.models.single import Single
from vlp.objectives.instance import InstanceDiscrimination
from vlp.testing import part_of

NOISE = InstanceDiscrimination(noise=7, temperature=0.5, proximal=0.0)


def parts(objective, seed=5):
    """Return embeddings, bank, own rows and noise of the batch of `forward_of`, and the bundle."""
    f = forward_of(objective, views(others=0))
    torch.manual_seed(seed)
    noise = draw_noise(f.batch.dataset_row, SAMPLES, objective.noise, may_be_own=objective.noise_may_be_own)
    torch.manual_seed(seed)
    embeds = f.model.encode_image(f.batch.image).embed.detach()
    return embeds, f.context.queues[objective].rows.double(), f.batch.dataset_row.tolist(), noise.tolist(), f


def z_of(embeds, bank, temperature) -> float:
    return sum(math.exp(float(v @ b) / temperature) for v in embeds.detach() for b in bank) / len(embeds)


@pytest.mark.parametrize("own", [False, True])
def test_nce_equals_equation_7_with_z_from_the_first_batch(own):
    objective = replace(NOISE, noise_may_be_own=own)
    embeds, bank, rows, noise, f = parts(objective)
    z, total = z_of(embeds, bank, 0.5), 0.0
    for v, row, others in zip(embeds, rows, noise):
        p = [math.exp(float(v @ bank[j]) / 0.5) / z for j in (row, *others)]
        h = [x / (x + 7 / SAMPLES) for x in p]
        total -= math.log(h[0]) + sum(math.log(1 - x) for x in h[1:])
    assert objective(f).item() == pytest.approx(total / len(embeds), rel=1e-6)


def test_noise_excludes_the_own_row_by_default():
    for own in (False, True):
        _, _, rows, noise, _ = parts(replace(NOISE, noise=400, noise_may_be_own=own))
        assert any(row in others for row, others in zip(rows, noise)) == own


def test_softmax_equals_equation_2():
    objective = InstanceDiscrimination(form="softmax", temperature=0.5, proximal=0.0)
    embeds, bank, rows, _, f = parts(objective)
    expected = torch.nn.functional.cross_entropy(embeds @ bank.T / 0.5, torch.tensor(rows))
    assert objective(f).item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("form", ["nce", "softmax"])
def test_proximal_term_is_lambda_times_the_squared_distance_to_the_bank(form):
    plain = replace(NOISE, form=form)
    near = replace(plain, proximal=30.0)
    values = []
    for objective in (plain, near):
        embeds, bank, rows, _, f = parts(objective)
        values.append(objective(f).item())
    distance = sum(float((v - bank[row]).square().sum()) for v, row in zip(embeds, rows)) / len(embeds)
    assert values[1] - values[0] == pytest.approx(30 * distance, rel=1e-5)


def test_enqueue_returns_rows_embeddings_and_the_first_estimate_of_z():
    f = forward_of(NOISE, views(others=0))
    NOISE(f)
    bank = f.context.queues[NOISE]
    before = bank.rows.clone()
    with torch.no_grad():
        kept = NOISE.enqueue(f)
    assert torch.equal(kept["dataset_row"], f.batch.dataset_row) and torch.equal(kept["embed"], f.image.embed)
    assert kept["partition"].item() == pytest.approx(z_of(f.image.embed, bank.rows.double(), 0.5), rel=1e-5)
    bank.push(**kept)
    new = torch.nn.functional.normalize(0.5 * before[f.batch.dataset_row] + 0.5 * f.image.embed.float(), dim=1)
    torch.testing.assert_close(bank.rows[f.batch.dataset_row], new)
    others = [n for n in range(SAMPLES) if n not in f.batch.dataset_row]
    assert torch.equal(bank.rows[others], before[others])
    # from now on Z is that of the bank
    again = forward_of(NOISE, views(others=0, seed=8), queues={NOISE: bank})
    NOISE(again)
    assert NOISE.enqueue(again).keys() == {"dataset_row", "embed"}


def test_z_is_estimated_again_every_partition_every_steps():
    objective = replace(NOISE, partition_every=3)
    queues = queues_of(objective, Wide)
    bank = queues[objective]
    bank.load(bank.tensors() | {"partition": torch.tensor([4.0])})
    estimated = []
    for done in range(9):
        f = forward_of(objective, views(others=0), queues=queues, step=done)
        objective(f)
        estimated.append("partition" in objective.enqueue(f))
    assert estimated == [True, False, False] * 3


class Wide:
    embed_size = WIDTH


def test_gradient_approaches_the_full_softmax_as_noise_grows():
    """The batch has one query, so Z is that query's own sum over the bank."""
    gradients = {}
    for objective in (replace(NOISE, noise=200_000), replace(NOISE, form="softmax")):
        f = forward_of(objective, views(rows=1, others=0), queues=queues_of(objective, Wide))
        torch.manual_seed(0)
        objective(f).backward()
        gradients[objective.form] = f.model.head.weight.grad
    cosine = torch.nn.functional.cosine_similarity(*(g.flatten() for g in gradients.values()), dim=0)
    assert cosine > 0.999
    assert gradients["nce"].norm().item() == pytest.approx(gradients["softmax"].norm().item(), rel=0.05)


@pytest.mark.parametrize("proximal", [0.0, 30.0])
def test_two_processes_equal_one(pair, proximal):
    objective = InstanceDiscrimination(form="softmax", proximal=proximal)
    assert_two_are_one(pair, objective, objective)


def test_two_processes_agree_on_z(pair):
    expected = step(0, 1, NOISE)[2]["partition"]
    for _, _, remembered in pair(step, 2, NOISE):
        torch.testing.assert_close(remembered["partition"], expected)


def test_only_the_model_has_a_gradient():
    f = forward_of(NOISE, views(others=0))
    NOISE(f).backward()
    assert f.context.queues[NOISE].rows.grad is None and f.model.head.weight.grad.norm() > 0


def with_nan_on_process(rank: int, processes: int, bad: int) -> str:
    """Return the complaint of a first step, which estimates Z, where only process ``bad`` has an image with a NaN."""
    rows = slice(rank * ROWS // processes, (rank + 1) * ROWS // processes)
    f = forward_of(NOISE, part_of(views(others=0), rows))
    if rank == bad:
        f.batch.image[1] = torch.nan
    try:
        NOISE(f)
    except NonFiniteLoss as error:
        return str(error)
    return "finite"


def test_no_process_waits_when_the_first_estimate_of_z_is_not_finite_on_one(pair):
    first, second = pair(with_nan_on_process, 2, 1)
    assert second == "row 1 of queries is not finite" and first.startswith("the loss is nan")


def test_validate_accepts_the_published_settings():
    experiment = Experiment("x", Single(image=TimmImage("test_vit")), {}, Data(train=()))
    InstanceDiscrimination().validate(experiment)
