"""Visual entailment by the small VLMo of the three stages: the dual encoder of its retrieval, now as a fusion encoder.

Paper:    Bao et al. 2022, arXiv:2111.02358, fig. 1 and sec. 3.4: one set of weights for both.
Data:     as configs/albef/entailment_flickr8k.py: 3,434 hypotheses on photos of Flickr8k's train split, 536 on photos of val.
Start:    runs/vlmo-small/3-pairs, see stages.py; the head is new.
Commands: vlp train configs/vlmo/stages.py    (or, as measured, with model.weights of a seed of staged_or_not.py)
          vlp train configs/vlmo/entailment_flickr8k.py
          vlp eval runs/vlmo-entailment-flickr8k classification split=val
Hardware: 1 CPU core, 2 minutes.
Measured: 47.9 % (44.0 to 51.7), from seed 0 of staged_or_not.py, whose R@10 is 2.9 %; the largest class is 32.8 %, the hypotheses alone
          give 59.1 %: ten minutes from random weights leave too little language.
"""

from dataclasses import replace

from vlp.config import Data, Experiment, Logging, Saving, Training
from vlp.data.annotated import Annotated
from vlp.data.augment import RandomResizedCrop, Resize
from vlp.encoders.mome import TINY
from vlp.models.vlmo import Vlmo
from vlp.objectives.classification import Classification
from vlp.optim.optimizers import AdamW
from vlp.optim.schedule import Schedule
from vlp.tasks.annotated_classes import Classes


def config() -> Experiment:
    return Experiment(
        name="vlmo-entailment-flickr8k",
        model=Vlmo(
            encoder=replace(TINY, text_dropout=0.1),
            itc=False,
            itc_vl=False,
            itm=False,
            mlm=False,
            classes=3,
            weights="runs/vlmo-small/3-pairs",
        ),
        objectives={"entailment": Classification()},
        data=Data(
            train=(
                Annotated(
                    "../shared/data/entailment_flickr8k/entailment.jsonl",
                    text="hypothesis",
                    label="label",
                    classes=("contradiction", "neutral", "entailment"),
                    split="train",
                    split_field="image_split",
                ),
            ),
            tokenizer="../shared/data/text/bert_base_uncased_vocab.txt",
            batch_size=64,
            max_length=40,
            augment=RandomResizedCrop(scale=(0.5, 1.0), flip=0.5),
            resize=Resize(mode="squash"),
            workers=1,
        ),
        optim=AdamW(lr=3e-4, weight_decay=0.05),
        schedule=Schedule(warmup_steps=20, kind="linear"),
        train=Training(steps=270, precision="bf16", lr_scales={"classifier": 5.0}),
        evaluate={"entailment": Classes(split="val")},
        save=Saving(every=270, keep=1),
        log=Logging(geometry_every=0),
    )
