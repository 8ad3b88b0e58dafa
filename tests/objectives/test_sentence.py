"""SimCSE, ESimCSE and CERT against loops over sentences, one process against two, and a resumed run."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from tests.conftest import ROOT
from tests.processes import losses, records, resume, run, samples, tensors
from vlp.config import Data, Experiment
from vlp.data.reading.sentences import Sentences
from vlp.data.reading.shards import Source
from vlp.data.text_views import Same
from vlp.distributed import all_reduce_sum
from vlp.encoders.image import TimmImage
from vlp.encoders.text import BertText
from vlp.errors import UserError
from vlp.forward import Bundle, Forward, StepContext
from vlp.models.base import Model
from vlp.models.single import Single
from vlp.objectives.queues import Queue
from vlp.objectives.sentence import Cert, ESimCse, SimCse
from vlp.optim.ema import MomentumConfig
from vlp.testing import part_of
from vlp.train import Pretrainer
from vlp.training.validation import validate
from vlp.types import Batch, Encoded

B, E = 8, 5
INDEX = torch.tensor([3, 1, 4, 1, 5, 9, 2, 6])  # rows 1 and 3 are the same sentence
TOY = ROOT / "tests" / "fixtures" / "toy_esimcse.py"


class Bag(Model):
    """A minimal sentence encoder."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.text, self.head, self.embed_size = nn.Embedding(40, 7), nn.Linear(7, E), E

    def embed_text(self, pooled):
        return nn.functional.normalize(self.head(pooled), dim=-1)

    def encode_text(self, input_ids, attention_mask):
        pooled = (self.text(input_ids) * attention_mask[:, :, None]).sum(1, keepdim=True)
        return Encoded(pooled, attention_mask[:, :1], self.embed_text(pooled[:, 0]))


def batch_of(views: int) -> Batch:
    """Return a batch whose views differ in length and words, except for a duplicate sentence."""
    torch.manual_seed(1)
    made = []
    for view in range(views):
        ids = torch.randint(1, 40, (B, 4 + view))
        ids[3] = ids[1]
        made.append(Batch(INDEX, input_ids=ids, attention_mask=torch.rand(ids.shape) < 0.8))
    return replace(made[0], views=tuple(made[1:]))


def queue_of(rows: int, size: int = 30) -> Queue:
    """Return a queue that contains the sentence of row 2."""
    torch.manual_seed(2)
    queue = Queue(size, {"text": E}, torch.device("cpu"))
    queue.push(torch.tensor([4, *range(100, 99 + rows)]), text=nn.functional.normalize(torch.randn(rows, E), dim=1))
    return queue


def forward_of(objective, views=2, queue=None, momentum=None) -> Forward:
    batch = batch_of(views)
    context = StepContext({objective: queue} if queue is not None else {})
    return Forward(Bag(), batch, Bundle(momentum, batch, context) if momentum else None, context)


def mean_over_rows(rows) -> float:
    """Compute -1/B sum_i 1/|positives| sum_p log softmax_p from rows [(logit, is_positive), ...]."""
    total = 0.0
    for row in rows:
        normaliser = sum(math.exp(logit) for logit, _ in row)
        positives = [math.log(math.exp(logit) / normaliser) for logit, positive in row if positive]
        total -= sum(positives) / len(positives)
    return total / len(rows)


def simcse_by_loops(views, index, temperature, alpha) -> float:
    queries, positives, *hard = views
    rows = []
    for i in range(len(queries)):
        row = [(queries[i] @ positives[j] / temperature, index[i] == index[j]) for j in range(len(queries))]
        for negatives in hard:
            row += [
                (queries[i] @ negatives[j] / temperature + (math.log(alpha) if i == j else 0), False)
                for j in range(len(queries))
            ]
        rows.append([(float(logit), bool(positive)) for logit, positive in row])
    return mean_over_rows(rows)


@pytest.mark.parametrize("views", [2, 3, 4])
@pytest.mark.parametrize("alpha", [1.0, 3.0])
def test_simcse_equals_loops_over_sentences(views, alpha):
    objective = SimCse(hard_negative=math.log(alpha))
    f = forward_of(objective, views)
    expected = simcse_by_loops([view.embed.detach() for view in f.text_views], INDEX, 0.05, alpha)
    assert objective(f).item() == pytest.approx(expected, rel=1e-5)


def test_duplicate_sentence_is_not_its_own_negative():
    model, ids = Bag(), torch.full((2, 3), 7)
    batch = Batch(torch.tensor([5, 5]), input_ids=ids, attention_mask=ids.bool())
    batch = replace(batch, views=(replace(batch),))
    loss = SimCse()(Forward(model, batch))
    loss.backward()
    assert loss.item() == pytest.approx(math.log(2))
    assert model.text.weight.grad.abs().max() < 1e-6
    apart = SimCse()(Forward(model, replace(batch, image_id=torch.tensor([5, 6]))))
    assert apart.item() == pytest.approx(math.log(2))  # as two sentences, both have the same similarity


def test_unsupervised_simcse_encodes_both_views_in_one_pass_with_different_dropout():
    sizes = {"model_type": "bert", "vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 2, "intermediate_size": 32}
    model, rows = Single(text=BertText(config=sizes, length_groups=1), head="tanh").build().train(), []
    model.text.register_forward_pre_hook(lambda module, given: rows.append(len(given[0])))
    batch = batch_of(1)
    batch = replace(batch, attention_mask=torch.ones_like(batch.attention_mask), views=(replace(batch),))
    batch = replace(batch, views=(replace(batch, views=()),))
    f = Forward(model, batch)
    SimCse()(f).backward()
    assert rows == [2 * B]
    one, two = (view.embed for view in f.text_views)
    assert (one - two).norm(dim=1).min() > 1e-3
    model.eval()
    one, two = (view.embed for view in Forward(model, batch).text_views)
    torch.testing.assert_close(one, two)


def test_esimcse_equals_loops_over_batch_and_queue():
    objective, queue = ESimCse(), queue_of(20)
    f = forward_of(objective, queue=queue)
    queries, positives = (view.embed.detach() for view in f.text_views)
    rows = []
    for i in range(B):
        row = [(float(queries[i] @ positives[j]) / 0.05, bool(INDEX[i] == INDEX[j])) for j in range(B)]
        rows.append(
            row
            + [(float(queries[i] @ queue["text"][k]) / 0.05, bool(INDEX[i] == queue.image_id[k])) for k in range(20)]
        )
    assert sum(positive for row in rows for _, positive in row) == B + 2 + 1
    loss = objective(f)
    assert loss.item() == pytest.approx(mean_over_rows(rows), rel=1e-5)


def test_esimcse_with_an_empty_queue_equals_simcse():
    objective = ESimCse()
    queue = objective.init_queue(Bag(), 100, torch.device("cpu"), torch.Generator())
    assert len(queue) == 0
    found = objective(forward_of(objective, queue=queue))
    assert found.item() == pytest.approx(SimCse()(forward_of(objective)).item(), rel=1e-5)


def test_esimcse_queues_the_momentum_encoding_of_the_original_sentence():
    teacher = Bag(seed=5)
    for head in ("momentum", "student"):
        objective = ESimCse(queue_head=head)
        f = forward_of(objective, queue=queue_of(3), momentum=teacher)
        rows = objective.enqueue(f)
        original = teacher.encode_text(f.batch.input_ids, f.batch.attention_mask)
        pooled = (teacher if head == "momentum" else f.model).head(original.tokens[:, 0]).float()
        torch.testing.assert_close(rows["text"].float(), nn.functional.normalize(pooled, dim=-1))
        assert torch.equal(rows["image_id"], INDEX)
        queue = queue_of(3)
        queue.push(**rows)
        assert len(queue) == 3 + B


@pytest.mark.parametrize("filled", [0, 20])
def test_cert_equals_loops_over_own_key_and_queue(filled):
    objective, teacher = Cert(queue_size=30), Bag(seed=5)
    queue = queue_of(20) if filled else objective.init_queue(teacher, 100, torch.device("cpu"), torch.Generator())
    f = forward_of(objective, queue=queue, momentum=teacher)
    loss = objective(f)
    loss.backward()
    query, key = f.text.embed.detach(), f.momentum.views[0].text.embed.detach()
    rows = []
    for i in range(B):
        row = [(float(query[i] @ key[i]) / 0.07, True)]  # the keys of other rows take no part
        rows.append(
            row
            + [(float(query[i] @ queue["text"][k]) / 0.07, bool(INDEX[i] == queue.image_id[k])) for k in range(filled)]
        )
    assert loss.item() == pytest.approx(mean_over_rows(rows), rel=1e-5, abs=1e-6)
    assert f.model.text.weight.grad.isfinite().all()
    assert torch.equal(objective.enqueue(f)["text"], key)


def test_cert_can_start_with_a_random_queue():
    generator = torch.Generator().manual_seed(0)
    queue = Cert(queue_size=30, random_start=True).init_queue(Bag(), 100, torch.device("cpu"), generator)
    assert len(queue) == 30 and (queue.image_id == -1).all()
    torch.testing.assert_close(queue["text"].norm(dim=1), torch.ones(30))


OBJECTIVES = {
    "simcse": (SimCse(), 2),
    "simcse-hard": (SimCse(hard_negative=1.5), 3),
    "esimcse": (ESimCse(), 2),
    "esimcse-student": (ESimCse(queue_head="student"), 2),
    "cert": (Cert(queue_size=30), 2),
}


def gradients(rank: int, world: int, name: str) -> tuple:
    objective, views = OBJECTIVES[name]
    model, momentum = Bag(), Bag(seed=5).requires_grad_(False)
    context = StepContext({objective: queue_of(20)} if not name.startswith("simcse") else {})
    pretrainer = Pretrainer(model, {"o": objective})
    called = (
        DistributedDataParallel(pretrainer) if world > 1 else pretrainer
    )  # must stay alive until the backward pass has ended
    batch = part_of(batch_of(views), slice(rank * B // world, (rank + 1) * B // world))
    losses, total, (f,) = called([batch], momentum, context)
    total.backward()
    with torch.no_grad():
        rows = objective.enqueue(f) if context.queues else {}
    mean = all_reduce_sum([losses["o"].item()])[0] / world
    return mean, {n: p.grad for n, p in model.named_parameters()}, rows


@pytest.mark.parametrize("name", OBJECTIVES)
def test_two_processes_equal_one_in_loss_gradient_and_queue(pair, name):
    loss, expected, enqueued = gradients(0, 1, name)
    for total, found, rows in pair(gradients, 2, name):
        assert total == pytest.approx(loss, rel=1e-5)
        for parameter, gradient in expected.items():
            torch.testing.assert_close(found[parameter], gradient, rtol=1e-4, atol=1e-6)
        assert rows.keys() == enqueued.keys()
        for column, value in enqueued.items():
            torch.testing.assert_close(rows[column], value)


def experiment(objective, **changes) -> Experiment:
    data = Data(train=(Sentences("x.txt"),), tokenizer="t", batch_size=8, text_views=(Same(),))
    model = Single(text=BertText(weights="x"))
    return replace(Experiment("x", model, {"o": objective}, data), **changes)


def test_validate_names_the_missing_setting():
    views = Data(train=(Sentences("x.tsv", columns=("a", "b")),), tokenizer="t", batch_size=8)
    for objective in (SimCse(), ESimCse(), Cert()):
        complete = experiment(objective, momentum=MomentumConfig(0.995, "eval"))
        validate(complete)
        validate(replace(complete, data=views))
        for data in (replace(views, train=(Sentences("x.txt"),)), replace(views, train=(Source("x"),))):
            with pytest.raises(UserError, match="text_views"):
                validate(replace(complete, data=data))
        with pytest.raises(UserError, match="text tower"):
            validate(replace(complete, model=Single(image=TimmImage("resnet18"))))
        if not isinstance(objective, SimCse):
            with pytest.raises(UserError, match="momentum"):
                validate(replace(complete, momentum=None))
    with pytest.raises(UserError, match="hard negatives"):
        validate(experiment(SimCse(hard_negative=1.0), data=views))
    triples = replace(views, train=(Sentences("x.tsv", columns=("a", "b", "c")),))
    validate(experiment(SimCse(hard_negative=1.0), data=triples))


@pytest.fixture(scope="module")
def sentences(world) -> Path:
    path = world / "sentences.txt"
    path.write_text("".join(f"{a} {b} at the {c} number\n" for a in ("red", "blue", "green") for b in ("square", "thing")
                            for c in ("left", "right", "top", "bottom")))  # fmt: skip
    return path


@pytest.mark.parametrize("world_size", [1, 2])
def test_resumed_esimcse_equals_the_uninterrupted_run(world, sentences, tmp_path, world_size):
    """Queue, momentum encoder and word repetition are restored. Six steps are two epochs of 24 sentences."""
    whole, again = tmp_path / "whole", tmp_path / "again"
    given = [f"data.train={sentences}", f"data.tokenizer={world / 'tokenizer'}", f"output={tmp_path}"]
    done = run("train", TOY, *given, "name=whole", world=world_size)
    assert not any(done.codes), "\n".join(done.errors)
    shutil.copytree(whole, again)
    shutil.rmtree(again / "checkpoints" / "step-00000006")
    resume(again, world=world_size)
    assert losses(again) == losses(whole) and len(losses(whole)) == 6
    assert samples(again) == samples(whole)
    assert [r["gradient_norm"] for r in records(again)] == [r["gradient_norm"] for r in records(whole)]
    for name in ("model", "momentum", "memory", "optimizer"):
        expected, found = tensors(whole, name), tensors(again, name)
        assert expected.keys() == found.keys() and expected
        assert [key for key in expected if not torch.equal(expected[key], found[key])] == []
    queue = tensors(whole, "memory")
    assert queue["esimcse/counters"].tolist() == [0, 12]  # 48 rows have gone through 12 places
    assert json.loads((whole / "experiment.json").read_text())["momentum"]["mode"] == "eval"
