"""The models that are measured: published sizes with random weights and no dropout, and tiny ones of the same form."""

from dataclasses import replace
from pathlib import Path

import open_clip

from vlp.encoders.fusion import Fusion
from vlp.encoders.image import TimmImage
from vlp.encoders.mome import BASE, TINY
from vlp.encoders.open_clip import OpenClip
from vlp.encoders.text import BertText
from vlp.models.albef import Albef
from vlp.models.dual import Dual
from vlp.models.vlmo import Vlmo

VOCABULARY = {"model_type": "bert", "vocab_size": 30_522}
HALF_BERT = VOCABULARY | {"hidden_size": 768, "num_hidden_layers": 6, "num_attention_heads": 12}
HALF_BERT |= {"intermediate_size": 3072}
TINY_BERT = VOCABULARY | {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}


def albef(image_size: int, **parts) -> Albef:
    """ViT-B/16, six layers of BERT-base for text, six for fusion."""
    text = BertText(config=HALF_BERT, dropout=0.0)
    return Albef(TimmImage("vit_base_patch16_224", image_size=image_size), text, Fusion(6, dropout=0.0), **parts)


def tiny_albef(**parts) -> Albef:
    text = BertText(config=TINY_BERT, dropout=0.0)
    return Albef(TimmImage("test_vit", image_size=32), text, Fusion(layers=1, dropout=0.0), **parts)


def clip(name: str, **parts) -> Dual:
    """open_clip's towers by their name there, e.g. "ViT-B-32", with CLIP's learned scale."""
    towers = OpenClip(name, **parts)
    return Dual(towers=towers, projection="none", temperature=0.07, temperature_form="logit_scale")


TINY_CLIP = "tiny-clip"
open_clip.add_model_config(Path(__file__).with_name(f"{TINY_CLIP}.json"))
VLMO = Vlmo(replace(BASE, drop_path=0.0, text_dropout=0.0))
TINY_VLMO = Vlmo(replace(TINY, width=32, heads=2, layers=2, vl_from=1, image_size=32))
