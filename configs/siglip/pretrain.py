"""SigLIP with a ViT-B/16 and a BERT-like text tower: every pair is classified independently.

Paper: Zhai et al. 2023, arXiv:2303.15343: logit scale from 10, bias from -10.
Data: your own shards.
As published: the logit scale is not bounded. Gradients clipped at norm 1 (the published code, big_vision).
Differs: BERT with mean pooling instead of a text tower of the ViT's own kind, AdamW instead of Adafactor, batches of
    4,096.
Cost: 8 GPUs of 40 GB or more. Not run here.
Command: vlp data tokenizer shards/train tokenizer --vocab-size 32000
    accelerate launch --config_file launch/ddp_gpu8.yaml -m vlp.train configs/siglip/pretrain.py data.train=shards/train data.val=shards/val
"""

from vlp.config import Data, Experiment, Saving, Training
from vlp.data.augment import RandomResizedCrop, Resize
from vlp.data.reading.shards import Source
from vlp.encoders.image import TimmImage
from vlp.encoders.text import BertText
from vlp.models.dual import Dual
from vlp.objectives.itc import SigmoidContrast
from vlp.optim.optimizers import AdamW
from vlp.optim.schedule import Schedule
from vlp.tasks.retrieval import Retrieval


def config() -> Experiment:
    """ViT-B/16 at 224 pixels."""
    return Experiment(
        name="siglip_vit_b16",
        model=Dual(
            image=TimmImage("vit_base_patch16_siglip_224"),
            text=BertText(
                config={
                    "model_type": "bert",
                    "vocab_size": 32_000,
                    "hidden_size": 768,
                    "num_hidden_layers": 12,
                    "num_attention_heads": 12,
                    "intermediate_size": 3072,
                    "max_position_embeddings": 64,
                },
                pool="mean",
                dropout=0.0,
            ),
            projection="both",
            embed_size=768,
            temperature=0.1,
            temperature_form="logit_scale",
            temperature_min=None,
            bias=-10.0,
        ),
        objectives={"itc": SigmoidContrast(tile_rows=1024)},
        data=Data(
            train=(Source("shards/train"),),
            val="shards/val",
            tokenizer="tokenizer",
            batch_size=4096,
            max_length=64,
            augment=RandomResizedCrop(scale=(0.9, 1.0), flip=0.0),
            resize=Resize(mode="squash"),
            workers=8,
        ),
        optim=AdamW(lr=1e-3, betas=(0.9, 0.95), weight_decay=1e-4),
        schedule=Schedule(warmup_steps=2000, kind="cosine"),
        train=Training(epochs=32, precision="bf16"),
        evaluate={"retrieval": Retrieval()},
        evaluate_every=5000,
        save=Saving(every=1000, keep=3, best="retrieval/mean_recall"),
    )
