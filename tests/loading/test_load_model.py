"""Published weights load strictly, and give the scores of the library that they come from."""

import json
from configparser import ConfigParser
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file

from tests.conftest import COLOURS, SHARED
from tests.models.test_albef import SPEC, published
from vlp.cli import main
from vlp.encoders.decoder import Decoder
from vlp.encoders.mome import Mome
from vlp.errors import UserError
from vlp.loading.base import LoadOptions
from vlp.loading.load_model import load_model
from vlp.models.vlmo import Vlmo
from vlp.weights.albef import AlbefCheckpoint, export_albef
from vlp.weights.vlmo import VlmoCheckpoint, export_vlmo

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "photo", "of", "the", "##s", *COLOURS]
TEXTS = ["a red photo", "the blue photos of a green", "black"]
TEXT = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
TEXT |= {"vocab_size": 32, "max_position_embeddings": 12, "pad_token_id": 0}
VISION = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
EFFICIENT = {
    "width_coefficient": 0.2,
    "depth_coefficient": 0.2,
    "hidden_dim": 64,  # width of the last block
    "image_size": 32,
    "initializer_range": 0.2,  # with smaller weights the output does not depend on the image
}


def clip():
    ids = {"bos_token_id": 2, "eos_token_id": 3, "projection_dim": 10}
    config = transformers.CLIPConfig(
        text_config=TEXT | ids, vision_config=VISION | {"image_size": 32, "patch_size": 16}, projection_dim=10
    )
    processor = transformers.CLIPImageProcessor(size={"shortest_edge": 40}, crop_size={"height": 32, "width": 32})
    return transformers.CLIPModel(config), processor


def align():
    config = transformers.AlignConfig(text_config=TEXT, vision_config=EFFICIENT, projection_dim=64)
    processor = transformers.EfficientNetImageProcessor(
        size={"height": 40, "width": 40},
        crop_size={"height": 32, "width": 32},
        do_center_crop=True,
        rescale_factor=1 / 127.5,
        rescale_offset=True,
        include_top=False,
    )
    return transformers.AlignModel(config), processor


def siglip():
    vision = VISION | {"image_size": 32, "patch_size": 16}
    config = transformers.SiglipConfig(text_config=TEXT | {"projection_size": 16}, vision_config=vision)
    return transformers.SiglipModel(config), transformers.SiglipImageProcessor(size={"height": 32, "width": 32})


def siglip2():
    vision = VISION | {"num_patches": 4, "patch_size": 16}
    config = transformers.Siglip2Config(text_config=TEXT | {"projection_size": 16}, vision_config=vision)
    return transformers.Siglip2Model(config), transformers.Siglip2ImageProcessor(patch_size=16, max_num_patches=4)


KINDS = {"clip": clip, "align": align, "siglip": siglip, "siglip2": siglip2}


@pytest.fixture(params=KINDS)
def folder(request, tmp_path) -> Path:
    """Save a tiny model of transformers with weights far from their initial values."""
    torch.manual_seed(0)
    model, processor = KINDS[request.param]()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    if request.param == "align":  # with batch norm statistics that differ from the initial ones
        model.train().get_image_features(pixel_values=torch.randn(16, 3, 32, 32))
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS))
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    transformers.BertTokenizerFast(vocab=str(tmp_path / "vocab.txt")).save_pretrained(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def photo() -> Image.Image:
    """A square image, since Siglip2 keeps the shape of images and vlp squashes them."""
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (12, 12, 3), dtype=np.uint8))
    return coarse.resize((80, 80), Image.Resampling.BICUBIC)


def unit(features) -> torch.Tensor:
    return torch.nn.functional.normalize(getattr(features, "pooler_output", features), dim=-1)


def options_of(folder: Path) -> LoadOptions:
    """Siglip2 keeps the shape of images, so it is only evaluated on squashed ones on request."""
    return LoadOptions(resize="squash" if "siglip2" in (folder / "config.json").read_text() else None)


def test_transformers_folders_embed_as_their_own_classes_do(folder, photo):
    eval_model = load_model(str(folder), options=options_of(folder)).eval_model
    own = transformers.AutoModel.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    given = transformers.AutoImageProcessor.from_pretrained(folder)(images=[photo], return_tensors="pt")
    padding = {"padding": "max_length", "max_length": 12} if "siglip" in own.config.model_type else {"padding": True}
    texts = tokenizer(TEXTS, return_tensors="pt", **padding)
    if "siglip" in own.config.model_type:  # its tokenizer returns no mask
        texts = {"input_ids": texts["input_ids"]}
    with torch.no_grad():
        image, text = unit(own.get_image_features(**given)), unit(own.get_text_features(**texts))
        ids, mask, cut = eval_model.tokenizer(TEXTS, eval_model.data.max_length)
        ours = eval_model.model.encode_text(ids, mask).embed
        pixels = eval_model.data.resize(
            np.array(photo), eval_model.preprocess.size, eval_model.preprocess.interpolation
        )
        normal = eval_model.preprocess.normalise(pixels[None])
        found = eval_model.model.encode_image(normal).embed
    assert cut == 0
    torch.testing.assert_close(ours, text, rtol=0, atol=2e-6)
    theirs = given["pixel_values"]
    if theirs.ndim == 4:  # equal pixels, up to the difference between two resizing algorithms
        tolerance = 2 / 255 / min(eval_model.preprocess.std)
        torch.testing.assert_close(normal, theirs.float(), rtol=0, atol=tolerance)
        with torch.no_grad():
            torch.testing.assert_close(eval_model.model.encode_image(theirs).embed, image, rtol=0, atol=2e-6)
    torch.testing.assert_close(found @ ours.T, image @ text.T, rtol=0, atol=0.02)
    scale = own.temperature.reciprocal() if hasattr(own, "temperature") else own.logit_scale.exp()
    assert float(eval_model.model.scale.detach()) == pytest.approx(float(scale.detach()), rel=1e-5)


def test_knn_probe_and_sts_evaluate_transformers_folders(folder, tmp_path, monkeypatch):
    """Nearest neighbours and distances equal those of embeddings computed one at a time."""
    rng, labels = np.random.default_rng(0), []
    for n in range(16):
        name, split = f"p{n}.png", "train" if n < 8 else "val"
        noise = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        noise.resize((40, 40), Image.Resampling.BICUBIC).save(tmp_path / name)
        labels.append({"image": name, "label": n % 2, "name": f"class {n % 2}", "split": split})
    twins = [line | {"image": f"twin-{line['image']}", "split": "twins"} for line in labels[:8]]
    for line in twins:
        (tmp_path / line["image"]).write_bytes((tmp_path / line["image"].removeprefix("twin-")).read_bytes())
    (tmp_path / "labels.jsonl").write_text("".join(json.dumps(line) + "\n" for line in labels + twins))
    pairs = [(4.5, *TEXTS[:2]), (1.0, *TEXTS[1:]), (2.0, TEXTS[0], TEXTS[2])]
    (tmp_path / "stsb-test.tsv").write_text("".join(f"{score}\t{a}\t{b}\n" for score, a, b in pairs))
    (tmp_path / "sts12.tsv").write_text(f"5\t{TEXTS[0]}\t{TEXTS[0]}\n1\t{TEXTS[0]}\t{TEXTS[1]}\n")
    monkeypatch.chdir(tmp_path)
    sts = ["tasks=stsb-test,sts12", "geometry=stsb-test", "resamples=5", "features=embed"]
    for task, more in (
        ("knn", ["k=1", "features=embed"]),
        ("probe", ["folds=2", "l2=1e-9", "split=twins"]),
        ("sts", sts),
    ):
        squash = ["resize=squash"] if options_of(folder).resize else []
        assert main(["eval", str(folder), task, f"data={tmp_path}", *more, *squash]) == 0
    found = {
        name: json.loads(next(tmp_path.glob(f"runs/eval/*/eval/{name}*.json")).read_text())["metrics"]
        for name in ("knn", "probe", "sts")
    }
    eval_model = load_model(str(folder), options=options_of(folder)).eval_model
    with torch.no_grad():
        images = []
        for line in labels:
            pixels = np.array(Image.open(tmp_path / line["image"]))
            pixels = eval_model.data.resize(pixels, eval_model.preprocess.size, eval_model.preprocess.interpolation)
            images.append(eval_model.model.encode_image(eval_model.preprocess.normalise(pixels[None])).embed[0])
        texts = torch.cat(
            [
                eval_model.model.encode_text(*eval_model.tokenizer([t], eval_model.data.max_length)[:2]).embed
                for t in TEXTS
            ]
        )
    nearest = [max(range(8), key=lambda k: float(images[n] @ images[k])) for n in range(8, 16)]
    hits = sum(labels[k]["label"] == labels[n]["label"] for n, k in enumerate(nearest, start=8))
    assert found["knn"]["top1"]["value"] == pytest.approx(hits / 8)
    assert found["probe"]["top1"]["value"] > 0.5  # copies of the training images, by a random tower
    assert found["sts"]["sts12"]["value"] == pytest.approx(1)  # a sentence is closest to itself
    # alignment counts the one pair with a score above 4
    distance = float((texts[0] - texts[1]).square().sum())
    assert found["sts"]["alignment"]["value"] == pytest.approx(distance, rel=1e-3, abs=1e-6)


def test_siglip2_patches_equal_those_of_its_processor(tmp_path, photo):
    from vlp.loading.transformers import patches_of

    pixels = torch.from_numpy(np.array(photo)).permute(2, 0, 1)[None, :, :32, :48].float()
    own = transformers.Siglip2ImageProcessor(
        patch_size=16, max_num_patches=6, do_resize=False, do_rescale=False, do_normalize=False
    )
    given = own(images=[pixels[0]], return_tensors="pt")
    patches, shape = patches_of(pixels, 16)
    assert shape == tuple(given["spatial_shapes"][0].tolist()) == (2, 3)
    assert torch.equal(patches[0], given["pixel_values"][0].float())


def test_weights_that_do_not_fit_are_refused(folder):
    state = load_file(folder / "model.safetensors")
    save_file({k: v for k, v in state.items() if "text_model" not in k}, folder / "model.safetensors")
    with pytest.raises(UserError, match="the weights lack text_model"):
        load_model(str(folder))
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match="fetch the weights too"):
        load_model(str(folder))


@pytest.mark.skipif(find_spec("sentencepiece") is not None, reason="sentencepiece is installed")
def test_tokenizer_that_needs_sentencepiece_names_the_extra(tmp_path):
    model, processor = siglip()
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "SiglipTokenizer"}))
    (tmp_path / "spiece.model").write_bytes(b"x")
    with pytest.raises(UserError, match=r"needs the package sentencepiece.*pip install 'vlp\[siglip\]'"):
        load_model(str(tmp_path))
    extras = ConfigParser()
    extras.read(Path(__file__).resolve().parents[2] / "setup.cfg")
    assert "sentencepiece" in extras["options.extras_require"]["siglip"]


@pytest.mark.parametrize("safe", [True, False])
def test_folder_with_weights_in_several_files_loads(folder, safe):
    state, name = load_file(folder / "model.safetensors"), "model.safetensors" if safe else "pytorch_model.bin"
    (folder / "model.safetensors").unlink()
    listed = {}
    for n in range(3):
        part, file = dict(list(state.items())[n::3]), f"{n}-of-3.{name.rpartition('.')[2]}"
        save_file(part, folder / file) if safe else torch.save(part, folder / file)
        listed |= dict.fromkeys(part, file)
    (folder / f"{name}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": listed}))
    options = LoadOptions(resize="squash")  # Siglip2 needs it
    report = load_model(str(folder), options=options).reports["image"]
    assert report.new == () and state.keys() >= set(report.loaded)


def test_hub_name_says_what_to_download(capsys):
    assert main(["eval", "openai/clip-vit-base-patch32", "retrieval", "data=x"]) == 2
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1 and "hf download openai/clip-vit-base-patch32 --local-dir" in err


# --- ALBEF's files -----------------------------------------------------------------------------------------------------


def test_sizes_and_heads_of_an_albef_file_are_those_of_its_tensors(tmp_path):
    """The numbers of the published code, from only the file and the head width."""
    reference, *_, given, _ = published("albef_retrieval")
    state = load_file(SHARED / "parity/albef_retrieval/weights.safetensors")
    save_file(state, tmp_path / "ALBEF.safetensors")
    opened = load_model(str(tmp_path / "ALBEF.safetensors"), options=LoadOptions(head_width=16))
    model = opened.eval_model.model
    assert model.itm is not None and model.itc and model.mlm is None
    assert opened.reports["model"].new == () and opened.reports["model"].unexpected == ()
    with torch.no_grad():
        for of in (reference.eval(), model):
            image, text = (
                of.encode_image(given["image"]),
                of.encode_text(given["input_ids"], given["attention_mask"] > 0),
            )
            found = of.match(of.project(image), text, torch.arange(6)), image.embed, text.embed
            if of is reference:
                expected = found
    for ours, theirs in zip(found, expected):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("heads", "fusion"),
    [
        ({"decoder": Decoder(layers=2), "itc": False, "itm": False}, {}),  # VQA
        ({"classes": 3, "itc": False, "itm": False}, {}),  # visual entailment
        ({"classes": 2, "itc": False, "itm": False}, {"images": 2}),  # NLVR2
        ({"assignment": True, "itm": False}, {"images": 2}),
    ],
)
def test_model_has_every_head_of_the_file(tmp_path, heads, fusion):
    torch.manual_seed(0)
    spec = replace(SPEC, fusion=replace(SPEC.fusion, **fusion), mlm=False, **heads)
    own = spec.build().eval()
    exported = export_albef(AlbefCheckpoint(own.state_dict()))
    save_file({k: v.contiguous().clone() for k, v in exported.items()}, tmp_path / "x.safetensors")
    model = load_model(str(tmp_path / "x.safetensors"), options=LoadOptions(head_width=16)).eval_model.model
    ours, theirs = model.state_dict(), own.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


@pytest.fixture
def albef_file(tmp_path) -> Path:
    """Write an exported toy model with its vocabulary."""
    torch.manual_seed(0)
    state = SPEC.build().state_dict()
    save_file(
        {k: v.contiguous().clone() for k, v in export_albef(AlbefCheckpoint(state)).items()},
        tmp_path / "ALBEF.safetensors",
    )
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS))
    return tmp_path / "ALBEF.safetensors"


@pytest.fixture
def pictures(tmp_path) -> Path:
    for n in range(10):
        colour = list(COLOURS)[n % 5]
        path = tmp_path / "pictures" / colour / f"{n}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((32, 32, 3), COLOURS[colour], dtype=np.uint8)).save(path)
    return tmp_path / "pictures"


def test_albef_file_without_a_tokenizer_is_a_user_error(albef_file, pictures, capsys, monkeypatch):
    monkeypatch.chdir(albef_file.parent)
    task = [str(albef_file), "zero-shot", f"data={pictures}", "prompts=a {}", "head_width=16", "resamples=5"]
    assert main(["eval", *task]) == 2
    assert "give tokenizer=FOLDER" in capsys.readouterr().err
    assert main(["eval", *task, f"tokenizer={albef_file.parent / 'vocab.txt'}"]) == 0
    out = capsys.readouterr().out
    assert "model weights:" in out and "loaded" in out
    result = json.loads(Path("runs/eval/ALBEF/eval/zero-shot-pictures-prompts=a_.json").read_text())
    assert result["step"] is None and len(result["checkpoint_sha256"]) == 64 and result["n"]["images"] == 10


def test_image_size_of_an_albef_file_can_be_changed(albef_file):
    opened = load_model(str(albef_file), options=LoadOptions(image_size=64, head_width=16, max_length=9))
    assert opened.eval_model.preprocess.size == (64, 64) and opened.eval_model.data.max_length == 9
    assert opened.reports["model"].resized == ("image.model.pos_embed",)
    assert (
        opened.eval_model.data.clean_captions
        and opened.eval_model.data.add_sep is False
        and opened.eval_model.data.resize.mode == "squash"
    )


# --- VLMo's files ------------------------------------------------------------------------------------------------------

MOME = Mome(48, 3, 4, 96, vl_from=2, drop_path=0.0, text_dropout=0.0, image_size=32, vocab_size=30, max_text_length=196)


@pytest.mark.parametrize(
    "spec",
    [
        Vlmo(MOME, embed_size=48),
        Vlmo(MOME, itc=False, itc_vl=False, itm=False, mlm=False, classes=7),  # VQA
        Vlmo(replace(MOME, image_kinds=2), itc=False, itc_vl=False, itm=False, mlm=False, classes=2, images=2),  # NLVR2
        Vlmo(replace(MOME, positions="absolute", layer_scale=None, max_text_length=20), itm=False, mlm=False),
    ],
)
def test_sizes_experts_and_heads_of_a_vlmo_file_are_those_of_its_tensors(tmp_path, spec):
    torch.manual_seed(0)
    own = spec.build().eval()
    exported = export_vlmo(VlmoCheckpoint(own.state_dict()))
    save_file({k: v.contiguous().clone() for k, v in exported.items()}, tmp_path / "vlmo.safetensors")
    opened = load_model(str(tmp_path / "vlmo.safetensors"), options=LoadOptions(head_width=12))
    model, pixels = opened.eval_model.model, torch.randn(2, 3, 32, 32)
    assert model.state_dict().keys() == own.state_dict().keys()
    with torch.no_grad():
        ids, mask = torch.randint(3, 30, (2, 9)), torch.ones(2, 9, dtype=torch.bool)
        torch.testing.assert_close(model.encode_image(pixels).embed, own.encode_image(pixels).embed)
        torch.testing.assert_close(model.encode_text(ids, mask).embed, own.encode_text(ids, mask).embed)
    assert opened.reports["model"].new == ()
    assert opened.eval_model.data.max_length == min(40, spec.encoder.max_text_length)


@pytest.mark.parametrize("lost", ["_imag.", "patch_embed", "word_embeddings", "token_type_embeddings"])
def test_vlmo_file_without_a_part_is_a_user_error(tmp_path, capsys, lost):
    exported = export_vlmo(VlmoCheckpoint(Vlmo(MOME, embed_size=48).build().state_dict()))
    kept = {key: value.contiguous().clone() for key, value in exported.items() if lost not in key}
    assert len(kept) < len(exported)
    save_file(kept, tmp_path / "vlmo.safetensors")
    assert main(["eval", str(tmp_path / "vlmo.safetensors"), "retrieval", "data=x", "head_width=12"]) == 2
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1 and "vlmo.safetensors lacks" in err, err


def test_texts_longer_than_the_positions_are_a_user_error(tmp_path, albef_file, capsys):
    for file, longest, width in ((albef_file, 40, 16), (tmp_path / "vlmo.safetensors", 196, 12)):
        if not file.exists():
            exported = export_vlmo(VlmoCheckpoint(Vlmo(MOME, embed_size=48).build().state_dict()))
            save_file({k: v.contiguous().clone() for k, v in exported.items()}, file)
        given = [str(file), "retrieval", "data=x", "max_length=300", f"head_width={width}"]
        assert main(["eval", *given]) == 2
        assert f"max_length=300 but the text tower takes {longest} tokens; lower it" in capsys.readouterr().err


# --- open_clip and unknown models -----------------------------------------------------------------------------


def test_open_clip_file_scores_as_open_clip_does(tmp_path, monkeypatch, photo):
    config = json.loads((Path(open_clip.__file__).parent / "model_configs" / "ViT-B-32.json").read_text())
    config["embed_dim"] = 16
    config["vision_cfg"] |= {"layers": 1, "width": 64, "image_size": 64}
    config["text_cfg"] |= {"layers": 1, "width": 64, "heads": 1}
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "tiny.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path / "configs" / "tiny.json")
    torch.manual_seed(0)
    own, _, transform = open_clip.create_model_and_transforms("tiny")
    torch.save(own.state_dict(), tmp_path / "tiny.pt")
    eval_model = load_model(f"open_clip:tiny/{tmp_path}/tiny.pt").eval_model
    with torch.no_grad():
        image = own.eval().encode_image(transform(photo)[None], normalize=True)
        text = own.encode_text(open_clip.get_tokenizer("tiny")(TEXTS), normalize=True)
        ids, mask, _ = eval_model.tokenizer(TEXTS, eval_model.data.max_length)
        pixels = eval_model.data.resize(np.array(photo), eval_model.preprocess.size, "bicubic")
        ours = eval_model.model.encode_image(eval_model.preprocess.normalise(pixels[None])).embed
        found = eval_model.model.encode_text(ids, mask).embed
    torch.testing.assert_close(found, text, rtol=0, atol=2e-6)
    torch.testing.assert_close(ours @ found.T, image @ text.T, rtol=0, atol=5e-3)


@pytest.mark.parametrize("model", ["ViT-B-16-SigLIP", "PE-Core-B-16", "ViT-H-14-CLIPA"])
def test_file_of_an_open_clip_model_keeps_the_preprocessing_of_its_published_weights(tmp_path, monkeypatch, model):
    """Mean, std, interpolation and resize mode of a tag, though the file has no tag; and CLIPA's texts without [SEP]."""
    config = json.loads((Path(open_clip.__file__).parent / "model_configs" / f"{model}.json").read_text())
    vision, text = config["vision_cfg"], config["text_cfg"]
    if "timm_model_name" in vision:
        vision |= {"timm_model_name": "test_vit", "image_size": 160, "timm_pool": "", "timm_proj": "linear"}
    else:
        vision |= {"layers": 1, "width": 160, "image_size": 28}
    text |= {"layers": 1, "width": 64, "heads": 1, "vocab_size": min(text["vocab_size"], 49408)}
    config["embed_dim"] = 64
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, model, config)
    torch.save(open_clip.create_model(model, force_custom_text=True).state_dict(), tmp_path / "w.pt")
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS))
    needs = "hf_tokenizer_name" in text  # on a hub
    options = LoadOptions(tokenizer=str(tmp_path / "vocab.txt") if needs else None)
    eval_model = load_model(f"open_clip:{model}/{tmp_path}/w.pt", options=options).eval_model
    tag = open_clip.get_pretrained_cfg(model, open_clip.list_pretrained_tags_by_model(model)[0])
    for name in ("mean", "std", "interpolation"):
        assert getattr(eval_model.preprocess, name) == tag[name]
    assert eval_model.data.resize.mode == tag["resize_mode"] == "squash"
    if needs:
        ids = eval_model.tokenizer(["a red"], 9)[0][0].tolist()
        assert (3 in ids) == (model != "ViT-H-14-CLIPA")


def test_unknown_model_is_a_user_error_that_lists_the_known_ones(tmp_path, capsys):
    save_file({"head.weight": torch.zeros(2)}, tmp_path / "x.safetensors")
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "config.json").write_text('{"model_type": "bert"}')

    class Harm:
        def __reduce__(self):
            return print, ("run",)

    torch.save({"a": Harm()}, tmp_path / "harm.pth")
    for path, message in (
        (tmp_path / "nothing", "no such file or folder"),
        (tmp_path / "x.safetensors", "of an unknown model; give a run folder"),
        (tmp_path / "bert", "a folder of a bert model that cannot be evaluated"),
        (tmp_path, "cannot be evaluated; give a run folder"),
        (tmp_path / "harm.pth", "would run code on loading"),
        ("open_clip:ViT-B-33", "open_clip has no model"),
    ):
        assert main(["eval", str(path), "retrieval", "data=x"]) == 2
        out, err = capsys.readouterr()
        assert out == "" and len(err.splitlines()) == 1 and message in err, err
    assert main(["eval", str(tmp_path / "x.safetensors"), "knn", "--checkpoint", "3"]) == 2
    assert "--checkpoint is for runs" in capsys.readouterr().err


def test_options_that_belong_to_the_weights_are_refused(folder, capsys):
    assert main(["eval", str(folder), "zero-shot", "tokenizer=x"]) == 2
    assert "leave it out" in capsys.readouterr().err
