"""SimCLR: two views of an image find each other in the batch.

Paper: Chen et al. 2020, arXiv:2002.05709, appendix B.9: NT-Xent, small crops, colour distortion 1, blur, MLP head with
    BatchNorm to 128 that is discarded afterwards, LARS at 0.3 for each 256 images, weight decay 1e-6, 10 epochs of
    warm-up, temperature 0.1, batches of 4,096, 100 or 1,000 epochs. Linear probe on ImageNet 69.3 % top-1 after 1,000
    epochs; lightly has 63.2 %, and kNN 44.8 %, after 100 epochs with batches of 256.
"""

from vlp.config import Data, Experiment, Saving, Training
from vlp.data.augment import ColourDistortion, RandomResizedCrop, simclr
from vlp.data.reading.shards import Source
from vlp.encoders.image import TimmImage
from vlp.models.single import Single
from vlp.objectives.simclr import SimClr
from vlp.optim.optimizers import AdamW, Lars
from vlp.optim.schedule import Schedule
from vlp.tasks.probe import Knn


def config() -> Experiment:
    """ResNet-50 on ImageNet, as published.

    Data: ImageNet's images as your own shards. Starts from random weights.
    Differs: BatchNorm normalises the rows of one process instead of those of all. bfloat16; the paper does not state
        its precision.
    Cost: 8 GPUs of 80 GB or more: 512 images, 1,024 views, a GPU. Not run here.
    Command: accelerate launch --config_file launch/ddp_gpu8.yaml -m vlp.train configs/simclr/pretrain.py data.train=shards/train
    """
    return Experiment(
        name="simclr-resnet50",
        model=Single(
            image=TimmImage("resnet50", image_size=224), head="mlp", head_norm=True, hidden_size=2048, embed_size=128
        ),
        objectives={"simclr": SimClr(temperature=0.1)},
        data=Data(
            train=(Source("shards/train"),), batch_size=4096, augment=simclr(1.0), views=(simclr(1.0),), workers=12
        ),
        optim=Lars(lr=4.8, weight_decay=1e-6),
        schedule=Schedule(warmup_steps=3130, kind="cosine"),
        train=Training(epochs=100, precision="bf16", clip_norm=None),
        save=Saving(every=1000, keep=2),
    )


def imagenette() -> Experiment:
    """RegNetX-200MF on 2,000 images, in six minutes.

    Data: imagenette, 200 images of 160 pixels for each of ten classes, labels unused; 100 more of each are classified.
        Starts from random weights.
    Differs: 64 pixels and RegNetX-200MF instead of 224 and ResNet-50; batch 128 and temperature 0.2 instead of 4,096
        and 0.1; AdamW, because LARS is for large batches, and gradients clipped at norm 1; half the colour distortion,
        and no blur, which does little at 64 pixels.
    Measured: kNN 37.3 % after 400 steps, 5.7 minutes; the goal was 10 points above the untrained tower (vlp eval
        runs/simclr-imagenette knn data=../shared/data/imagenette). Untrained 22.7 % (vlp train
        configs/simclr/pretrain.py:imagenette name=untrained optim.lr=0 train.steps=50 schedule.warmup_steps=0).
    Cost: 2 CPU cores, 6 minutes.
    Command: vlp data pack --split train ../shared/data/imagenette/labels.jsonl data/imagenette/train
        vlp train configs/simclr/pretrain.py:imagenette
        vlp eval runs/simclr-imagenette knn data=../shared/data/imagenette
    """
    view = RandomResizedCrop(scale=(0.2, 1.0), then=(ColourDistortion(0.5),))
    return Experiment(
        name="simclr-imagenette",
        model=Single(image=TimmImage("regnetx_002", image_size=64), head="mlp", head_norm=True, embed_size=128),
        objectives={"simclr": SimClr(temperature=0.2)},
        data=Data(train=(Source("data/imagenette/train"),), batch_size=128, augment=view, views=(view,), workers=1),
        optim=AdamW(lr=2e-3, betas=(0.9, 0.99), weight_decay=0.05),
        schedule=Schedule(warmup_steps=50, kind="cosine"),
        train=Training(steps=400),
        evaluate={"knn": Knn(data="../shared/data/imagenette")},
        save=Saving(every=200, keep=1),
    )
