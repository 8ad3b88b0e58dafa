"""CLIP ViT-B/32 with open_clip's towers, tokenizer and preprocessing.

Paper: Radford et al. 2021, arXiv:2103.00020: bias-free projections, learned logit scale from 1/0.07, at most 100. On
    DataComp-1B, open_clip's ViT-B/32 at 256 pixels reaches 72.8 % zero-shot on ImageNet (open_clip's results table).
Data: your own shards. For fine-tuning set model.towers.weights to a tag of a hub (laion2b_s34b_b79k) or a local file.
As published: 32,768 pairs a step, 32 epochs, AdamW at 5e-4 with betas 0.9 and 0.98, eps 1e-6 and weight decay 0.2, 2,000
    steps of warm-up, cosine decay to 0, no gradient clipping.
Differs: bfloat16; the paper uses float16. Crops are open_clip's, of 0.9 or more of the image; the paper's are random
    squares of the resized image. Class token and position embeddings have no weight decay.
Cost: 4,096 pairs a GPU on 8 GPUs; with less memory set data.batch_size. Not run here.
Command: accelerate launch --config_file launch/ddp_gpu8.yaml -m vlp.train configs/clip/pretrain.py data.train=shards/train data.val=shards/val
"""

from vlp.config import Data, Experiment, Saving, Training
from vlp.data.augment import RandomResizedCrop, Resize
from vlp.data.reading.shards import Source
from vlp.encoders.open_clip import OpenClip
from vlp.models.dual import Dual
from vlp.objectives.itc import ImageTextContrast
from vlp.optim.optimizers import AdamW
from vlp.optim.schedule import Schedule
from vlp.tasks.retrieval import Retrieval


def config() -> Experiment:
    """ViT-B/32, as published."""
    return Experiment(
        name="clip_vit_b32",
        model=Dual(towers=OpenClip("ViT-B-32"), projection="none", temperature=0.07, temperature_form="logit_scale"),
        objectives={"itc": ImageTextContrast(tile_rows=1024)},
        data=Data(
            train=(Source("shards/train"),),
            val="shards/val",
            tokenizer="open_clip:ViT-B-32",
            batch_size=32_768,
            max_length=77,
            augment=RandomResizedCrop(scale=(0.9, 1.0), flip=0.0),
            resize=Resize(mode="center"),
            workers=8,
        ),
        optim=AdamW(lr=5e-4, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.2),
        schedule=Schedule(warmup_steps=2000, kind="cosine"),
        train=Training(epochs=32, precision="bf16", clip_norm=None),
        evaluate={"retrieval": Retrieval()},
        evaluate_every=5000,
        save=Saving(every=1000, keep=3, best="retrieval/mean_recall"),
    )
