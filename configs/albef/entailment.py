"""Visual entailment on SNLI-VE, fine-tuned from ALBEF's published weights: does the image show that the sentence is
true?

Paper: Li et al. 2021, arXiv:2107.07651, section 4: test accuracy 80.91 % from 14 M images, 80.30 % from 4 M. LAVIS
    reports 80.60 % (val) and 81.04 % (test) from 14 M.
Data: SNLI-VE (Xie et al. 2019) on Flickr30k's images: 529,527 hypotheses to train, 17,858 val, 17,901 test. Starts from
    weights/ALBEF.pth, the published pre-training; the classifier is new.
As published: distillation from the first step on, without a ramp. A text has no [SEP]. Mean and standard deviation are
    CLIP's.
Differs: an image whose sentence says left or right is not mirrored. The warm-up of 100 steps is linear from 0, and the
    learning rate falls with every step, not once an epoch. A text is truncated at 64 tokens, not at 30 words. Class
    token, position and token-type embeddings have no weight decay. AutoContrast and Sharpness of RandAugment do not
    overflow in uint8.
Cost: the paper used 8 A100, 256 hypotheses a step, 5 epochs. Not run here.
Command: vlp data annotations snli-ve snli_ve_train.jsonl annotations/snli_ve_train.jsonl     # also dev
    accelerate launch --config_file launch/ddp_gpu8.yaml -m vlp.train configs/albef/entailment.py
    vlp eval runs/albef-snli-ve classification data=annotations/snli_ve_dev.jsonl
"""

from dataclasses import replace

from vlp.config import Data, Experiment, Saving, Training
from vlp.data.augment import RandAugment, RandomResizedCrop, Resize
from vlp.data.reading.annotated import Annotated
from vlp.models.albef import BASE
from vlp.objectives.classification import Classification
from vlp.optim.ema import MomentumConfig
from vlp.optim.optimizers import AdamW
from vlp.optim.schedule import Schedule
from vlp.tasks.pair_classification import PairClassification


def config() -> Experiment:
    """SNLI-VE, as published."""
    return Experiment(
        name="albef-snli-ve",
        model=replace(
            BASE,
            itc=False,
            itm=False,
            mlm=False,
            classes=3,
            weights="weights/ALBEF.pth",
        ),
        objectives={"entailment": Classification(distill=0.4)},
        momentum=MomentumConfig(decay=0.995, mode="train"),
        data=Data(
            train=(
                Annotated(
                    "annotations/snli_ve_train.jsonl",
                    images="flickr30k-images",
                    label="label",
                    classes=("contradiction", "neutral", "entailment"),
                ),
            ),
            tokenizer="weights/bert-base-uncased",
            add_sep=False,
            clean_captions=True,
            batch_size=256,
            max_length=64,
            augment=RandomResizedCrop(scale=(0.5, 1.0), flip=0.5, then=(RandAugment(n=2, magnitude=7),)),
            resize=Resize(mode="squash"),
            workers=8,
        ),
        optim=AdamW(lr=2e-5, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.02),
        schedule=Schedule(warmup_steps=100, kind="cosine", final_fraction=0.05),
        train=Training(epochs=5, precision="fp32", clip_norm=None, processes=8),
        evaluate={
            "dev": PairClassification(data="annotations/snli_ve_dev.jsonl", images="flickr30k-images", baseline=False)
        },
        evaluate_every=2000,
        save=Saving(every=1000, keep=2, best="dev/accuracy"),
    )
