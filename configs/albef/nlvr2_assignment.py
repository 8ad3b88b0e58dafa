"""Text assignment, between ALBEF's pre-training and NLVR2: to which of two pictures does a text belong, or to neither?

Paper:    Li et al. 2021, arXiv:2107.07651, sec. 4: one more epoch of the 4 M pictures prepares the fusion encoder for pairs.
Data:     COCO, Visual Genome, Conceptual Captions 3M, SBU, as in paper_4m.py; your own shards of them.
Weights:  weights/ALBEF.pth, the published pre-training, each of whose fusion layers becomes two; the head is new.
Command:  accelerate launch --config_file launch/gpu8.yaml -m vlp.train configs/albef/nlvr2_assignment.py
Hardware: the paper: 8 A100, 512 texts a step, 1 epoch. Not run here; nlvr2.py continues from it.
As published: the other picture is drawn by the similarity of pictures at temperature 0.07, from those of the same process; the
          projections of ITC, which tell the similarity, are not trained.
Differs:  rows that show the same picture are no negatives of each other; the warm-up of 100 steps is linear from 0.
"""

from vlp.config import Data, Experiment, Saving, Training
from vlp.data.augment import RandAugment, RandomResizedCrop
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
    "vocab_size": 30_522,
    "hidden_size": 768,
    "num_hidden_layers": 6,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
}


def config() -> Experiment:
    return Experiment(
        name="albef-nlvr2-assignment",
        model=Albef(
            image=TimmImage(
                "deit_base_patch16_224",
                image_size=256,
                mean=(0.48145466, 0.4578275, 0.40821073),
                std=(0.26862954, 0.26130258, 0.27577711),
            ),
            text=BertText(config=SIZES, dropout=0.1),
            fusion=Fusion(layers=6, images=2, heads=12, hidden_size=3072, dropout=0.1, eps=1e-12),
            itm=False,
            mlm=False,
            assignment=True,
            weights="weights/ALBEF.pth",
        ),
        objectives={"assignment": TextAssignment()},
        data=Data(
            train=(
                Source("shards/coco"),
                Source("shards/visual-genome"),
                Source("shards/cc3m"),
                Source("shards/sbu"),
            ),
            tokenizer="weights/bert-base-uncased",
            sep=False,
            clean=True,
            batch_size=512,
            max_length=30,
            augment=RandomResizedCrop(scale=(0.2, 1.0), flip=0.5, then=(RandAugment(n=2, magnitude=7),)),
            workers=8,
        ),
        optim=AdamW(lr=2e-5, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.02),
        schedule=Schedule(warmup_steps=100, kind="cosine", final_fraction=0.5),
        train=Training(
            epochs=1,
            precision="fp32",
            clip_norm=None,
            frozen=("image_projection", "text_projection", "temperature"),
            processes=8,
        ),
        save=Saving(every=1000, keep=2),
    )
