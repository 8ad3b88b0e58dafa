"""ALIGN fine-tuned for retrieval on COCO or Flickr30k.

Paper: Jia et al. 2021, arXiv:2102.05918, section 5.1. R@1, image to text / text to image, with EfficientNet-L2 and
    BERT-large: COCO zero-shot 58.6 / 45.6, fine-tuned 77.0 / 59.9 (5k test split); Flickr30k zero-shot 88.6 / 75.7,
    fine-tuned 95.3 / 84.9 (1k test split). B7 with BERT-base, the model of this file, has 55.4 / 41.7 zero-shot on
    COCO.
Data: Karpathy's splits, five captions an image, your own shards as in configs/albef/retrieval.py: COCO with 113,287
    training images, Flickr30k with 29,000. Starts from a run of configs/align/pretrain.py: towers, projection and
    temperature.
As published: 2,048 pairs a step at 1e-5, 6,000 steps on COCO and 3,000 on Flickr30k.
Differs: the paper does not state the learning-rate schedule; here it falls linearly. bfloat16, and gradients clipped at
    norm 1; the paper states neither. The captions of an image are positives of each other, and one of them is sampled
    an epoch.
Cost: the paper used TPUs. Not run here.
Command: accelerate launch --config_file launch/ddp_gpu8.yaml -m vlp.train configs/align/retrieval.py
    vlp eval runs/align_b7_bert_base retrieval data=shards/coco-test     # zero-shot
    vlp eval runs/align-retrieval-coco retrieval data=shards/coco-test     # fine-tuned
    accelerate launch --config_file launch/ddp_gpu8.yaml -m vlp.train configs/align/retrieval.py:flickr30k
    vlp eval runs/align-retrieval-flickr30k retrieval data=shards/flickr30k-test
"""

from dataclasses import replace

from vlp.config import Data, Experiment, Saving, Training
from vlp.data.augment import Resize, ResizeCrop
from vlp.data.reading.shards import Source
from vlp.encoders.image import TimmImage
from vlp.encoders.text import BertText
from vlp.models.dual import Dual
from vlp.objectives.itc import ImageTextContrast
from vlp.optim.optimizers import Lamb
from vlp.optim.schedule import Schedule
from vlp.tasks.retrieval import Retrieval

BERT_BASE = {
    "model_type": "bert",
    "vocab_size": 100_000,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
}


def config() -> Experiment:
    """COCO, as published but for the size of the towers."""
    return Experiment(
        name="align-retrieval-coco",
        model=Dual(
            image=TimmImage("tf_efficientnet_b7", image_size=289),
            text=BertText(config=BERT_BASE),
            temperature=1.0,
            temperature_min=None,
            weights="runs/align_b7_bert_base",
        ),
        objectives={"itc": ImageTextContrast(label_smoothing=0.1, reduction="sum", tile_rows=1024)},
        data=Data(
            train=(Source("shards/coco-train"), Source("shards/coco-restval")),
            val="shards/coco-val",
            tokenizer="tokenizer",
            batch_size=2_048,
            max_length=64,
            augment=ResizeCrop(fraction=289 / 346),
            resize=Resize(mode="squash", fraction=289 / 346),
            workers=8,
        ),
        optim=Lamb(lr=1e-5, weight_decay=1e-5),
        schedule=Schedule(warmup_steps=0, kind="linear"),
        train=Training(steps=6_000, precision="bf16", activation_checkpointing="full"),
        evaluate={"retrieval": Retrieval()},
        evaluate_every=1_000,
        save=Saving(every=1_000, keep=2, best="retrieval/mean_recall"),
    )


def flickr30k() -> Experiment:
    """Flickr30k, as published but for the size of the towers."""
    coco = config()
    return replace(
        coco,
        name="align-retrieval-flickr30k",
        data=replace(coco.data, train=(Source("shards/flickr30k-train"),), val="shards/flickr30k-val"),
        train=replace(coco.train, steps=3_000),
        evaluate_every=500,
        save=replace(coco.save, every=500),
    )
