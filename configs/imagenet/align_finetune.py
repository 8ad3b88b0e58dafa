"""The image tower of an ALIGN fine-tuned on ImageNet.

Paper:    Jia et al. 2021, arXiv:2102.05918, section 5.3: 88.64 % top-1 fine-tuned, 85.5 % with a linear classifier on frozen
          features, with EfficientNet-L2 and 1.8 B pairs. It fine-tunes at larger pictures than it pre-trains at.
Data:     ImageNet, 1,281,167 photos; your own shards: a .jsonl with image, label (0 to 999, in the order of the wnids), and caption,
          through vlp data pack. To judge: the folder imagenet/ with val/WNID/.
Start:    a run of configs/align/b7_bert_base.py.
Commands: accelerate launch --config_file launch/gpu8.yaml -m vlp.train configs/imagenet/align_finetune.py
          vlp eval runs/imagenet-align image-accuracy data=imagenet split=val
Hardware: 8 GPUs. Not run here.
Differs:  this is not the paper's optimizer, whose details are not all known here, but the recipe that fine-tunes such towers today:
          AdamW, a learning rate for each layer, mixup and CutMix, label smoothing, an average of the weights.
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
            mix=Mixup(mixup=0.8, cutmix=1.0),
            activation_checkpointing="full",
        ),
        evaluate={"image-accuracy": ImageAccuracy(data="imagenet")},
        evaluate_every=2_500,
        save=Saving(every=1_000, keep=2, best="image-accuracy/top1"),
    )
