"""A dual encoder fine-tuned for retrieval on Flickr30k as ALIGN's paper has it.

Paper:    Jia et al. 2021, arXiv:2102.05918, section 5.1 (R@1 of the 1k test split, text / image: zero-shot 88.6 / 75.7,
          fine-tuned 95.3 / 84.9, with EfficientNet-L2 and BERT-large; its B7 with BERT-base is the model of this file).
Data:     Flickr30k, Karpathy's split: 29,000 photos to train, 5 captions each; your own shards, see
          configs/albef/retrieval_flickr30k.py.
Start:    a run of configs/align/b7_bert_base.py, towers, projection and temperature.
Commands: accelerate launch --config_file launch/gpu8.yaml -m vlp.train configs/align/retrieval_flickr30k.py
          vlp eval runs/align_b7_bert_base retrieval data=shards/flickr30k-test                  zero-shot
          vlp eval runs/align-retrieval-flickr30k retrieval data=shards/flickr30k-test         fine-tuned
Hardware: the paper: TPUs, 2,048 pairs a step. Not run here.
Differs:  the paper does not say its learning-rate schedule for this; here it falls linearly. A photo's captions are positives
          of each other, and one of them is drawn an epoch.
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
        name="align-retrieval-flickr30k",
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
            weights="runs/align_b7_bert_base",
        ),
        objectives={"itc": ImageTextContrast(label_smoothing=0.1, reduction="sum", tile_rows=1024)},
        data=Data(
            train=(Source("shards/flickr30k-train"),),
            val="shards/flickr30k-val",
            tokenizer="tokenizer",
            batch_size=2_048,
            max_length=64,
            augment=ResizeCrop(fraction=289 / 346),
            resize=Resize(mode="squash", fraction=289 / 346),
            workers=8,
        ),
        optim=Lamb(lr=1e-5, weight_decay=1e-5),
        schedule=Schedule(warmup_steps=0, kind="linear"),
        train=Training(steps=3_000, precision="bf16", activation_checkpointing="full"),
        evaluate={"retrieval": Retrieval()},
        evaluate_every=500,
        save=Saving(every=500, keep=2, best="retrieval/mean_recall"),
    )
