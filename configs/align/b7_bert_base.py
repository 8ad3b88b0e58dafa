"""ALIGN as published, with the encoders of its ablations: EfficientNet-B7 and BERT-base.

Paper:    Jia et al. 2021, arXiv:2102.05918, section 5 and table 9 (B7 + BERT-base: ImageNet kNN 69.3, COCO zero-shot R@1
          55.4 / 41.7, on 1.8 B pairs). The published EfficientNet-L2 + BERT-large is a matter of two names.
Data:     your own shards; the paper's are not public.
Command:  accelerate launch --config_file launch/gpu8.yaml -m vlp.train configs/align/b7_bert_base.py data.train=... data.val=...
Hardware: the paper: 1,024 TPU cores. Not run here.
As in the paper: squashed to 346, random crop 289, flip; 100k word pieces (train them with vlp data tokenizer
          --vocab-size 100000), 64 tokens; label smoothing 0.1, sum of both directions, learned temperature from 1.0; LAMB with
          weight decay 1e-5, warm-up 10k steps to 1e-3, linear decay to 1.2 M steps; batch 16,384.
"""

from vlp.config import Data, Experiment, Saving, Training
from vlp.data.augment import Resize, ResizeCrop
from vlp.data.shards import Source
from vlp.encoders.image import TimmImage
from vlp.encoders.text import BertText
from vlp.models.dual import Dual
from vlp.objectives.itc import ImageTextContrast
from vlp.optim.optimizers import Lamb
from vlp.optim.schedule import Schedule
from vlp.tasks.retrieval import Retrieval


def config() -> Experiment:
    return Experiment(
        name="align_b7_bert_base",
        model=Dual(
            image=TimmImage("tf_efficientnet_b7", image_size=289),
            text=BertText(
                config={
                    "model_type": "bert",
                    "vocab_size": 100_000,
                    "hidden_size": 768,
                    "num_hidden_layers": 12,
                    "num_attention_heads": 12,
                    "intermediate_size": 3072,
                }
            ),
            temperature=1.0,
            temperature_min=None,
        ),
        objectives={"itc": ImageTextContrast(label_smoothing=0.1, reduction="sum", tile_rows=1024)},
        data=Data(
            train=(Source("shards/train"),),
            val="shards/val",
            tokenizer="tokenizer",
            batch_size=16_384,
            max_length=64,
            augment=ResizeCrop(fraction=289 / 346),
            resize=Resize(mode="squash", fraction=289 / 346),
            workers=8,
        ),
        optim=Lamb(lr=1e-3, weight_decay=1e-5),
        schedule=Schedule(warmup_steps=10_000, kind="linear"),
        train=Training(steps=1_200_000, precision="bf16", activation_checkpointing="full"),
        evaluate={"retrieval": Retrieval()},
        evaluate_every=10_000,
        save=Saving(every=1000, keep=3, best="retrieval/mean_recall"),
    )
