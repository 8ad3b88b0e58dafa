"""ALBEF's pre-training as published, on 4 M images: the step of the published code, flaws that change numbers included.

Paper:    Li et al. 2021, arXiv:2107.07651, section 3 (VQA 74.5 / 74.7, NLVR2 80.2 / 80.5 after fine-tuning).
          tests/test_parity_albef.py holds these objectives to the numbers of the published code.
Data:     COCO, Visual Genome, Conceptual Captions 3M, SBU: 4.0 M images, 5.1 M texts; your own shards of them.
Weights:  weights/: DeiT-base (the file of its authors) and a folder with bert-base-uncased; both are public.
Command:  accelerate launch --config_file launch/gpu8.yaml -m vlp.train configs/albef/paper_4m.py
Hardware: the paper: 8 A100, 512 texts a step, 30 epochs. Not run here.
As published: the momentum encoder runs with dropout; the keys of a row are those of its own process, 64, and the queue, which
          starts full of random vectors; a picture's other captions are negatives, in ITC and in ITM; [SEP] is no part of a text,
          nor is punctuation;
          a word may be replaced by any id of the vocabulary, specials too; pixels are normalised as CLIP's although the weights
          are DeiT's; no clipping of gradients; float32.
Differs:  the learning rate falls with every step, not once an epoch, and warms up from 0, not from 1e-5; the temperature, the
          class token and the positions have no weight decay; a mirrored picture's caption does not mention left or right;
          here an epoch is every picture with one of its captions, and theirs, of 5.1 M texts, 1.27 of them: hence the ramp.
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
from vlp.objectives.masking import TextMasking
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
        name="albef-paper-4m",
        model=Albef(
            image=TimmImage(
                "deit_base_patch16_224",
                weights="weights/deit_base_patch16_224-b5f2ef4d.pth",
                image_size=256,
                mean=(0.48145466, 0.4578275, 0.40821073),
                std=(0.26862954, 0.26130258, 0.27577711),
            ),
            text=BertText(weights=BERT, config=SIZES, dropout=0.1),
            fusion=Fusion(layers=6, weights=BERT, first_layer=6, heads=12, hidden_size=3072, dropout=0.1, eps=1e-12),
            embed_size=256,
            temperature=0.07,
        ),
        objectives={
            "itc": MomentumContrast(
                queue_size=65_536,
                random_start=True,
                keys="process",
                same_picture="negative",
                distill=0.4,
                ramp_epochs=1.27,
            ),
            "itm": ImageTextMatching(keys="momentum", candidates="process", same_picture="negative"),
            "mlm": MaskedText(
                masking=TextMasking(probability=0.15, spared="first", random_from="all"),
                distill=0.4,
                ramp_epochs=1.27,
                mean_over="process",
            ),
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
            max_length=25,
            augment=RandomResizedCrop(scale=(0.2, 1.0), flip=0.5, then=(RandAugment(n=2, magnitude=7),)),
            resize=Resize(mode="squash"),
            workers=8,
        ),
        optim=AdamW(lr=1e-4, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.02),
        schedule=Schedule(warmup_steps=2000, kind="cosine", final_fraction=0.1),
        train=Training(steps=299_000, precision="fp32", clip_norm=None, processes=8),
        evaluate={"retrieval": Retrieval()},
        evaluate_every=10_000,
        save=Saving(every=2000, keep=2, best="retrieval/mean_recall"),
    )
