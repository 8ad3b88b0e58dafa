"""Statements about two pictures, as in NLVR2, on the synthetic world: the text alone, or with one of them, is right half the time.

Paper:    Li et al. 2021, arXiv:2107.07651, sec. 4: twins of each fusion layer, a classifier on the first token.
Data:     data/world, see world.py: pairs.jsonl compares the colour, shape, place or number of things of two scenes.
Start:    runs/albef-world-assignment, see world_assignment.py.
Commands: vlp train configs/albef/world.py
          vlp train configs/albef/world_assignment.py
          vlp train configs/albef/world_pairs.py
          vlp eval runs/albef-world-pairs classification split=val images=data/world/val by=kind
Hardware: 1 CPU core, about 10 minutes beside other work.
Measured: 50.0 %, which is chance: after 240 steps the loss is where it began. What it starts from hardly knows what belongs to what in one
          scene (minimal pairs 53.1 %, see world.py), and here two are to be compared.
Tried:    700 steps, broken off after 153; from an earlier ALBEF of pictures of 128 px, 1,000 steps at twice the learning rate with the image
          tower frozen, broken off after 547: the loss stayed where it was.
"""

from vlp.config import Data, Experiment, Logging, Saving, Training
from vlp.data.annotated import Annotated
from vlp.data.augment import RandomResizedCrop, Resize
from vlp.encoders.fusion import Fusion
from vlp.encoders.image import TimmImage
from vlp.encoders.text import BertText
from vlp.models.albef import Albef
from vlp.objectives.classification import Classification
from vlp.optim.optimizers import AdamW
from vlp.optim.schedule import Schedule
from vlp.tasks.annotated_classes import Classes

SIZES = {
    "model_type": "bert",
    "vocab_size": 200,
    "hidden_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 512,
    "max_position_embeddings": 40,
}


def config() -> Experiment:
    return Experiment(
        name="albef-world-pairs",
        model=Albef(
            image=TimmImage("test_resnet", image_size=224, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)),
            text=BertText(config=SIZES, dropout=0.0),
            fusion=Fusion(layers=3, images=2),
            itc=False,
            itm=False,
            mlm=False,
            classes=2,
            weights="runs/albef-world-assignment",
        ),
        objectives={"pairs": Classification()},
        data=Data(
            train=(
                Annotated(
                    "data/world/pairs.jsonl",
                    images="data/world/train",
                    image=("image0", "image1"),
                    label="answer",
                    classes=("false", "true"),
                    split="train",
                ),
            ),
            tokenizer="data/world/tokenizer",
            batch_size=64,
            max_length=40,
            augment=RandomResizedCrop(scale=(1.0, 1.0), ratio=(1.0, 1.0), flip=0.0),
            resize=Resize(mode="squash"),
            workers=1,
        ),
        optim=AdamW(lr=5e-4, weight_decay=0.02),
        schedule=Schedule(warmup_steps=30, kind="cosine"),
        train=Training(steps=240, threads=1),
        evaluate={"pairs": Classes(split="val", images="data/world/val", by="kind")},
        save=Saving(every=500, keep=1),
        log=Logging(geometry_every=0),
    )
