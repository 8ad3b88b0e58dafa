"""ALBEF fine-tuned for retrieval on COCO or Flickr30k: contrast with all captions of an image as positives, and
matching.

Paper: Li et al. 2021, arXiv:2107.07651, section 4.1. R@1, image to text / text to image, from 14 M images: COCO 77.6 /
    60.7 (5k test split), Flickr30k 95.9 / 85.6 (1k test split).
Data: Karpathy's splits, five captions an image, packed into your own shards: COCO with 113,287 training images (train
    and restval), Flickr30k with 29,000. Starts from weights/ALBEF.pth, the published pre-training; positions are
    resized from 256 to 384 pixels.
As published: the temperature is not bounded. The momentum encoder runs with dropout. The keys of a row are those of its
    own process and the queue. Negatives for matching show another image than the row. Captions have no [SEP] and no
    punctuation. float32, no gradient clipping. The published constant of 1e-4 inside a softmax has no effect and is
    omitted.
Differs: the queue starts empty, the published one with the last keys of the pre-training. Captions are truncated at 30
    tokens, the published ones only in evaluation. The learning rate falls with every step, not once an epoch.
    Temperature, class token, position and token-type embeddings have no weight decay. An image whose caption mentions
    left or right is not mirrored. AutoContrast and Sharpness of RandAugment do not overflow in uint8. An epoch here is
    every image with one of its captions, a fifth of a published epoch: hence the ramp.
Cost: the paper used 8 A100 and 256 pairs a step, for 5 epochs of 566,747 pairs (COCO) or 10 of 145,000 (Flickr30k). Not
    run here.
Command: vlp data pack dataset_coco.json shards/coco-train --image-root coco --split train     # also restval, val, test
    accelerate launch --config_file launch/ddp_gpu8.yaml -m vlp.train configs/albef/retrieval.py
    vlp eval runs/albef-retrieval-coco rerank data=shards/coco-test k=256
    vlp eval runs/albef-retrieval-coco rerank data=shards/flickr30k-test k=128     # the published zero-shot numbers
    vlp data pack dataset_flickr30k.json shards/flickr30k-train --image-root flickr30k --split train     # also val, test
    accelerate launch --config_file launch/ddp_gpu8.yaml -m vlp.train configs/albef/retrieval.py:flickr30k
    vlp eval runs/albef-retrieval-flickr30k rerank data=shards/flickr30k-test k=128
"""

from dataclasses import replace

from vlp.config import Data, Experiment, Saving, Training
from vlp.data.augment import RandAugment, RandomResizedCrop, Resize
from vlp.data.reading.shards import Source
from vlp.models.albef import BASE
from vlp.objectives.itc import MomentumContrast
from vlp.objectives.itm import ImageTextMatching
from vlp.optim.ema import MomentumConfig
from vlp.optim.optimizers import AdamW
from vlp.optim.schedule import Schedule
from vlp.tasks.rerank import Rerank


def config() -> Experiment:
    """COCO, as published."""
    return Experiment(
        name="albef-retrieval-coco",
        model=replace(
            BASE,
            mlm=False,
            temperature_min=None,
            temperature_max=None,
            weights="weights/ALBEF.pth",
        ),
        objectives={
            "itc": MomentumContrast(
                queue_size=65_536, keys="local", duplicates="positive", distill=0.4, ramp_epochs=5.0
            ),
            "itm": ImageTextMatching(keys="momentum", candidates="local", duplicates="mask"),
        },
        momentum=MomentumConfig(decay=0.995, mode="train"),
        data=Data(
            train=(Source("shards/coco-train"), Source("shards/coco-restval")),
            val="shards/coco-val",
            tokenizer="weights/bert-base-uncased",
            add_sep=False,
            clean_captions=True,
            batch_size=256,
            max_length=30,
            augment=RandomResizedCrop(scale=(0.5, 1.0), flip=0.5, then=(RandAugment(n=2, magnitude=7),)),
            resize=Resize(mode="squash"),
            workers=8,
        ),
        optim=AdamW(lr=1e-5, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.02),
        schedule=Schedule(warmup_steps=0, kind="cosine", final_fraction=0.1),
        train=Training(steps=11_070, precision="fp32", clip_norm=None, processes=8),
        evaluate={"rerank": Rerank(k=256)},
        evaluate_every=2_214,
        save=Saving(every=1_107, keep=2, best="rerank/mean_recall"),
    )


def flickr30k() -> Experiment:
    """Flickr30k, as published."""
    coco = config()
    return replace(
        coco,
        name="albef-retrieval-flickr30k",
        data=replace(coco.data, train=(Source("shards/flickr30k-train"),), val="shards/flickr30k-val"),
        train=replace(coco.train, steps=5_664),
        evaluate={"rerank": Rerank(k=128)},
        evaluate_every=566,
        save=replace(coco.save, every=566),
    )
