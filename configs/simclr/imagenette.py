"""SimCLR on 2,000 photos of ten classes, from a random tower: two views of a photo find each other in the batch.

Paper:    Chen et al. 2020, arXiv:2002.05709: NT-Xent, small crops, colour distortion, blur, an MLP head that is thrown
          away.
Data:     imagenette, 200 photos of 160 px a class for training, their classes unused; 100 more of each are classified.
Differs from the paper: 64 px and RegNetX-200MF instead of 224 px and ResNet-50; batch 128 and temperature 0.2 instead
          of 4096 and 0.1; AdamW, because LARS is for large batches; half the colour distortion, no blur: there is
          little to blur at 64 px.
Commands: vlp data pack --split train ../shared/data/imagenette/labels.jsonl data/imagenette/train
          vlp train configs/simclr/imagenette.py
          vlp eval runs/simclr-imagenette knn data=../shared/data/imagenette
Hardware: 2 CPU cores, 6 minutes.
Goal:     kNN top-1 (k = 200) on the 1,000 held-out photos at least 10 points above that of the untrained tower.
Measured: kNN 37.3 % after 400 steps, 5.7 minutes; untrained 22.7 %.
"""

from vlp.config import Data, Experiment, Saving, Training
from vlp.data.augment import ColourDistortion, RandomResizedCrop
from vlp.data.shards import Source
from vlp.encoders.image import TimmImage
from vlp.models.single import Single
from vlp.objectives.simclr import SimClr
from vlp.optim.optimizers import AdamW
from vlp.optim.schedule import Schedule
from vlp.tasks.probe import Knn

VIEW = RandomResizedCrop(scale=(0.2, 1.0), then=(ColourDistortion(0.5),))


def config() -> Experiment:
    return Experiment(
        name="simclr-imagenette",
        model=Single(
            image=TimmImage("regnetx_002", image_size=64),
            head="mlp",
            head_norm=True,
            embed_size=128,
        ),
        objectives={"simclr": SimClr(temperature=0.2)},
        data=Data(train=(Source("data/imagenette/train"),), batch_size=128, augment=VIEW, views=(VIEW,), workers=1),
        optim=AdamW(lr=2e-3, betas=(0.9, 0.99), weight_decay=0.05),
        schedule=Schedule(warmup_steps=50, kind="cosine"),
        train=Training(steps=400),
        evaluate={"knn": Knn(data="../shared/data/imagenette")},
        save=Saving(every=200, keep=1),
    )
