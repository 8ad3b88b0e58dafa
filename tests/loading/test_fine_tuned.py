"""Fine-tuned weights in their published layouts: the commands of the documentation give the answers of the model."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from tests.conftest import COLOURS
from tests.models.test_albef import SPEC
from vlp.cli import main
from vlp.config import Data
from vlp.data.augment import Resize
from vlp.data.text import load_tokenizer
from vlp.encoders.decoder import Decoder
from vlp.encoders.mome import Mome
from vlp.loading.albef import MEAN, STD
from vlp.models.albef import Albef
from vlp.models.vlmo import Vlmo
from vlp.tasks.base import EvalModel
from vlp.tasks.pair_classification import PairClassification
from vlp.tasks.vqa import Vqa
from vlp.weights.albef import AlbefCheckpoint, export_albef
from vlp.weights.vlmo import VlmoCheckpoint, export_vlmo

WORDS = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    "what",
    "colour",
    "is",
    "it",
    "a",
    "the",
    "thing",
    "left",
    *COLOURS,
]
MOME = Mome(
    48,
    3,
    4,
    96,
    vl_from=2,
    drop_path=0.0,
    text_dropout=0.0,
    layer_scale=None,
    image_size=32,
    vocab_size=30,
    max_text_length=196,
)
SIZES = {
    "hidden_size": 64,
    "num_attention_heads": 2,
}  # heads of width 32, as in the image tower: equal widths as in all published files
TEXT = replace(SPEC.text, config=SPEC.text.config | SIZES)
ALBEF = replace(SPEC, image=replace(SPEC.image, mean=MEAN, std=STD), text=TEXT, itc=False, itm=False, mlm=False)
VLMO = Vlmo(MOME, itc=False, itc_vl=False, itm=False, mlm=False)
ANSWERED = {"data": "vqa.jsonl", "images": "pictures", "answers": "answers.json"}
ENTAILED = {
    "data": "ve.jsonl",
    "images": "pictures",
    "label": "label",
    "classes": ("contradiction", "neutral", "entailment"),
}
COMPARED = {"data": "nlvr2.jsonl", "images": "pictures", "image": ("image0", "image1"), "label": "label"}
COMPARED |= {"classes": ("False", "True")}


@pytest.fixture
def questions(tmp_path) -> Path:
    """Write ten images, each with annotations of VQA, SNLI-VE and NLVR2 as `vlp data annotations` writes them."""
    rng, lines = np.random.default_rng(0), {"vqa": [], "ve": [], "nlvr2": []}
    (tmp_path / "pictures").mkdir()
    for n in range(10):
        pixels = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((40, 40), Image.Resampling.BICUBIC).save(tmp_path / f"pictures/{n}.png")
        colour, text = list(COLOURS)[n % 5], " ".join(rng.choice(WORDS[5:], 5))
        lines["vqa"].append({"image": f"{n}.png", "text": text, "question_id": n, "answers": [colour] * 10})
        lines["ve"].append({"image": f"{n}.png", "text": text, "label": ENTAILED["classes"][n % 3]})
        lines["nlvr2"].append(
            {"image0": f"{n}.png", "image1": f"{9 - n}.png", "text": text, "label": COMPARED["classes"][n % 2]}
        )
    for name, of in lines.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in of))
    (tmp_path / "answers.json").write_text(json.dumps(list(COLOURS)))
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS))
    return tmp_path


@pytest.mark.parametrize(
    ("spec", "task", "fields"),
    [
        (replace(ALBEF, decoder=Decoder(layers=2)), "vqa", ANSWERED),
        (replace(VLMO, classes=len(COLOURS)), "vqa", ANSWERED),
        (replace(ALBEF, classes=3), "classification", ENTAILED),
        (replace(ALBEF, classes=2, fusion=replace(ALBEF.fusion, images=2)), "classification", COMPARED),
        (replace(VLMO, classes=2, encoder=replace(MOME, image_kinds=2), images=2), "classification", COMPARED),
    ],
    ids=["ALBEF VQA", "VLMo VQA", "ALBEF entailment", "ALBEF NLVR2", "VLMo NLVR2"],
)
def test_exported_fine_tuned_file_gives_the_results_of_its_model(questions, monkeypatch, spec, task, fields):
    """The commands for published VQA, SNLI-VE and NLVR2 weights, from the command line to the answers."""
    monkeypatch.chdir(questions)
    torch.manual_seed(0)
    own = spec.build().eval()
    for part in own.modules():
        if isinstance(part, torch.nn.Linear | torch.nn.Embedding | torch.nn.Conv2d):
            torch.nn.init.normal_(part.weight, std=0.4)  # otherwise all questions have nearly the same answer
    albef = isinstance(spec, Albef)
    data = Data(
        (),
        None,
        "vocab.txt",
        add_sep=not albef,
        clean_captions=albef,
        max_length=64 if albef else 40,
        resize=Resize("squash"),
    )
    eval_model = EvalModel(
        own, load_tokenizer("vocab.txt", data.add_sep, data.clean_captions), data, torch.device("cpu")
    )
    kind = {"vqa": Vqa, "classification": PairClassification}[task](**fields, resamples=5)
    if own.classifier is not None:  # centred, so that several classes are predicted
        scores = []
        hook = own.classifier.register_forward_hook(lambda module, given, said: scores.append(said))
        kind(eval_model)
        hook.remove()
        own.classifier[-1].bias.data -= torch.cat(scores).mean(0)
    exported = (
        export_albef(AlbefCheckpoint(own.state_dict())) if albef else export_vlmo(VlmoCheckpoint(own.state_dict()))
    )
    save_file({k: v.contiguous().clone() for k, v in exported.items()}, questions / "tuned.safetensors")

    words = [f"{key}={','.join(value) if isinstance(value, tuple) else value}" for key, value in fields.items()]
    words += ["tokenizer=vocab.txt", f"head_width={32 if albef else 12}", "image_size=32", "resamples=5"]
    if task == "vqa":
        words, kind = [*words, "submission=typed.json"], replace(kind, submission="own.json")
    assert main(["eval", "tuned.safetensors", task, *words]) == 0
    result = json.loads(next(questions.glob(f"runs/eval/tuned/eval/{task}*.json")).read_text())
    expected = kind(eval_model)
    values = {name: pytest.approx(metric.value) for name, metric in expected.metrics.items()}
    assert {name: metric["value"] for name, metric in result["metrics"].items()} == values
    if task == "vqa":
        typed, written = (json.loads(Path(name).read_text()) for name in ("typed.json", "own.json"))
        assert typed == written and len(typed) == 10 and len({line["answer"] for line in typed}) > 1
    else:
        said = np.array(result["details"]["confusion"])
        assert said.tolist() == expected.details["confusion"] and (said.sum(0) > 0).sum() > 1
