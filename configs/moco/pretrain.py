"""MoCo: a view of an image identifies the image's other view among the momentum keys of a queue.

Paper: He et al. 2020, arXiv:1911.05722 (v1): linear head to 128, temperature 0.07, queue of 65,536, momentum 0.999,
    ShuffleBN over 8 GPUs, SGD at 0.03, a tenth of it after 120 and again after 160 of 200 epochs, weight decay 1e-4,
    batch 256. Chen et al. 2020, arXiv:2003.04297 (v2): MLP head, temperature 0.2, cosine schedule, blur. Linear probe
    on ImageNet: v1 60.8 %, v2 67.5 % top-1 (their repository).
Data: ImageNet's images as your own shards. Starts from random weights.
Differs: biases and BatchNorm's scales have no weight decay. In v1 hues turn by 0.1 instead of 0.4.
Cost: 8 GPUs of 16 GB; 53 hours on 8 V100 in the paper. Not run here.
Command: accelerate launch --config_file launch/ddp_gpu8.yaml -m vlp.train configs/moco/pretrain.py data.train=shards/train
    accelerate launch --config_file launch/ddp_gpu8.yaml -m vlp.train configs/moco/pretrain.py:v2 data.train=shards/train
"""

from dataclasses import replace

from vlp.config import Data, Experiment, Saving, Training
from vlp.data.augment import ColourDistortion, GaussianBlur, RandomResizedCrop
from vlp.data.reading.shards import Source
from vlp.encoders.image import TimmImage
from vlp.models.single import Single
from vlp.objectives.moco import Moco
from vlp.optim.ema import MomentumConfig
from vlp.optim.optimizers import AdamW, Sgd
from vlp.optim.schedule import Schedule
from vlp.tasks.probe import Knn


def config() -> Experiment:
    """v1: ResNet-50 on ImageNet, as published."""
    view = RandomResizedCrop(scale=(0.2, 1.0), then=(ColourDistortion(strength=0.5, probability=1.0),))
    return Experiment(
        name="moco-v1-resnet50",
        model=Single(image=TimmImage("resnet50", image_size=224), head="linear", embed_size=128),
        objectives={"moco": Moco()},
        data=Data(train=(Source("shards/train"),), batch_size=256, augment=view, views=(view,), workers=8),
        optim=Sgd(lr=0.03, momentum=0.9, weight_decay=1e-4),
        schedule=Schedule(kind="constant", drops=(0.6, 0.8)),
        train=Training(epochs=200, clip_norm=None),
        momentum=MomentumConfig(decay=0.999),
        save=Saving(every=5000, keep=2),
    )


def v2() -> Experiment:
    """v2: MLP head, temperature 0.2, blur, cosine schedule."""
    v1 = config()
    view = RandomResizedCrop(scale=(0.2, 1.0), then=(ColourDistortion(strength=0.5), GaussianBlur()))
    return replace(
        v1,
        name="moco-v2-resnet50",
        model=replace(v1.model, head="mlp"),
        objectives={"moco": Moco(temperature=0.2)},
        data=replace(v1.data, augment=view, views=(view,)),
        schedule=Schedule(kind="cosine"),
    )


def imagenette() -> Experiment:
    """v2: RegNetX-200MF on 2,000 images, in eight minutes.

    Data: imagenette, 200 images of 160 pixels for each of ten classes, labels unused; 100 more of each are classified.
        Starts from random weights.
    Differs: 64 pixels and RegNetX-200MF instead of 224 and ResNet-50; batch 128, AdamW and momentum 0.99 for hundreds
        of steps instead of 256, SGD and 0.999 for a million; gradients clipped at norm 1; a queue of 1,024 rows that
        starts empty and masks an image's own older view, because an epoch has only 2,000 images; half the colour
        distortion, no blur.
    Measured: kNN 33.8 %, untrained 22.7 %, after 500 steps 31.9 %; the goal was 10 points above the untrained tower
        (vlp eval runs/moco-v2-imagenette knn data=../shared/data/imagenette).
    Cost: one CPU core, 7.6 minutes.
    Command: vlp data pack --split train ../shared/data/imagenette/labels.jsonl data/imagenette/train
        vlp train configs/moco/pretrain.py:imagenette
        vlp eval runs/moco-v2-imagenette knn data=../shared/data/imagenette
    """
    view = RandomResizedCrop(scale=(0.2, 1.0), then=(ColourDistortion(0.5),))
    return Experiment(
        name="moco-v2-imagenette",
        model=Single(image=TimmImage("regnetx_002", image_size=64), head="mlp", embed_size=128),
        objectives={"moco": Moco(temperature=0.2, queue_size=1024, random_start=False, duplicates="mask", groups=4)},
        data=Data(train=(Source("data/imagenette/train"),), batch_size=128, augment=view, views=(view,), workers=1),
        optim=AdamW(lr=2e-3, betas=(0.9, 0.99), weight_decay=0.05),
        schedule=Schedule(warmup_steps=50, kind="cosine"),
        train=Training(steps=800),
        momentum=MomentumConfig(decay=0.99),
        evaluate={"knn": Knn(data="../shared/data/imagenette")},
        save=Saving(every=400, keep=1),
    )
