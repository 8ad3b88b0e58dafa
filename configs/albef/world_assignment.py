"""Text assignment on the synthetic world: which of two pictures is a caption of? It prepares the twins for statements about pairs.

Paper:    Li et al. 2021, arXiv:2107.07651, sec. 4.
Data:     data/world, see world.py.
Start:    runs/albef-world, each of whose fusion layers becomes two.
Commands: vlp train configs/albef/world.py
          vlp train configs/albef/world_assignment.py
Hardware: 1 CPU core, 12 minutes beside other work.
Measured: the loss falls from 1.12, over the first ten steps, to 0.19, over the last fifty, of 1.1 nats at chance: scenes, as wholes, are
          told apart.
"""

from vlp.config import Data, Experiment, Logging, Saving, Training
from vlp.data.augment import RandomResizedCrop, Resize
from vlp.data.shards import Source
from vlp.encoders.fusion import Fusion
from vlp.encoders.image import TimmImage
from vlp.encoders.text import BertText
from vlp.models.albef import Albef
from vlp.objectives.assignment import TextAssignment
from vlp.optim.optimizers import AdamW
from vlp.optim.schedule import Schedule

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
        name="albef-world-assignment",
        model=Albef(
            image=TimmImage("test_resnet", image_size=224, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)),
            text=BertText(config=SIZES, dropout=0.0),
            fusion=Fusion(layers=3, images=2),
            itm=False,
            mlm=False,
            assignment=True,
            embed_size=64,
            weights="runs/albef-world",
        ),
        objectives={"assignment": TextAssignment()},
        data=Data(
            train=(Source("data/world/train"),),
            tokenizer="data/world/tokenizer",
            batch_size=64,
            max_length=40,
            augment=RandomResizedCrop(scale=(1.0, 1.0), ratio=(1.0, 1.0), flip=0.0),
            resize=Resize(mode="squash"),
            workers=1,
        ),
        optim=AdamW(lr=5e-4, weight_decay=0.02),
        schedule=Schedule(warmup_steps=30, kind="cosine"),
        train=Training(steps=500, frozen=("image_projection", "text_projection", "temperature"), threads=1),
        save=Saving(every=500, keep=1),
        log=Logging(geometry_every=0),
    )
