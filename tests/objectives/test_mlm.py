import math
from dataclasses import replace

import pytest
import torch
import transformers
from torch.nn.parallel import DistributedDataParallel

from vlp.config import Data, Experiment
from vlp.data.reading.sentences import Sentences
from vlp.distributed import all_reduce_sum
from vlp.encoders.image import TimmImage
from vlp.encoders.text import BertText
from vlp.errors import UserError
from vlp.forward import Bundle, Forward, StepContext
from vlp.models.single import Single
from vlp.objectives.masking import TextMasking
from vlp.objectives.mlm import MaskedText
from vlp.optim.ema import MomentumConfig
from vlp.optim.optimizers import AdamW
from vlp.testing import part_of
from vlp.train import Pretrainer
from vlp.types import Batch, Vocabulary

SIZES = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"intermediate_size": 64, "max_position_embeddings": 40}
MODEL = Single(text=BertText(config=SIZES | {"model_type": "bert"}, dropout=0.0), mlm=True)
VOCABULARY = Vocabulary(99, 4, torch.arange(99) < 5, torch.zeros(99, dtype=torch.bool))
USUAL = TextMasking()
EVERY = TextMasking(probability=1.0, mask_share=1.0, random_share=0.0)  # no random choice


def batch(lengths=(9, 3, 12, 6)):
    generator = torch.Generator().manual_seed(0)
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    ids = torch.randint(5, 99, mask.shape, generator=generator).masked_fill(~mask, 0)
    ids[:, 0] = 2
    return Batch(torch.arange(len(lengths)), input_ids=ids, attention_mask=mask)


def build(seed=0):
    torch.manual_seed(seed)
    return MODEL.build()


def bundle(model, given, momentum=None, progress=0.0):
    context = StepContext(vocabulary=VOCABULARY, progress=progress)
    return Forward(model, given, momentum and Bundle(momentum, given, context), context)


def run(objective, f, seed=5):
    torch.manual_seed(seed)
    return objective(f)


def masked_batch(given, masking=USUAL, seed=5):
    """Return the masked ids that the objective draws with this seed, and (B, L) labels as transformers takes them."""
    torch.manual_seed(seed)
    masked = masking(given.input_ids, given.attention_mask, VOCABULARY)
    labels = torch.full_like(given.input_ids, -100)
    labels.view(-1)[masked.positions] = masked.labels
    return masked.input_ids, labels


def published(model, folder):
    """Return transformers' BERT with the weights of the model."""
    reference = transformers.BertForMaskedLM(transformers.BertConfig(**SIZES)).eval()
    state = {f"bert.{name}": value for name, value in model.text.model.state_dict().items()}
    own = {"dense": "transform.dense", "norm": "transform.LayerNorm"}
    for name, value in model.mlm.state_dict().items():
        layer, _, leaf = name.rpartition(".")
        state[f"cls.predictions.{own[layer]}.{leaf}" if layer else "cls.predictions.bias"] = value
    state["cls.predictions.decoder.weight"] = state["bert.embeddings.word_embeddings.weight"]
    state["cls.predictions.decoder.bias"] = state["cls.predictions.bias"]
    reference.load_state_dict(state)
    return reference


@pytest.mark.parametrize("of", ["token", "word", "span"])
@pytest.mark.parametrize("capacity", [None, 0.5])
def test_loss_and_gradients_equal_transformers_bert(tmp_path, of, capacity):
    model, given = build().eval(), batch((12, 3, 12, 9))
    masking = TextMasking(unit=of, probability=0.3, capacity=capacity)
    ids, labels = masked_batch(given, replace(masking, capacity=None))
    assert (labels >= 0).any()
    reference = published(model, tmp_path)
    expected = reference(input_ids=ids, attention_mask=given.attention_mask.long(), labels=labels).loss
    loss = run(MaskedText(masking=masking), bundle(model, given))
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    loss.backward()
    expected.backward()
    gradients = dict(reference.bert.named_parameters())
    for name, parameter in model.text.model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name].grad, rtol=1e-4, atol=1e-6, msg=name)
    torch.testing.assert_close(model.mlm.bias.grad, reference.cls.predictions.bias.grad, rtol=1e-4, atol=1e-6)


def test_texts_without_words_have_zero_loss_and_gradients():
    given = batch((2, 2, 2))
    given.input_ids[:, 1] = 3
    for masking in (USUAL, TextMasking(unit="span"), TextMasking(capacity=0.5)):
        model = build()
        loss = run(MaskedText(masking=masking, distill=0.4), bundle(model, given, build(1)))
        assert loss.item() == 0
        loss.backward()
        assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


@pytest.mark.parametrize(("progress", "share"), [(0.0, 0.0), (0.25, 0.1), (3.0, 0.4)])
def test_distillation_mixes_the_teachers_prediction_for_the_same_text_along_the_ramp(progress, share):
    model, teacher, given = build().eval(), build(1).eval().requires_grad_(False), batch()
    ids, labels = masked_batch(given)
    positions = (labels >= 0).flatten().nonzero()[:, 0]
    student = model.masked_text(bundle(model, given), ids, positions).log_softmax(1)
    soft = teacher.masked_text(bundle(teacher, given), ids, positions).softmax(1)
    hard = -student[torch.arange(len(positions)), labels.flatten()[positions]].mean()
    expected = (1 - share) * hard - share * (soft * student).sum(1).mean()
    objective = MaskedText(distill=0.4, ramp_epochs=1.0)
    loss = run(objective, bundle(model, given, teacher, progress))
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)


def test_only_the_first_view_is_encoded():
    calls = []
    model, given = build(), batch()
    model.text.register_forward_hook(lambda *_: calls.append("text"))
    given.views = (batch(),)
    run(MaskedText(), bundle(model, given))
    assert calls == ["text"]


def step(rank, world, objective):
    """Return the mean of the loss over the processes, and the gradients that DDP leaves."""
    model, given = build().double(), batch((12, 10, 11, 9, 3, 2, 4, 1))  # the first half has most of the words
    pretrainer = Pretrainer(model, {"mlm": objective})
    called = (
        DistributedDataParallel(pretrainer) if world > 1 else pretrainer
    )  # must stay alive until the backward pass has ended
    part = part_of(given, slice(rank * 8 // world, (rank + 1) * 8 // world))
    losses, total, _ = called([part], None, StepContext(vocabulary=VOCABULARY))
    total.backward()
    mean = all_reduce_sum([losses["mlm"].item()])[0] / world
    return mean, {name: p.grad for name, p in model.named_parameters()}


def test_two_processes_with_unequal_numbers_of_words_equal_one(pair):
    loss, gradients = step(0, 1, MaskedText(masking=EVERY))
    for mean, found in pair(step, 2, MaskedText(masking=EVERY)):
        assert mean == pytest.approx(loss, rel=1e-9)
        for name, gradient in gradients.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-7, atol=1e-10, msg=name)
    # as published: a word has more weight on a process with fewer words
    for mean, _ in pair(step, 2, MaskedText(masking=EVERY, mean_over="local")):
        assert abs(mean - loss) > 1e-4


def experiment(model=MODEL, momentum=None, **more):
    data = Data(train=(Sentences("texts.txt"),), tokenizer="vocab.txt")
    return Experiment(
        name="x", model=model, objectives={"mlm": MaskedText(**more)}, data=data, optim=AdamW(), momentum=momentum
    )


def test_validate_names_the_missing_setting():
    for wrong, complaint in (
        (experiment(Single(image=TimmImage("test_vit"))), "needs a text tower"),
        (experiment(replace(MODEL, mlm=False)), "set model.mlm=true"),
        (experiment(distill=0.4), "needs the momentum encoder"),
        (experiment(masking=TextMasking(mask_share=0.95)), "masking.mask_share \\+ random_share is 1.05"),
    ):
        with pytest.raises(UserError, match=complaint):
            wrong.objectives["mlm"].validate(wrong)
    right = experiment(momentum=MomentumConfig(0.995), distill=0.4)
    right.objectives["mlm"].validate(right)


def test_random_model_has_the_loss_of_chance():
    loss = run(MaskedText(masking=EVERY), bundle(build(), batch()))
    assert loss.item() == pytest.approx(math.log(99), rel=0.05)
