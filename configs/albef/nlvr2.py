"""ALBEF on NLVR2 (is a sentence true of two images?), and the text assignment that prepares it for pairs of images.

Paper: Li et al. 2021, arXiv:2107.07651, section 4: test-P 83.14 % from 14 M images (LAVIS's run: 82.47 % dev, 82.91 %
    test-P), 80.24 % dev and 80.50 % test-P from 4 M.
Data: NLVR2 (Suhr et al. 2019): 86,373 sentences with two images each to train, 6,982 dev, 6,967 test-P. Text assignment
    trains on the 4 M images of configs/albef/pretrain.py, with the same weights of the sources, and starts from
    weights/ALBEF.pth: each fusion layer becomes two. `config` starts from runs/albef-nlvr2-assignment, or from ALBEF's
    own file of that stage; the classifier is new.
As published: each fusion layer exists twice, once for each image; both share keys and values. Distillation ramps up
    over the first epoch. In text assignment the other image is sampled by image-image similarity at temperature 0.07
    from the same process, and the projections that define the similarity are not trained.
Differs: the momentum encoder starts from the loaded weights; the published code copied it before loading them. An image
    whose sentence says left or right is not mirrored. The warm-up of 100 steps is linear from 0, and the learning rate
    falls with every step, not once an epoch. A sentence of NLVR2 is truncated at 64 tokens, not at 30 words. In text
    assignment rows with the same image are not negatives of each other. Class token, position and token-type embeddings
    have no weight decay. AutoContrast and Sharpness of RandAugment do not overflow in uint8.
Cost: the paper used 8 A100: 1 epoch of 512 texts a step for text assignment, 10 epochs of 128 sentences a step for
    NLVR2. Not run here.
Command: accelerate launch --config_file launch/ddp_gpu8.yaml -m vlp.train configs/albef/nlvr2.py:assignment
    vlp data annotations nlvr2 nlvr2/data/train.json annotations/nlvr2_train.jsonl     # also dev
    accelerate launch --config_file launch/ddp_gpu8.yaml -m vlp.train configs/albef/nlvr2.py
    vlp eval runs/albef-nlvr2 classification data=annotations/nlvr2_dev.jsonl
"""

from dataclasses import replace

from vlp.config import Data, Experiment, Saving, Training
from vlp.data.augment import RandAugment, RandomResizedCrop, Resize
from vlp.data.reading.annotated import Annotated
from vlp.data.reading.shards import Source
from vlp.models.albef import BASE
from vlp.objectives.assignment import TextAssignment
from vlp.objectives.classification import Classification
from vlp.optim.ema import MomentumConfig
from vlp.optim.optimizers import AdamW
from vlp.optim.schedule import Schedule
from vlp.tasks.pair_classification import PairClassification


def config() -> Experiment:
    """NLVR2, after text assignment."""
    return Experiment(
        name="albef-nlvr2",
        model=replace(
            BASE,
            fusion=replace(BASE.fusion, images=2),
            itc=False,
            itm=False,
            mlm=False,
            classes=2,
            weights="runs/albef-nlvr2-assignment",
        ),
        objectives={"nlvr2": Classification(distill=0.4, ramp_epochs=1.0)},
        momentum=MomentumConfig(decay=0.995, mode="train"),
        data=Data(
            train=(
                Annotated(
                    "annotations/nlvr2_train.jsonl",
                    images="nlvr2",
                    image=("image0", "image1"),
                    label="label",
                    classes=("False", "True"),
                ),
            ),
            tokenizer="weights/bert-base-uncased",
            add_sep=False,
            clean_captions=True,
            batch_size=128,
            max_length=64,
            augment=RandomResizedCrop(scale=(0.5, 1.0), flip=0.5, then=(RandAugment(n=2, magnitude=7),)),
            resize=Resize(mode="squash"),
            workers=8,
        ),
        optim=AdamW(lr=2e-5, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.02),
        schedule=Schedule(warmup_steps=100, kind="cosine", final_fraction=0.05),
        train=Training(epochs=10, precision="fp32", clip_norm=None, processes=8),
        evaluate={"dev": PairClassification(data="annotations/nlvr2_dev.jsonl", images="nlvr2", baseline=False)},
        evaluate_every=675,
        save=Saving(every=675, keep=2, best="dev/accuracy"),
    )


def assignment() -> Experiment:
    """Text assignment: to which of two images does a text belong, or to neither?"""
    nlvr2 = config()
    model = nlvr2.model
    return replace(
        nlvr2,
        name="albef-nlvr2-assignment",
        model=replace(
            model,
            image=replace(model.image, image_size=256),
            itc=True,
            classes=None,
            assignment=True,
            weights="weights/ALBEF.pth",
        ),
        objectives={"assignment": TextAssignment()},
        momentum=None,
        data=replace(
            nlvr2.data,
            train=(
                Source("shards/coco", weight=567_000),
                Source("shards/visual-genome", weight=769_000),
                Source("shards/cc3m", weight=2_950_000),
                Source("shards/sbu", weight=860_000),
            ),
            batch_size=512,
            max_length=25,
            augment=replace(nlvr2.data.augment, scale=(0.2, 1.0)),
            resize=Resize(),
        ),
        schedule=replace(nlvr2.schedule, final_fraction=0.5),
        train=replace(nlvr2.train, epochs=1, frozen=("image_projection", "text_projection", "temperature")),
        evaluate={},
        evaluate_every=0,
        save=Saving(every=1000, keep=2),
    )
