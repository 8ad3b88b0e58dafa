"""MoCo v2 on 2,000 photos of ten classes, from a random tower: a view finds its photo's other view among older ones.

Paper:    Chen et al. 2020, arXiv:2003.04297 (v2), on He et al. 2020, arXiv:1911.05722: momentum encoder, queue,
          ShuffleBN, MLP head, temperature 0.2, colour distortion, cosine schedule.
Data:     imagenette, 200 photos of 160 px a class for training, their classes unused; 100 more of each are classified.
Differs from the paper: 64 px and RegNetX-200MF instead of 224 px and ResNet-50; batch 128, AdamW and 0.99 as momentum
          for hundreds of steps instead of 256, SGD and 0.999 for a million; a queue of 1024 rows that starts empty and
          leaves out a photo's own older view, since an epoch has only 2,000; half the colour distortion, no blur.
Commands: vlp data pack --split train ../shared/data/imagenette/labels.jsonl data/imagenette/train
          vlp train configs/moco/v2_imagenette.py
          vlp eval runs/moco-v2-imagenette knn data=../shared/data/imagenette
Hardware: 1 CPU core, 7.6 minutes.
Goal:     kNN top-1 (k = 200) on the 1,000 held-out photos at least 10 points above that of the untrained tower.
Measured: kNN 33.8 %; untrained 22.7 %; after 500 steps 31.9 %.
"""

from vlp.config import Data, Experiment, Saving, Training
from vlp.data.augment import ColourDistortion, RandomResizedCrop
from vlp.data.shards import Source
from vlp.encoders.image import TimmImage
from vlp.models.single import Single
from vlp.objectives.moco import Moco
from vlp.optim.ema import MomentumConfig
from vlp.optim.optimizers import AdamW
from vlp.optim.schedule import Schedule
from vlp.tasks.probe import Knn

VIEW = RandomResizedCrop(scale=(0.2, 1.0), then=(ColourDistortion(0.5),))


def config() -> Experiment:
    return Experiment(
        name="moco-v2-imagenette",
        model=Single(image=TimmImage("regnetx_002", image_size=64), head="mlp", embed_size=128),
        objectives={
            "moco": Moco(temperature=0.2, queue_size=1024, random_start=False, same_picture="left_out", groups=4)
        },
        data=Data(train=(Source("data/imagenette/train"),), batch_size=128, augment=VIEW, views=(VIEW,), workers=1),
        optim=AdamW(lr=2e-3, betas=(0.9, 0.99), weight_decay=0.05),
        schedule=Schedule(warmup_steps=50, kind="cosine"),
        train=Training(steps=800),
        momentum=MomentumConfig(decay=0.99),
        evaluate={"knn": Knn(data="../shared/data/imagenette")},
        save=Saving(every=400, keep=1),
    )
