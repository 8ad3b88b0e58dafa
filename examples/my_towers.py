"""Towers of your own in the models of vlp: a ConvNet and a bag of words as a dual encoder, and the ConvNet in an ALBEF.

A tower is a frozen dataclass (its spec) and a module, see `vlp.encoders.base`. They live in modules next to this file.

Data:     10,000 drawn scenes to train, 1,000 to evaluate; no download.
Start:    random weights.
Commands: vlp data world data/world
          vlp data tokenizer data/world/train data/world/tokenizer --vocab-size 200
          vlp train examples/my_towers.py
          vlp eval runs/my-towers retrieval --config examples/my_towers.py
Hardware: 1 CPU core.
Measured: R@1 28.7 %, R@5 87.9 %, mean of both directions, of 1,000 held-out scenes.
"""

from dataclasses import replace

from bag_of_words import BagOfWords
from conv_image import ConvNet

from vlp.config import Data, Experiment, Saving, Training
from vlp.data.augment import RandomResizedCrop, Resize
from vlp.data.reading.shards import Source
from vlp.encoders.fusion import Fusion
from vlp.encoders.text import BertText
from vlp.models.albef import Albef
from vlp.models.dual import Dual
from vlp.objectives.itc import ImageTextContrast
from vlp.objectives.itm import ImageTextMatching
from vlp.objectives.masking import TextMasking
from vlp.objectives.mlm import MaskedText
from vlp.optim.optimizers import AdamW
from vlp.optim.schedule import Schedule
from vlp.tasks.retrieval import Retrieval

BERT = {
    "model_type": "bert",
    "vocab_size": 200,
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 512,
    "max_position_embeddings": 40,
}


def config() -> Experiment:
    return Experiment(
        name="my-towers",
        model=Dual(
            image=ConvNet(width=128, image_size=64),
            text=BagOfWords(vocab_size=200, width=128, max_length=40),
            projection="both",
            embed_size=64,
            temperature=0.07,
        ),
        objectives={"itc": ImageTextContrast()},
        data=Data(
            train=(Source("data/world/train"),),
            val="data/world/val",
            tokenizer="data/world/tokenizer",
            batch_size=64,
            max_length=40,
            # the captions say where things are: nothing is cropped or mirrored
            augment=RandomResizedCrop(scale=(1.0, 1.0), ratio=(1.0, 1.0), flip=0.0),
            resize=Resize(mode="squash"),
            workers=1,
        ),
        optim=AdamW(lr=1e-3, weight_decay=0.02),
        schedule=Schedule(warmup_steps=50, kind="cosine"),
        train=Training(steps=1000, threads=1),
        evaluate={"retrieval": Retrieval()},
        save=Saving(every=500, keep=1),
    )


def albef() -> Experiment:
    """An ALBEF with the same ConvNet: the fusion layers of a small BERT attend to the ConvNet's grid.

    Commands: vlp train examples/my_towers.py:albef
    Measured: R@1 34.3 %, R@5 91.0 %, mean of both directions, of 1,000 held-out scenes.
    """
    experiment = config()
    return replace(
        experiment,
        name="my-towers-albef",
        model=Albef(
            image=experiment.model.image,
            text=BertText(config=BERT, dropout=0.0),
            fusion=Fusion(layers=2),
            embed_size=64,
        ),
        objectives={
            "itc": ImageTextContrast(),
            "itm": ImageTextMatching(keys="student"),
            "mlm": MaskedText(masking=TextMasking(probability=0.25)),
        },
    )
