"""The decoder equals transformers' causal BERT with cross-attention, with packing, caching and truncated outputs."""

from dataclasses import replace

import pytest
import torch
import transformers
from torch import nn

from vlp.encoders.decoder import AnswerDecoder, Decoder, KVCache
from vlp.encoders.fusion import BERT_LAYER
from vlp.encoders.generate import beam_search, rank
from vlp.encoders.text import BertText
from vlp.errors import UserError

SIZES = {"hidden_size": 24, "num_attention_heads": 4, "intermediate_size": 40, "vocab_size": 31}
SIZES |= {"model_type": "bert", "num_hidden_layers": 2, "max_position_embeddings": 16}
TEXT = BertText(config=SIZES, dropout=0.0)
SOURCE, CLS, SEP = 20, 1, 2


def decoder(layers=2, std=0.3, **fields) -> AnswerDecoder:
    torch.manual_seed(0)
    model = Decoder(layers=layers, **fields).resolved(TEXT).build(TEXT.build(), TEXT.layer_sizes(), SOURCE).eval()
    for parameter in model.parameters():  # larger than the initial values, which would hide errors
        nn.init.normal_(parameter, std=std)
    return model


def reference(model: AnswerDecoder) -> nn.Module:
    """transformers' decoder with the same weights. Its cross-attention requires a source of its own width."""
    config = transformers.BertConfig(
        **SIZES | {"num_hidden_layers": len(model.layers)},
        is_decoder=True,
        add_cross_attention=True,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    theirs = transformers.BertLMHeadModel(config).eval()
    for layer in theirs.bert.encoder.layer:
        for part in ("key", "value"):
            setattr(layer.crossattention.self, part, nn.Linear(SOURCE, SIZES["hidden_size"]))
    own, state = model.state_dict(), {}
    for number in range(len(model.layers)):
        for old, new in BERT_LAYER.items():
            for leaf in ("weight", "bias"):
                state[f"bert.encoder.layer.{number}.{old}.{leaf}"] = own[f"layers.{number}.{new}.{leaf}"]
    state |= {f"bert.{name}": value for name, value in own.items() if name.startswith("embeddings.")}
    head = {"dense": "transform.dense", "norm": "transform.LayerNorm"}
    for new, old in head.items():
        state |= {f"cls.predictions.{old}.{leaf}": own[f"head.{new}.{leaf}"] for leaf in ("weight", "bias")}
    state["cls.predictions.bias"] = state["cls.predictions.decoder.bias"] = own["head.bias"]
    state["cls.predictions.decoder.weight"] = own["embeddings.word_embeddings.weight"]
    missing, unexpected = theirs.load_state_dict(state, strict=False)
    assert not unexpected and all("position_ids" in name for name in missing)
    return theirs


def sources(lengths=(5, 2, 3)) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    mask = torch.arange(6) < torch.tensor(lengths)[:, None]
    return torch.randn(len(lengths), 6, SOURCE, requires_grad=True), mask


def texts(lengths=(4, 2, 6, 3)) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(2)
    mask = torch.arange(max(lengths) + 1) < torch.tensor(lengths)[:, None]  # with a column of padding only
    ids = torch.randint(3, 31, mask.shape)
    ids[:, 0] = CLS
    ids[torch.arange(len(ids)), mask.sum(1) - 1] = SEP
    return ids.masked_fill(~mask, 0), mask


@pytest.mark.parametrize("pack", [True, False])
@pytest.mark.parametrize("rows", [[0, 2, 2, 1], None])
def test_every_token_is_predicted_as_by_transformers_with_the_same_gradient(rows, pack):
    model = decoder(pack=pack)
    tokens, seen = sources((5, 2, 3) if rows else (5, 3))
    ids, mask = texts()
    predicted = model.predict(ids, mask, model.project(tokens, seen), rows and torch.tensor(rows))
    of = rows or [0, 1, 0, 1]  # in order, repeatedly
    theirs = reference(model)(
        input_ids=ids,
        attention_mask=mask.long(),
        encoder_hidden_states=tokens[of],
        encoder_attention_mask=seen[of].long(),
    ).logits
    real = mask[:, 1:]
    assert torch.equal(predicted.labels, ids[:, 1:][real])
    assert torch.equal(predicted.text, real.nonzero()[:, 0])
    torch.testing.assert_close(predicted.logits, theirs[:, :-1][real], rtol=1e-4, atol=1e-4)
    gradients = [torch.autograd.grad(x.square().sum(), tokens)[0] for x in (predicted.logits, theirs[:, :-1][real])]
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-3)


def test_nothing_after_a_token_and_no_padding_changes_it():
    model = decoder()
    tokens, seen = sources()
    ids, mask = texts((5, 5, 5))
    whole = model.predict(ids, mask, model.project(tokens, seen)).logits.view(3, 4, -1)
    changed = ids.clone()
    changed[:, 3:] = 7
    found = model.predict(changed, mask, model.project(tokens, seen)).logits.view(3, 4, -1)
    torch.testing.assert_close(found[:, :3], whole[:, :3], rtol=0, atol=0)
    assert not torch.allclose(found[:, 3], whole[:, 3])
    noise = torch.where(seen[..., None], tokens, torch.full_like(tokens, 9.0))
    torch.testing.assert_close(model.predict(ids, mask, model.project(noise, seen)).logits.view(3, 4, -1), whole)


def test_key_value_cache_gives_the_states_of_the_whole_text():
    model = decoder()
    tokens, seen = sources()
    source = model.project(tokens, seen)
    ids, mask = texts((6, 6, 6))
    whole = model.read(ids[:, :-1], mask[:, :-1], source).states.view(3, 6, -1)
    cache = KVCache()
    for begin, end in ((0, 1), (1, 4), (4, 6)):
        written = model.read(ids[:, begin:end], mask[:, begin:end], source, cache=cache)
        torch.testing.assert_close(written.states.view(3, end - begin, -1), whole[:, begin:end])
        cache = written.cache
    assert cache.length == 6


def score(model: AnswerDecoder, ids, mask, tokens, seen) -> torch.Tensor:
    """Return (Q, A) log-probabilities of the answers, each computed independently."""
    theirs, rows = reference(model), []
    for question in range(len(tokens)):
        row = []
        for text, real in zip(ids, mask):
            text = text[real][None]
            logits = theirs(
                input_ids=text,
                encoder_hidden_states=tokens[question][seen[question]][None],
            ).logits
            row.append(logits[0, :-1].log_softmax(1).gather(1, text[0, 1:, None]).sum())
        rows.append(torch.stack(row))
    return torch.stack(rows)


@torch.no_grad()
@pytest.mark.parametrize("double_first", [False, True])
@pytest.mark.parametrize("pack", [True, False])
def test_ranking_equals_scoring_each_answer_independently(pack, double_first):
    model = decoder(pack=pack)
    tokens, seen = sources()
    ids, mask = texts((4, 2, 6, 3, 3, 5, 4, 3))
    slow = score(model, ids, mask, tokens, seen)
    found = rank(model, model.project(tokens, seen), ids, mask, 99, double_first)
    first = (
        reference(model)(
            input_ids=ids[:1, :1].expand(3, 1), encoder_hidden_states=tokens, encoder_attention_mask=seen.long()
        )
        .logits[:, 0]
        .log_softmax(1)[:, ids[:, 1]]
    )
    slow = slow + first if double_first else slow
    torch.testing.assert_close(found.scores, slow.sort(1, descending=True).values, rtol=1e-4, atol=1e-4)
    assert torch.equal(found.answers, slow.sort(1, descending=True).indices)
    # with fewer candidates: those with the most probable first token
    few = rank(model, model.project(tokens, seen), ids, mask, 3, double_first)
    for question in range(3):
        chosen = first[question].topk(3).indices
        order = slow[question, chosen].sort(descending=True)
        assert few.answers[question].tolist() == chosen[order.indices].tolist()


@torch.no_grad()
def test_ranking_of_answers_of_one_token_or_only_the_end():
    model = decoder()
    tokens, seen = sources()
    ids, mask = torch.tensor([[CLS, SEP, 0], [CLS, 5, SEP]]), torch.tensor([[1, 1, 0], [1, 1, 1]]).bool()
    found = rank(model, model.project(tokens, seen), ids, mask, 2)
    slow = score(model, ids, mask, tokens, seen).sort(1, descending=True)
    torch.testing.assert_close(found.scores, slow.values, rtol=1e-4, atol=1e-4)
    assert torch.equal(found.answers, slow.indices)
    with pytest.raises(ValueError, match="begin with"):
        rank(model, model.project(tokens, seen), ids + torch.arange(2)[:, None], mask, 2)


def all_texts(model, source, row: int, longest: int, penalty: float, shortest: int) -> list[int]:
    """Return the best text by exhaustive search."""
    best, stack = (-torch.inf, []), [([], 0.0)]
    while stack:
        ids, total = stack.pop()
        given = torch.tensor([[CLS, *ids]])
        states = model.read(given, torch.ones_like(given, dtype=torch.bool), source, torch.tensor([row])).states
        following = model.words(states[-1:])[0].log_softmax(0)
        if len(ids) == longest:
            best = max(best, (total / max(longest, 1) ** penalty, ids))
            continue
        if len(ids) >= shortest:
            best = max(best, ((total + float(following[SEP])) / (len(ids) + 1) ** penalty, ids))
        stack += [([*ids, t], total + float(following[t])) for t in range(len(following)) if t != SEP]
    return best[1]


@torch.no_grad()
@pytest.mark.parametrize("penalty, shortest", [(0.0, 0), (1.0, 0), (0.7, 2)])
def test_beams_wide_enough_find_the_best_of_all_texts(penalty, shortest):
    small = replace(TEXT, config=SIZES | {"vocab_size": 6})
    torch.manual_seed(3)
    model = Decoder(layers=1).resolved(small).build(small.build(), small.layer_sizes(), SOURCE).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.6)
    tokens, seen = sources()
    source = model.project(tokens, seen)
    found = beam_search(model, source, CLS, SEP, 3, 999, shortest, penalty)
    assert found == [all_texts(model, source, row, 3, penalty, shortest) for row in range(3)]
    assert all(len(ids) >= shortest for ids in found)


@torch.no_grad()
def test_one_beam_is_greedy_search():
    model = decoder()
    tokens, seen = sources()
    source = model.project(tokens, seen)
    for row, found in enumerate(beam_search(model, source, CLS, SEP, 5, 1, min_length=5)):
        ids = [CLS]
        while len(ids) < 6:
            given = torch.tensor([ids])
            states = model.read(given, torch.ones_like(given, dtype=torch.bool), source, torch.tensor([row])).states
            logits = model.words(states[-1:])[0]
            logits[SEP] = -torch.inf
            ids.append(int(logits.argmax()))
        assert found == ids[1:]


def test_checkpointing_changes_no_gradient():
    ids, mask = texts()
    gradients = []
    for how in ("none", "cheap", "full"):
        model = decoder().train()
        model.set_activation_checkpointing(how)
        tokens, seen = sources()
        model.predict(
            ids, mask, model.project(tokens, seen), torch.tensor([0, 2, 2, 1])
        ).logits.square().sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(gradients[1], gradients[0])
    torch.testing.assert_close(gradients[2], gradients[0])


def test_layers_embeddings_and_head_start_from_bert(tmp_path):
    config = transformers.BertConfig(**SIZES | {"num_hidden_layers": 4})
    theirs = transformers.BertForMaskedLM(config)
    theirs.save_pretrained(tmp_path)
    spec = Decoder(layers=2, weights=str(tmp_path), first_layer=2).resolved(TEXT)
    model = spec.build(TEXT.build(), TEXT.layer_sizes(), SIZES["hidden_size"])
    for name, number in (("layers.0", 2), ("layers.1", 3)):
        own = model.get_parameter(f"{name}.expand.weight")
        assert torch.equal(own, theirs.bert.encoder.layer[number].intermediate.dense.weight)
    words = model.embeddings.word_embeddings.weight
    assert torch.equal(words, theirs.bert.embeddings.word_embeddings.weight)
    assert torch.equal(model.head.dense.weight, theirs.cls.predictions.transform.dense.weight)
    assert all("cross" in name for name in model.report.new)


def test_too_long_text_and_wrong_sizes_are_errors():
    model = decoder()
    tokens, seen = sources()
    ids = torch.ones(3, 17, dtype=torch.int64)
    with pytest.raises(ValueError, match="17 tokens; there are 16 positions"):
        model.read(ids, ids.bool(), model.project(tokens, seen))
    with pytest.raises(UserError, match="heads that divide the width"):
        Decoder(heads=5, hidden_size=8, dropout=0.0, eps=1e-12).build(TEXT.build(), TEXT.layer_sizes(), SOURCE)
