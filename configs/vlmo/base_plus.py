"""VLMo-base-plus's third stage at the paper's scale: 24 layers of width 544, absolute positions, no layer scale.

Paper:    Bao et al. 2022, arXiv:2111.02358. As configs/vlmo/base.py but for the size and the learning rate, 1e-4; what is published
          and what differs stands there. Absolute positions end at 40 tokens.
Data:     as there; the published file saw 4 M images first, then more.
Weights:  weights/: the official file of stage 2 of this size, or the run folder of a stage 2 of your own; bert-base-uncased.
Command:  accelerate launch --config_file launch/gpu8.yaml -m vlp.train configs/vlmo/base_plus.py
Hardware: as base: 1024 texts a step, 200,000 steps. Not run here.
Goal:     VQA 78.5, NLVR2 85.1, COCO 76.3 / 58.6 and Flickr30k 93.2 / 81.8 (text / image R@1) after fine-tuning
          (the published code's README).
"""

from dataclasses import replace

from vlp.config import Data, Experiment, Saving, Training
from vlp.data.augment import RandAugment, RandomResizedCrop, Resize
from vlp.data.shards import Source
from vlp.encoders.mome import BASE_PLUS
from vlp.models.vlmo import Vlmo
from vlp.objectives.itc import ImageTextContrast
from vlp.objectives.itm import ImageTextMatching
from vlp.objectives.masking import TextMasking
from vlp.objectives.mlm import MaskedText
from vlp.optim.optimizers import AdamW
from vlp.optim.schedule import Schedule
from vlp.tasks.retrieval import Retrieval


def config() -> Experiment:
    return Experiment(
        name="vlmo-base-plus",
        model=Vlmo(
            encoder=replace(BASE_PLUS, drop_path=0.1, text_dropout=0.1),
            temperature=0.07,
            temperature_min=0.01,
            weights="weights/vlmo_base_plus_patch16_224_stage2.pt",
            vl_start="random",
        ),
        objectives={
            "itc": ImageTextContrast(weight=0.5),
            "itc_vl": ImageTextContrast(weight=0.5, head="vl"),
            "itm": ImageTextMatching(keys="student", candidates="all"),
            "mlm": MaskedText(weight=0.25, masking=TextMasking(probability=0.15, of="word", random_from="all")),
        },
        data=Data(
            train=(
                Source("shards/coco"),
                Source("shards/visual-genome"),
                Source("shards/cc3m"),
                Source("shards/sbu"),
            ),
            val="shards/flickr30k-val",
            tokenizer="weights/bert-base-uncased",
            batch_size=1024,
            max_length=40,
            augment=RandomResizedCrop(scale=(0.5, 1.0), flip=0.5, then=(RandAugment(n=2, magnitude=7),)),
            resize=Resize(mode="squash"),
            workers=8,
        ),
        optim=AdamW(lr=1e-4, betas=(0.9, 0.98), eps=1e-8, weight_decay=0.01),
        schedule=Schedule(warmup_steps=2500, kind="linear"),
        train=Training(
            steps=200_000, precision="bf16", clip_norm=None, activation_checkpointing="cheap", backward="per_loss"
        ),
        evaluate={"retrieval": Retrieval()},
        evaluate_every=10_000,
        save=Saving(every=2000, keep=2, best="retrieval/mean_recall"),
    )
