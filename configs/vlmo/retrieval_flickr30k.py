"""VLMo-base fine-tuned for retrieval on Flickr30k as published: contrast alone, 384 px, no fusion.

Paper:    Bao et al. 2022, arXiv:2111.02358, section 4.2 (R@1 of the 1k test split, text / image: 92.3 / 79.3 in the published
          code's README).
Data:     Flickr30k, Karpathy's split: 29,000 photos to train, 5 captions each; packed into your own shards:
          vlp data pack dataset_flickr30k.json shards/flickr30k-train --image-root flickr30k --split train, and val, test.
Start:    weights/vlmo_base_patch16_224.pt, the published pre-training; relative positions go from 224 to 384 px.
Commands: accelerate launch --config_file launch/gpu8.yaml -m vlp.train configs/vlmo/retrieval_flickr30k.py
          vlp eval runs/vlmo-retrieval-flickr30k retrieval data=shards/flickr30k-test
Hardware: a batch of 3,072 pairs over all processes. Not run here.
As published: the first head alone; 1,500 steps of 3,072 pairs at 3e-5 with 150 of warm-up and linear decay; dropped paths 0.15, and
          the same number as dropout of the embeddings of texts.
Differs:  captions of the same picture are positives of each other, where the published code takes them for negatives; an epoch here
          is every photo with one of its captions, and steps are what counts.
"""

from dataclasses import replace

from vlp.config import Data, Experiment, Saving, Training
from vlp.data.augment import RandAugment, RandomResizedCrop, Resize
from vlp.data.shards import Source
from vlp.encoders.mome import BASE
from vlp.models.vlmo import Vlmo
from vlp.objectives.itc import ImageTextContrast
from vlp.optim.optimizers import AdamW
from vlp.optim.schedule import Schedule
from vlp.tasks.retrieval import Retrieval


def config() -> Experiment:
    return Experiment(
        name="vlmo-retrieval-flickr30k",
        model=Vlmo(
            encoder=replace(BASE, experts=("image", "text"), image_size=384, drop_path=0.15, text_dropout=0.15),
            itc_vl=False,
            itm=False,
            mlm=False,
            weights="weights/vlmo_base_patch16_224.pt",
        ),
        objectives={"itc": ImageTextContrast()},
        data=Data(
            train=(Source("shards/flickr30k-train"),),
            val="shards/flickr30k-val",
            tokenizer="weights/bert-base-uncased",
            batch_size=3072,
            max_length=40,
            augment=RandomResizedCrop(scale=(0.5, 1.0), flip=0.5, then=(RandAugment(n=2, magnitude=7),)),
            resize=Resize(mode="squash"),
            workers=8,
        ),
        optim=AdamW(lr=3e-5, betas=(0.9, 0.98), eps=1e-8, weight_decay=0.01),
        schedule=Schedule(warmup_steps=150, kind="linear"),
        train=Training(steps=1500, precision="bf16", clip_norm=None, activation_checkpointing="cheap"),
        evaluate={"retrieval": Retrieval()},
        evaluate_every=250,
        save=Saving(every=250, keep=2, best="retrieval/mean_recall"),
    )
