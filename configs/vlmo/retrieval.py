"""VLMo-base fine-tuned for retrieval on COCO or Flickr30k: contrast only, 384 pixels, no fusion.

Paper: Bao et al. 2022, arXiv:2111.02358, section 4.2. R@1, image to text / text to image (the published code's README):
    COCO 74.8 / 57.2 (5k test split), Flickr30k 92.3 / 79.3 (1k test split).
Data: Karpathy's splits, five captions an image, packed into your own shards: COCO with 113,287 training images (train
    and restval), Flickr30k with 29,000. Starts from weights/vlmo_base_patch16_224.pt, the published pre-training;
    relative positions are resized from 224 to 384 pixels.
As published: the first head only. 3,072 pairs a step at 3e-5, linear decay: 3,000 steps with 300 of warm-up on COCO,
    1,500 with 150 on Flickr30k. Stochastic depth of 0.2 or 0.15, and the same number as dropout of the text embeddings.
    The scale of similarities is not bounded.
Differs: captions of the same image are positives of each other; the published code takes them for negatives. bfloat16,
    where the published code uses float16. Norms, layer scales, class token, positions, token types and the logit scale
    have no weight decay. An image whose caption mentions left or right is not mirrored. AutoContrast and Sharpness of
    RandAugment do not overflow in uint8. An epoch here is every image with one of its captions; the number of steps is
    as published.
Cost: a batch of 3,072 pairs over all processes. Not run here.
Command: vlp data pack dataset_coco.json shards/coco-train --image-root coco --split train     # also restval, val, test
    accelerate launch --config_file launch/ddp_gpu8.yaml -m vlp.train configs/vlmo/retrieval.py
    vlp eval runs/vlmo-retrieval-coco retrieval data=shards/coco-test
    vlp data pack dataset_flickr30k.json shards/flickr30k-train --image-root flickr30k --split train     # also val, test
    accelerate launch --config_file launch/ddp_gpu8.yaml -m vlp.train configs/vlmo/retrieval.py:flickr30k
    vlp eval runs/vlmo-retrieval-flickr30k retrieval data=shards/flickr30k-test
"""

from dataclasses import replace

from vlp.config import Data, Experiment, Saving, Training
from vlp.data.augment import RandAugment, RandomResizedCrop, Resize
from vlp.data.reading.shards import Source
from vlp.encoders.mome import BASE
from vlp.models.vlmo import Vlmo
from vlp.objectives.itc import ImageTextContrast
from vlp.optim.optimizers import AdamW
from vlp.optim.schedule import Schedule
from vlp.tasks.retrieval import Retrieval


def config() -> Experiment:
    """COCO, as published."""
    return Experiment(
        name="vlmo-retrieval-coco",
        model=Vlmo(
            encoder=replace(BASE, experts=("image", "text"), image_size=384, drop_path=0.2, text_dropout=0.2),
            itc_vl=False,
            itm=False,
            mlm=False,
            temperature_min=None,
            weights="weights/vlmo_base_patch16_224.pt",
        ),
        objectives={"itc": ImageTextContrast()},
        data=Data(
            train=(Source("shards/coco-train"), Source("shards/coco-restval")),
            val="shards/coco-val",
            tokenizer="weights/bert-base-uncased",
            batch_size=3072,
            max_length=40,
            augment=RandomResizedCrop(scale=(0.5, 1.0), flip=0.5, then=(RandAugment(n=2, magnitude=7),)),
            resize=Resize(mode="squash"),
            workers=8,
        ),
        optim=AdamW(lr=3e-5, betas=(0.9, 0.98), eps=1e-8, weight_decay=0.01),
        schedule=Schedule(warmup_steps=300, kind="linear"),
        train=Training(steps=3000, precision="bf16", clip_norm=None, activation_checkpointing="cheap"),
        evaluate={"retrieval": Retrieval()},
        evaluate_every=500,
        save=Saving(every=500, keep=2, best="retrieval/mean_recall"),
    )


def flickr30k() -> Experiment:
    """Flickr30k, as published."""
    coco = config()
    encoder = replace(coco.model.encoder, drop_path=0.15, text_dropout=0.15)
    return replace(
        coco,
        name="vlmo-retrieval-flickr30k",
        model=replace(coco.model, encoder=encoder),
        data=replace(coco.data, train=(Source("shards/flickr30k-train"),), val="shards/flickr30k-val"),
        schedule=replace(coco.schedule, warmup_steps=150),
        train=replace(coco.train, steps=1500),
        evaluate_every=250,
        save=replace(coco.save, every=250),
    )
