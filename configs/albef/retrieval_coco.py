"""ALBEF fine-tuned for retrieval on COCO as published: contrast with a picture's captions as positives, and matching.

Paper:    Li et al. 2021, arXiv:2107.07651, section 4.1 (R@1 of the 5k test split, text / image: 77.6 / 60.7 from 14 M images).
Data:     COCO, Karpathy's split: 113,287 photos to train (train and restval), 5 captions each; packed into your own shards:
          vlp data pack dataset_coco.json shards/coco-train --image-root coco --split train, and the same for restval, val, test.
Start:    weights/ALBEF.pth, the published pre-training; positions go from 256 to 384 px.
Commands: accelerate launch --config_file launch/gpu8.yaml -m vlp.train configs/albef/retrieval_coco.py
          vlp eval runs/albef-retrieval-coco rerank data=shards/coco-test k=256
Hardware: the paper: 8 A100, 256 pairs a step, 5 epochs of 566,747 pairs. Not run here.
As published: the temperature is not bounded; the momentum encoder runs with dropout; the keys of a row are those of its own
          process and the queue; negatives for matching are other photos than the row's; [SEP] is no part of a caption, and
          its punctuation is removed; float32, no clipping. Their 1e-4 inside a softmax changes nothing and is not here.
Differs:  the queue starts empty, theirs with the pre-training's last keys; texts are cut at 30 tokens, theirs are not; the
          learning rate falls with every step, not once an epoch; a mirrored photo's caption does not mention left or right;
          an epoch here is every photo with one of its captions, a fifth of theirs: hence the ramp.
"""

from vlp.config import Data, Experiment, Saving, Training
from vlp.data.augment import RandAugment, RandomResizedCrop, Resize
from vlp.data.shards import Source
from vlp.encoders.fusion import Fusion
from vlp.encoders.image import TimmImage
from vlp.encoders.text import BertText
from vlp.models.albef import Albef
from vlp.objectives.itc import MomentumContrast
from vlp.objectives.itm import ImageTextMatching
from vlp.optim.ema import MomentumConfig
from vlp.optim.optimizers import AdamW
from vlp.optim.schedule import Schedule
from vlp.tasks.rerank import Rerank

SIZES = {
    "model_type": "bert",
    "vocab_size": 30_522,
    "hidden_size": 768,
    "num_hidden_layers": 6,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
}


def config() -> Experiment:
    return Experiment(
        name="albef-retrieval-coco",
        model=Albef(
            image=TimmImage(
                "deit_base_patch16_224",
                image_size=384,
                mean=(0.48145466, 0.4578275, 0.40821073),
                std=(0.26862954, 0.26130258, 0.27577711),
            ),
            text=BertText(config=SIZES, dropout=0.1),
            fusion=Fusion(layers=6, heads=12, hidden_size=3072, dropout=0.1, eps=1e-12),
            mlm=False,
            embed_size=256,
            temperature_min=None,
            temperature_max=None,
            weights="weights/ALBEF.pth",
        ),
        objectives={
            "itc": MomentumContrast(
                queue_size=65_536, keys="process", same_picture="positive", distill=0.4, ramp_epochs=5.0
            ),
            "itm": ImageTextMatching(keys="momentum", candidates="process", same_picture="left_out"),
        },
        momentum=MomentumConfig(decay=0.995, mode="train"),
        data=Data(
            train=(Source("shards/coco-train"), Source("shards/coco-restval")),
            val="shards/coco-val",
            tokenizer="weights/bert-base-uncased",
            sep=False,
            clean=True,
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
