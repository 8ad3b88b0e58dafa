"""Masked image modelling from nothing on 2,000 photos: what VLMo's first stage does, at the size of two CPU cores.

Paper:    Bao et al. 2022, arXiv:2106.08254 (BEiT): 40 % of the patches in blocks of 16 or more, a mask token in their place;
          He et al. 2022, arXiv:2111.06377 (MAE): what is predicted are the patches' own pixels, normalised patch by patch.
Data:     the 2,000 train photos of imagenette's ten classes, at 160 px.
Differs from the papers: ViT-Tiny at 128 px, 8 x 8 patches, 16 epochs instead of 800; BEiT's encoder, which sees the mask
          tokens, with MAE's targets, since the tokenizer that BEiT learned to predict is a download.
Commands: vlp data pack --split train ../shared/data/imagenette/labels.jsonl data/imagenette/train
          vlp train configs/mim/imagenette.py
          vlp eval runs/mim-imagenette knn data=../shared/data/imagenette
Hardware: 2 CPU cores, 10 minutes.
Goal:     a mean squared error below 0.85 (a patch's mean has 1), and neighbours of the trained tower better than those of the
          untrained one. Masked modelling is known for features that need fine-tuning, so kNN says little of them.
"""

from vlp.config import Data, Experiment, Logging, Saving, Training
from vlp.data.augment import RandomResizedCrop
from vlp.data.shards import Source
from vlp.encoders.image import TimmImage
from vlp.encoders.patch_targets import Pixels
from vlp.models.single import Single
from vlp.objectives.mim import MaskedImage
from vlp.optim.optimizers import AdamW
from vlp.optim.schedule import Schedule
from vlp.tasks.probe import Knn


def config() -> Experiment:
    return Experiment(
        name="mim-imagenette",
        model=Single(image=TimmImage("vit_tiny_patch16_224", image_size=128), mim=Pixels()),
        objectives={"mim": MaskedImage()},
        data=Data(
            train=(Source("data/imagenette/train"),),
            batch_size=64,
            augment=RandomResizedCrop(scale=(0.4, 1.0), flip=0.5),
            workers=1,
        ),
        optim=AdamW(lr=1e-3, betas=(0.9, 0.98), weight_decay=0.05),
        schedule=Schedule(warmup_steps=50, kind="cosine"),
        train=Training(steps=500, precision="bf16"),
        evaluate={"knn": Knn(data="../shared/data/imagenette")},
        save=Saving(every=250, keep=1),
        log=Logging(geometry_every=0),
    )
