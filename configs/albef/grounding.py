"""ALBEF fine-tuned on RefCOCO+ without its boxes: phrases and images that belong together, then grounding by Grad-CAM.

Paper: Li et al. 2021, arXiv:2107.07651, section 4 and table 5, which has the numbers.
Data: RefCOCO+ (Yu et al. 2016) on COCO's images: ALBEF's refcoco+_train.json, refcoco+_val.json and refcoco+_test.json;
    of the official files refs(unc).p, instances.json, and the proposals of MAttNet, dets.json. Starts from
    weights/ALBEF.pth, the published pre-training; positions are resized from 256 to 384 pixels.
As published: contrast and matching as in configs/albef/retrieval.py. Images are squashed and never cropped. The heat
    map is that of the third of the six fusion layers.
Differs: an image whose phrase says left or right is not mirrored. The map is averaged over the tokens of the phrase
    only; the published mean includes [CLS] and padding. All other differences are those of configs/albef/retrieval.py.
Cost: the paper used 8 A100, 256 phrases a step, 5 epochs. Not run here.
Command: vlp data annotations refcoco refcoco+_train.json data/refcoco-train.jsonl
    vlp data annotations refcoco refcoco+_val.json "refs(unc).p" instances.json dets.json data/refcoco-val.jsonl     # also test
    accelerate launch --config_file launch/ddp_gpu8.yaml -m vlp.train configs/albef/grounding.py
    vlp eval runs/albef-refcoco-plus grounding data=data/refcoco-val.jsonl images=images split=val layer=2
    vlp eval runs/albef-refcoco-plus grounding data=data/refcoco-test.jsonl images=images split=testA layer=2     # also testB
"""

from dataclasses import replace

from vlp.config import Data, Experiment, Saving, Training
from vlp.data.augment import RandAugment, Resize, ResizeCrop
from vlp.data.reading.annotated import Annotated
from vlp.models.albef import BASE
from vlp.objectives.itc import MomentumContrast
from vlp.objectives.itm import ImageTextMatching
from vlp.optim.ema import MomentumConfig
from vlp.optim.optimizers import AdamW
from vlp.optim.schedule import Schedule


def config() -> Experiment:
    """RefCOCO+, as published."""
    return Experiment(
        name="albef-refcoco-plus",
        model=replace(
            BASE,
            mlm=False,
            temperature_min=None,
            temperature_max=None,
            weights="weights/ALBEF.pth",
        ),
        objectives={
            "itc": MomentumContrast(
                queue_size=65_536, keys="local", duplicates="positive", distill=0.4, ramp_epochs=1.0
            ),
            "itm": ImageTextMatching(keys="momentum", candidates="local", duplicates="mask"),
        },
        momentum=MomentumConfig(decay=0.995, mode="train"),
        data=Data(
            train=(Annotated("data/refcoco-train.jsonl", images="images"),),
            tokenizer="weights/bert-base-uncased",
            add_sep=False,
            clean_captions=True,
            batch_size=256,
            max_length=30,
            augment=ResizeCrop(fraction=1.0, flip=0.5, then=(RandAugment(n=2, magnitude=7),)),
            resize=Resize(mode="squash"),
            workers=8,
        ),
        optim=AdamW(lr=1e-5, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.02),
        schedule=Schedule(warmup_steps=0, kind="cosine", final_fraction=0.1),
        train=Training(epochs=5.0, precision="fp32", clip_norm=None, processes=8),
        save=Saving(every=500, keep=2),
    )
