"""Instance discrimination: every image is a class, whose weight is the image's own embedding of an epoch ago.

Paper: Wu et al. 2018, arXiv:1805.01978: a bank of all images, linear head to 128, temperature 0.07, one view of an
    image a step, NCE with 4,096 noise rows, proximal term, SGD at 0.03, a tenth of it after 120 and again after 160 of
    200 epochs, batch 256. The published repository reports kNN (k = 200) 46.8 % top-1 on ImageNet with ResNet-50; its
    code has no proximal term, so that this number belongs to objectives.instance.proximal=0.
"""

from vlp.config import Data, Experiment, Saving, Training
from vlp.data.augment import ColourDistortion, RandomResizedCrop
from vlp.data.reading.shards import Source
from vlp.encoders.image import TimmImage
from vlp.models.single import Single
from vlp.objectives.instance import InstanceDiscrimination
from vlp.optim.optimizers import AdamW, Sgd
from vlp.optim.schedule import Schedule
from vlp.tasks.probe import Knn


def config() -> Experiment:
    """ResNet-50 on ImageNet, as published.

    Data: ImageNet's images as your own shards. Starts from random weights.
    As published: rows of the bank move by half, as in the published code.
    Differs: biases and BatchNorm's scales have no weight decay. Hues turn by 0.1 instead of 0.4.
    Cost: 8 GPUs of 16 GB, of each 0.7 GB for the bank of 1.28 M rows. Not run here.
    Command: accelerate launch --config_file launch/ddp_gpu8.yaml -m vlp.train configs/instance/pretrain.py data.train=shards/train
    """
    view = RandomResizedCrop(scale=(0.2, 1.0), then=(ColourDistortion(strength=0.5, probability=1.0),))
    return Experiment(
        name="instance-resnet50",
        model=Single(image=TimmImage("resnet50", image_size=224), head="linear", embed_size=128),
        objectives={"instance": InstanceDiscrimination()},
        data=Data(train=(Source("shards/train"),), batch_size=256, augment=view, workers=8),
        optim=Sgd(lr=0.03, momentum=0.9, weight_decay=1e-4),
        schedule=Schedule(kind="constant", drops=(0.6, 0.8)),
        train=Training(epochs=200, clip_norm=None),
        save=Saving(every=5000, keep=2),
    )


def imagenette() -> Experiment:
    """RegNetX-200MF on 2,000 images, in nine minutes.

    Data: imagenette, 200 images of 160 pixels for each of ten classes, labels unused; 100 more of each are classified.
        Starts from random weights.
    Differs: 64 pixels and RegNetX-200MF instead of 224 and ResNet-50; the full softmax instead of NCE
        (objectives.instance.form=nce), because 2,000 rows are few; temperature 0.1; AdamW for a hundred epochs,
        gradients clipped at norm 1; no proximal term (objectives.instance.proximal=30).
    Measured: kNN 41.8 % after 1,200 steps, untrained 22.7 %; the goal was 10 points above the untrained tower (vlp eval
        runs/instance-imagenette knn data=../shared/data/imagenette).
    Cost: 2 CPU cores, 9 minutes.
    Command: vlp data pack --split train ../shared/data/imagenette/labels.jsonl data/imagenette/train
        vlp train configs/instance/pretrain.py:imagenette
        vlp eval runs/instance-imagenette knn data=../shared/data/imagenette
    """
    view = RandomResizedCrop(scale=(0.2, 1.0), then=(ColourDistortion(0.5),))
    return Experiment(
        name="instance-imagenette",
        model=Single(image=TimmImage("regnetx_002", image_size=64), head="linear", embed_size=128),
        objectives={"instance": InstanceDiscrimination(form="softmax", temperature=0.1, proximal=0.0)},
        data=Data(train=(Source("data/imagenette/train"),), batch_size=128, augment=view, workers=1),
        optim=AdamW(lr=2e-3, betas=(0.9, 0.99), weight_decay=0.05),
        schedule=Schedule(warmup_steps=50, kind="cosine"),
        train=Training(steps=1200),
        evaluate={"knn": Knn(data="../shared/data/imagenette")},
        save=Saving(every=400, keep=1),
    )
