"""ALBEF's pre-training on 4 M images with what the published code gets wrong put right: see paper_4m.py.

Paper:    Li et al. 2021, arXiv:2107.07651, section 3.
Data:     COCO, Visual Genome, Conceptual Captions 3M, SBU: 4.0 M images, 5.1 M texts; your own shards of them.
Weights:  weights/: DeiT-base (the file of its authors) and a folder with bert-base-uncased; both are public.
Command:  accelerate launch --config_file launch/gpu8.yaml -m vlp.train configs/albef/recommended_4m.py
Hardware: 8 GPUs. Not run here.
Other than published: a row has the keys of all processes, and only true rows in a queue that fills up; the captions of one
          picture are positives of each other and never negatives; no special token is masked or put in a word's place, and the
          mean is over the masked tokens of all processes; pixels are normalised as the weights were trained; temperature, class
          token and positions have no weight decay; bfloat16, gradients clipped at norm 1.
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
from vlp.objectives.mlm import MaskedText
from vlp.optim.ema import MomentumConfig
from vlp.optim.optimizers import AdamW
from vlp.optim.schedule import Schedule
from vlp.tasks.retrieval import Retrieval

BERT = "weights/bert-base-uncased"
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
        name="albef-recommended-4m",
        model=Albef(
            image=TimmImage(
                "deit_base_patch16_224",
                weights="weights/deit_base_patch16_224-b5f2ef4d.pth",
                image_size=256,
            ),
            text=BertText(weights=BERT, config=SIZES, dropout=0.1),
            fusion=Fusion(layers=6, weights=BERT, first_layer=6, heads=12, hidden_size=3072, dropout=0.1, eps=1e-12),
            embed_size=256,
            temperature=0.07,
        ),
        objectives={
            "itc": MomentumContrast(queue_size=65_536, distill=0.4, ramp_epochs=1.0),
            "itm": ImageTextMatching(),
            "mlm": MaskedText(distill=0.4, ramp_epochs=1.0),
        },
        momentum=MomentumConfig(decay=0.995, mode="train"),
        data=Data(
            train=(
                Source("shards/coco"),
                Source("shards/visual-genome"),
                Source("shards/cc3m"),
                Source("shards/sbu"),
            ),
            val="shards/flickr30k-val",
            tokenizer=BERT,
            sep=False,
            clean=True,
            batch_size=512,
            max_length=30,
            augment=RandomResizedCrop(scale=(0.2, 1.0), flip=0.5, then=(RandAugment(n=2, magnitude=7),)),
            resize=Resize(mode="squash"),
            workers=8,
        ),
        optim=AdamW(lr=1e-4, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.02),
        schedule=Schedule(warmup_steps=2000, kind="cosine", final_fraction=0.1),
        train=Training(steps=299_000, precision="bf16", processes=8),
        evaluate={"retrieval": Retrieval()},
        evaluate_every=10_000,
        save=Saving(every=2000, keep=2, best="retrieval/mean_recall"),
    )
