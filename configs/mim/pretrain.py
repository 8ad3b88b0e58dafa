"""Masked image modelling from random weights: the first stage of VLMo, at BEiT's scale and on two CPU cores.

Paper: Bao et al. 2022, arXiv:2106.08254 (BEiT): ViT-B/16 with relative positions and layer scale 0.1 at 224 pixels, 40
    % of the patches masked in blocks of 16 or more and replaced by a mask token, codes of DALL-E's tokenizer as
    targets; batch 2,048, 800 epochs of ImageNet-1k (500,000 steps), AdamW at 1.5e-3 with betas 0.9 and 0.999, weight
    decay 0.05, 10 epochs of warm-up, cosine, clipping at 3, stochastic depth of 0.1; random crops, flips and colour
    jitter. 83.2 % top-1 of ImageNet-1k after fine-tuning, 56.7 % by a linear probe on a middle layer (as recalled: look
    them up before citing). He et al. 2022, arXiv:2111.06377 (MAE): the targets are the pixels of the patches,
    normalised patch by patch.
"""

from vlp.config import Data, Experiment, Logging, Saving, Training
from vlp.data.augment import ColourDistortion, RandomResizedCrop
from vlp.data.reading.shards import Source
from vlp.encoders.dall_e import DallE
from vlp.encoders.image import TimmImage
from vlp.encoders.patch_targets import Pixels
from vlp.models.single import Single
from vlp.objectives.mim import MaskedImage
from vlp.optim.optimizers import AdamW
from vlp.optim.schedule import Schedule
from vlp.tasks.probe import Knn


def config() -> Experiment:
    """BEiT-base on ImageNet-1k, as published.

    Data: the 1.28 M images of ImageNet-1k as shards; captions are not read. Needs OpenAI's encoder.pkl, converted once
        (`vlp.encoders.dall_e`), or, in a copy of this file, mim=RandomCodes() or mim=Pixels().
    Differs: a table of relative positions in each layer, as in timm's model, where the paper shares one. The tokenizer
        reads the tower's image at half its size, where the paper resizes the original. bfloat16.
    Cost: 16 GPUs, about five days (the paper's own figure, 32 GB V100). Not run here.
    Command: accelerate launch --config_file launch/ddp_gpu8.yaml -m vlp.train configs/mim/pretrain.py
        vlp eval runs/mim-beit-base probe data=imagenet
    """
    return Experiment(
        name="mim-beit-base",
        model=Single(
            image=TimmImage("beit_base_patch16_224", drop_path=0.1), mim=DallE(weights="weights/dall_e_encoder.pt")
        ),
        objectives={"mim": MaskedImage()},
        data=Data(
            train=(Source("data/imagenet/train"),),
            batch_size=2048,
            augment=RandomResizedCrop(
                scale=(0.08, 1.0), flip=0.5, then=(ColourDistortion(0.5, probability=1.0, greyscale=0.0),)
            ),
            workers=8,
        ),
        optim=AdamW(lr=1.5e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.05),
        schedule=Schedule(warmup_steps=6250, kind="cosine", final_fraction=1e-5 / 1.5e-3),
        train=Training(steps=500_000, precision="bf16", clip_norm=3.0),
        save=Saving(every=5000, keep=2),
        log=Logging(geometry_every=0),
    )


def imagenette() -> Experiment:
    """ViT-Tiny on 2,000 images, in ten minutes.

    Data: the 2,000 training images of imagenette's ten classes, at 160 pixels.
    Differs: ViT-Tiny at 128 pixels, 8 x 8 patches, 16 epochs instead of 800; BEiT's encoder, which reads mask tokens,
        with MAE's targets, because BEiT's tokenizer is a download. The goals are a mean squared error below 0.85
        (predicting the mean of a patch gives 1) and better neighbours than those of the untrained tower. It was not run
        to its end.
    Cost: 2 CPU cores, 10 minutes.
    Command: vlp data pack --split train ../shared/data/imagenette/labels.jsonl data/imagenette/train
        vlp train configs/mim/pretrain.py:imagenette
        vlp eval runs/mim-imagenette knn data=../shared/data/imagenette
    """
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
