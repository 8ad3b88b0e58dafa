"""Contrastive pairs, triplets, (N+1)-tuplets and N-pairs on 2,000 images: the losses that InfoNCE grew out of.

Paper: Hadsell et al. 2006 (contrastive, eq. 4). Schroff et al. 2015, arXiv:1503.03832 (triplets, section 3). Sohn 2016
    ((N+1)-tuplet, section 3.1; N-pair, section 3.2). All of them train on labelled classes; here a class is one image.
Data: imagenette, 200 images of 160 pixels for each of ten classes, labels unused; 100 more of each are classified.
    Starts from random weights.
Differs: positives are two views of an image instead of two images of a class. Model, augmentation, batch and schedule are
    those of configs/simclr/pretrain.py:imagenette, not tuned for each loss.
Cost: 2 CPU cores, 6 minutes.
Command: vlp data pack --split train ../shared/data/imagenette/labels.jsonl data/imagenette/train
    vlp train configs/pairwise/imagenette.py:triplet
    vlp eval runs/triplet-imagenette knn data=../shared/data/imagenette
"""

from dataclasses import replace

from vlp.config import Data, Experiment, Saving, Training
from vlp.data.augment import ColourDistortion, RandomResizedCrop
from vlp.data.reading.shards import Source
from vlp.encoders.image import TimmImage
from vlp.models.single import Single
from vlp.objectives.pairwise import NPair, PairContrast, Triplet, Tuplet
from vlp.optim.optimizers import AdamW
from vlp.optim.schedule import Schedule
from vlp.tasks.probe import Knn


def config() -> Experiment:
    """Contrastive loss: each row with its own key and with the key of the next row.

    Measured: kNN 25.6 % after 400 steps; untrained 22.7 % (vlp train configs/pairwise/imagenette.py).
    """
    view = RandomResizedCrop(scale=(0.2, 1.0), then=(ColourDistortion(0.5),))
    return Experiment(
        name="contrastive-imagenette",
        model=Single(image=TimmImage("regnetx_002", image_size=64), head="mlp", head_norm=True, embed_size=128),
        objectives={"contrastive": PairContrast()},
        data=Data(train=(Source("data/imagenette/train"),), batch_size=128, augment=view, views=(view,), workers=1),
        optim=AdamW(lr=2e-3, betas=(0.9, 0.99), weight_decay=0.05),
        schedule=Schedule(warmup_steps=50, kind="cosine"),
        train=Training(steps=400),
        evaluate={"knn": Knn(data="../shared/data/imagenette")},
        save=Saving(every=200, keep=1),
    )


def triplet() -> Experiment:
    """Triplets with semi-hard negatives.

    Measured: kNN 33.5 % after 400 steps (vlp train configs/pairwise/imagenette.py:triplet).
    """
    return replace(config(), name="triplet-imagenette", objectives={"triplet": Triplet()})


def tuplet() -> Experiment:
    """(N+1)-tuplets of pooled states: 16 negatives for each row.

    Measured: kNN 38.4 % after 400 steps.
    """
    contrastive = config()
    model = replace(contrastive.model, head="none", head_norm=False, embed_size=None)
    return replace(contrastive, name="tuplet-imagenette", model=model, objectives={"tuplet": Tuplet()})


def n_pair() -> Experiment:
    """N-pair loss of pooled states: all other rows are negatives.

    Measured: kNN 40.4 % after 400 steps.
    """
    contrastive = config()
    model = replace(contrastive.model, head="none", head_norm=False, embed_size=None)
    return replace(contrastive, name="n-pair-imagenette", model=model, objectives={"n_pair": NPair()})
