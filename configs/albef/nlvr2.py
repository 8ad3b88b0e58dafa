"""NLVR2, fine-tuned after text assignment: is a sentence true of two photos?

Paper:    Li et al. 2021, arXiv:2107.07651, sec. 4: 83.14 % of test-P from 14 M images (LAVIS's run: 82.47 dev, 82.91 test-P),
          80.24 and 80.50 from 4 M.
Data:     NLVR2 (Suhr et al. 2019): 86,373 sentences with two photos each to train, 6,982 dev, 6,967 test-P.
Weights:  runs/albef-nlvr2-assignment, see nlvr2_assignment.py; or ALBEF's own file of that stage; the head is new.
Commands: vlp data annotations nlvr2 nlvr2/data/train.json annotations/nlvr2_train.jsonl
          vlp data annotations nlvr2 nlvr2/data/dev.json annotations/nlvr2_dev.jsonl
          accelerate launch --config_file launch/gpu8.yaml -m vlp.train configs/albef/nlvr2.py
          vlp eval runs/albef-nlvr2 classification data=annotations/nlvr2_dev.jsonl
Hardware: the paper: 8 A100, 128 sentences a step, 10 epochs. Not run here.
As published: each fusion layer stands twice, once for each photo, and both share keys and values; distillation with a ramp over
          the first epoch. The momentum encoder starts from the loaded weights; the published code copied it before it loaded them.
Differs:  a photo whose sentence says left or right is not mirrored; the warm-up of 100 steps is linear from 0; the rate falls
          with every step, not once an epoch; of a text 64 tokens are read, not 30 words.
"""

from vlp.config import Data, Experiment, Saving, Training
from vlp.data.annotated import Annotated
from vlp.data.augment import RandAugment, RandomResizedCrop, Resize
from vlp.encoders.fusion import Fusion
from vlp.encoders.image import TimmImage
from vlp.encoders.text import BertText
from vlp.models.albef import Albef
from vlp.objectives.classification import Classification
from vlp.optim.ema import MomentumConfig
from vlp.optim.optimizers import AdamW
from vlp.optim.schedule import Schedule
from vlp.tasks.annotated_classes import Classes

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
        name="albef-nlvr2",
        model=Albef(
            image=TimmImage(
                "deit_base_patch16_224",
                image_size=384,
                mean=(0.48145466, 0.4578275, 0.40821073),
                std=(0.26862954, 0.26130258, 0.27577711),
            ),
            text=BertText(config=SIZES, dropout=0.1),
            fusion=Fusion(layers=6, images=2, heads=12, hidden_size=3072, dropout=0.1, eps=1e-12),
            itc=False,
            itm=False,
            mlm=False,
            classes=2,
            weights="runs/albef-nlvr2-assignment",
        ),
        objectives={"nlvr2": Classification(distill=0.4, ramp_epochs=1.0)},
        momentum=MomentumConfig(decay=0.995, mode="train"),
        data=Data(
            train=(
                Annotated(
                    "annotations/nlvr2_train.jsonl",
                    images="nlvr2",
                    image=("image0", "image1"),
                    label="label",
                    classes=("False", "True"),
                ),
            ),
            tokenizer="weights/bert-base-uncased",
            sep=False,
            clean=True,
            batch_size=128,
            max_length=64,
            augment=RandomResizedCrop(scale=(0.5, 1.0), flip=0.5, then=(RandAugment(n=2, magnitude=7),)),
            resize=Resize(mode="squash"),
            workers=8,
        ),
        optim=AdamW(lr=2e-5, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.02),
        schedule=Schedule(warmup_steps=100, kind="cosine", final_fraction=0.05),
        train=Training(epochs=10, precision="fp32", clip_norm=None, processes=8),
        evaluate={"dev": Classes(data="annotations/nlvr2_dev.jsonl", images="nlvr2", baseline=False)},
        evaluate_every=675,
        save=Saving(every=675, keep=2, best="dev/accuracy"),
    )
