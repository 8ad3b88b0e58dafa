"""ALBEF's fine-tuning on VQA v2 as published: answers are written by a decoder, and ranked.

Paper:    Li et al. 2021, arXiv:2107.07651, section 4.3 and table 3: 75.84 % test-dev, 76.04 % test-std from 14 M images.
Data:     VQA v2's train and val questions and Visual Genome's, on COCO's and Visual Genome's images under images/; ALBEF's own
          lists (vqa_train.json, vqa_val.json, vg_qa.json, vqa_test.json, answer_list.json) or the official files:
          vlp data annotations albef-vqa vqa_train.json vqa_val.json vg_qa.json data/vqa.jsonl
          vlp data annotations albef-vqa vqa_test.json data/vqa-test.jsonl
          or, of the official files of a split, vlp data annotations vqa2 QUESTIONS.json ANNOTATIONS.json data/vqa.jsonl
Weights:  weights/ALBEF.pth, the published pre-training; its ViT's positions are resized to 384 px, its decoder starts as its fusion.
Commands: accelerate launch --config_file launch/gpu8.yaml -m vlp.train configs/albef/vqa_v2.py
          vlp eval runs/albef-vqa-v2 vqa data=data/vqa-test.jsonl answers=answer_list.json submission=results.json
          with double_first=true for the published ranking, which counts the first token twice
Hardware: the paper: 8 A100, 8 epochs of 256 questions a step. Not run here.
As published: answers weigh their share of the annotators, Visual Genome's 0.5; the teacher's share grows over the first epoch;
          [SEP] ends answers and no question; no clipping of gradients; float32.
Differs:  the learning rate falls with every step, not once an epoch, and warms up over 400
          steps from 0; a picture is mirrored unless its question or answer mentions left or right.
"""

from vlp.config import Data, Experiment, Saving, Training
from vlp.data.annotated import Annotated
from vlp.data.augment import RandAugment, RandomResizedCrop, Resize
from vlp.encoders.decoder import Decoder
from vlp.encoders.fusion import Fusion
from vlp.encoders.image import TimmImage
from vlp.encoders.text import BertText
from vlp.models.albef import Albef
from vlp.objectives.answer import AnswerGeneration
from vlp.optim.ema import MomentumConfig
from vlp.optim.optimizers import AdamW
from vlp.optim.schedule import Schedule

BERT = "weights/bert-base-uncased"
SIZES = {
    "model_type": "bert",
    "vocab_size": 30_522,
    "hidden_size": 768,
    "num_hidden_layers": 6,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
}
LAYERS = {"layers": 6, "heads": 12, "hidden_size": 3072, "dropout": 0.1, "eps": 1e-12}


def config() -> Experiment:
    return Experiment(
        name="albef-vqa-v2",
        model=Albef(
            image=TimmImage(
                "deit_base_patch16_224",
                image_size=384,
                mean=(0.48145466, 0.4578275, 0.40821073),
                std=(0.26862954, 0.26130258, 0.27577711),
            ),
            text=BertText(config=SIZES, dropout=0.1),
            fusion=Fusion(**LAYERS),
            decoder=Decoder(**LAYERS),
            itc=False,
            itm=False,
            mlm=False,
            weights="weights/ALBEF.pth",
        ),
        objectives={"answer": AnswerGeneration(distill=0.4, ramp_epochs=1.0)},
        momentum=MomentumConfig(decay=0.995, mode="train"),
        data=Data(
            train=(Annotated("data/vqa.jsonl", images="images", answers="answers"),),
            tokenizer=BERT,
            sep=False,
            clean=True,
            batch_size=256,
            max_length=25,
            augment=RandomResizedCrop(scale=(0.5, 1.0), flip=0.5, then=(RandAugment(n=2, magnitude=7),)),
            resize=Resize(mode="squash"),
            workers=8,
        ),
        optim=AdamW(lr=2e-5, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.02),
        schedule=Schedule(warmup_steps=400, kind="cosine", final_fraction=0.05),
        train=Training(epochs=8.0, precision="fp32", clip_norm=None, processes=8),
        save=Saving(every=2000, keep=2),
    )
