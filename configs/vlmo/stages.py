"""A small VLMo from random weights in three stages (images, texts, pairs), and the comparisons that use it.

Paper: Bao et al. 2022, arXiv:2111.02358, figure 3 and sections 3.2 and 3.3.
Data: three stages on the sources of `images`, `text` and `pairs`, from random weights.
Differs: 6 layers of width 192 at 96 pixels, vision-language experts in the last 2.
Cost: 2 CPU cores.
"""

from dataclasses import replace

from vlp.config import Data, Experiment, Logging, Saving, Training
from vlp.data.augment import RandomResizedCrop, Resize
from vlp.data.reading.annotated import Annotated
from vlp.data.reading.sentences import Sentences
from vlp.data.reading.shards import Source
from vlp.encoders.fusion import Fusion
from vlp.encoders.image import TimmImage
from vlp.encoders.mome import TINY
from vlp.encoders.patch_targets import Pixels
from vlp.encoders.text import BertText
from vlp.models.albef import Albef
from vlp.models.vlmo import Vlmo
from vlp.models.vlmo_start import FROZEN_IN_TEXT_STAGE
from vlp.objectives.classification import Classification
from vlp.objectives.itc import ImageTextContrast, MomentumContrast
from vlp.objectives.itm import ImageTextMatching
from vlp.objectives.mim import MaskedImage
from vlp.objectives.mlm import MaskedText
from vlp.optim.ema import MomentumConfig
from vlp.optim.optimizers import AdamW
from vlp.optim.schedule import Schedule
from vlp.sweeps.ablation import Ablation
from vlp.sweeps.stages import Stages
from vlp.tasks.pair_classification import PairClassification
from vlp.tasks.retrieval import Retrieval

ALBEF_TEXT = {
    "model_type": "bert",
    "vocab_size": 30522,
    "hidden_size": 136,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 544,
    "max_position_embeddings": 40,
}


def config() -> Stages:
    """All three stages, each from the weights of the one before.

    Measured: seed 0 of `staged_or_not`, see there and the three stages.
    Command: vlp data pack ../shared/data/flickr8k/captions.jsonl data/flickr8k/train --split train     # also val
        vlp data pack --split train ../shared/data/imagenette/labels.jsonl data/imagenette/train
        vlp train configs/vlmo/stages.py     # the same command continues where it was stopped
        vlp train configs/vlmo/stages.py stages.1.train.steps=2000 stages.3-pairs.optim.lr=1e-3 name=vlmo-longer
    """
    return Stages(name="vlmo-small", stages={"1-images": images(), "2-text": text(), "3-pairs": pairs()})


def images() -> Experiment:
    """Stage 1: masked image modelling.

    Data: 8,000 images without captions, 6,000 of Flickr8k and 2,000 of imagenette.
    Differs: the published code downloads BEiT's weights (arXiv:2106.08254) instead. The targets are pixels, as in MAE,
        because BEiT's tokenizer is a download too.
    Measured: kNN 27.6 % (25.0 to 30.3) of ten classes, for seed 0 of `staged_or_not` (vlp eval runs/vlmo-small/1-images
        knn data=../shared/data/imagenette).
    Command: vlp train configs/vlmo/stages.py:images
        vlp eval runs/vlmo-small/1-images knn data=../shared/data/imagenette
    """
    return Experiment(
        name="1-images",
        output="runs/vlmo-small",
        model=Vlmo(
            encoder=replace(TINY, experts=("image",)),
            itc=False,
            itc_vl=False,
            itm=False,
            mlm=False,
            mim=Pixels(),
        ),
        objectives={"mim": MaskedImage()},
        data=Data(
            train=(Source("data/flickr8k/train"), Source("data/imagenette/train")),
            batch_size=64,
            augment=RandomResizedCrop(scale=(0.4, 1.0), flip=0.5),
            workers=1,
        ),
        optim=AdamW(lr=1e-3, weight_decay=0.05),
        schedule=Schedule(warmup_steps=30, kind="cosine"),
        train=Training(steps=700, precision="bf16"),
        save=Saving(every=350, keep=1),
        log=Logging(geometry_every=0),
    )


def text() -> Experiment:
    """Stage 2: masked language modelling; attention and image experts stay frozen.

    Data: 100,000 English captions (Multi30k task 2, without the images of Flickr8k's val and test).
    Differs: all of the image branch is frozen (`vlp.models.vlmo_start.FROZEN_IN_TEXT_STAGE`). The published code also trains the
        last norm, so that the image branch drifts (`FROZEN_IN_TEXT_STAGE_PUBLISHED`). Short texts. The MLM head is tied to the word embeddings.
    Measured: 23.8 % of masked tokens (22.9 to 24.7) for seed 0 of `staged_or_not`; the most frequent token is 12.8 %
        (vlp eval runs/vlmo-small/2-text masked data=../shared/data/flickr8k/captions.jsonl split=val).
    Command: vlp train configs/vlmo/stages.py:text
        vlp eval runs/vlmo-small/2-text masked data=../shared/data/flickr8k/captions.jsonl split=val
    """
    return Experiment(
        name="2-text",
        output="runs/vlmo-small",
        model=Vlmo(
            encoder=replace(TINY, experts=("image", "text")),
            itc=False,
            itc_vl=False,
            itm=False,
            tie_words=True,
            weights="runs/vlmo-small/1-images",
            text_start="image",
        ),
        objectives={"mlm": MaskedText()},
        data=Data(
            train=(Sentences("../shared/data/text/captions_100k.txt"),),
            tokenizer="../shared/data/text/bert_base_uncased_vocab.txt",
            batch_size=128,
            max_length=40,
            workers=1,
        ),
        optim=AdamW(lr=1e-3, weight_decay=0.01),
        schedule=Schedule(warmup_steps=30, kind="linear"),
        train=Training(steps=350, precision="bf16", frozen=FROZEN_IN_TEXT_STAGE),
        save=Saving(every=175, keep=1),
        log=Logging(geometry_every=0),
    )


def pairs() -> Experiment:
    """Stage 3: ITC by two heads, ITM with hard negatives of the whole batch, and MLM.

    Data: Flickr8k (Hodosh et al. 2013), 6,000 images with five captions each; for research and education only.
    Differs: vision-language experts start as copies of the text experts; the paper starts them at random.
    Measured: R@10, mean of both directions, 2.9 % (chance 1 %), see `staged_or_not`.
    Command: vlp train configs/vlmo/stages.py:pairs
        vlp eval runs/vlmo-small/3-pairs rerank
    """
    return Experiment(
        name="3-pairs",
        output="runs/vlmo-small",
        model=Vlmo(encoder=TINY, tie_words=True, weights="runs/vlmo-small/2-text", vl_start="text"),
        objectives={
            "itc": ImageTextContrast(weight=0.5),
            "itc_vl": ImageTextContrast(weight=0.5, head="vl"),
            "itm": ImageTextMatching(keys="student", candidates="global"),
            "mlm": MaskedText(weight=0.25),
        },
        data=Data(
            train=(Source("data/flickr8k/train"),),
            val="data/flickr8k/val",
            tokenizer="../shared/data/text/bert_base_uncased_vocab.txt",
            batch_size=64,
            max_length=40,
            augment=RandomResizedCrop(scale=(0.5, 1.0), flip=0.5),
            resize=Resize(mode="squash"),
            workers=1,
        ),
        optim=AdamW(lr=5e-4, weight_decay=0.05),
        schedule=Schedule(warmup_steps=30, kind="cosine"),
        train=Training(steps=150, precision="bf16"),
        evaluate={"retrieval": Retrieval()},
        save=Saving(every=75, keep=1),
        log=Logging(geometry_every=0),
    )


def entailment() -> Experiment:
    """Visual entailment on Flickr8k's images: the dual encoder of stage 3 as a fusion encoder (figure 1 and section
    3.4).

    Data: 3,434 hypotheses on images of Flickr8k's train split and 536 on images of val. Starts from stage 3; the
        classifier is new.
    Measured: 47.9 % (44.0 to 51.7), with model.weights of seed 0 of `staged_or_not`. The largest class is 32.8 %, the
        hypotheses only give 59.1 %: ten minutes from random weights leave too little language (vlp eval
        runs/vlmo-entailment-flickr8k classification split=val).
    Cost: one CPU core, 2 minutes.
    Command: vlp train configs/vlmo/stages.py:entailment
        vlp eval runs/vlmo-entailment-flickr8k classification split=val
    """
    base = pairs()
    hypotheses = Annotated(
        "../shared/data/entailment_flickr8k/entailment.jsonl",
        text="hypothesis",
        label="label",
        classes=("contradiction", "neutral", "entailment"),
        split="train",
        split_field="image_split",
    )
    return replace(
        base,
        name="vlmo-entailment-flickr8k",
        output="runs",
        model=Vlmo(
            encoder=replace(TINY, text_dropout=0.1),
            itc=False,
            itc_vl=False,
            itm=False,
            mlm=False,
            classes=3,
            weights="runs/vlmo-small/3-pairs",
        ),
        objectives={"entailment": Classification()},
        data=replace(base.data, train=(hypotheses,), val=None),
        optim=AdamW(lr=3e-4, weight_decay=0.05),
        schedule=Schedule(warmup_steps=20, kind="linear"),
        train=Training(steps=270, precision="bf16", lr_scales={"classifier": 5.0}),
        evaluate={"entailment": PairClassification(split="val")},
        save=Saving(every=270, keep=1),
    )


def staged_or_not() -> Ablation:
    """Three stages, pairs only, and ALBEF, for the same time (table 6).

    Data: as the three stages; retrieval on Flickr8k's val. All from random weights; VLMo has 11.3 M parameters, ALBEF
        11.4 M.
    Differs: in the paper both sides see the same pairs and the first two stages are extra; here all have the same time.
        ALBEF (Li et al. 2021, arXiv:2107.07651) is an addition.
    Measured: mean recall of both directions over 3 seeds, chance 0.53 %: three stages 1.6 % ± 0.1, pairs only 1.1 % ±
        0.1, ALBEF 0.6 % ± 0.1, in 11.4, 10.1 and 9.1 minutes; docs/figures/vlmo_staged_or_not.png (vlp ablate
        configs/vlmo/stages.py:staged_or_not).
    Cost: one CPU core shared with other work, about 10 minutes a seed and variant.
    Command: vlp ablate configs/vlmo/stages.py:staged_or_not
    """
    base = pairs()
    albef = Albef(
        image=TimmImage("vit_tiny_patch16_224", image_size=96, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)),
        text=BertText(config=ALBEF_TEXT, dropout=0.0),
        fusion=Fusion(layers=3),
        embed_size=192,
        temperature=0.07,
    )
    distilled = {
        "itc": MomentumContrast(queue_size=2048, distill=0.4, ramp_epochs=4.0),
        "itm": ImageTextMatching(),
        "mlm": MaskedText(distill=0.4, ramp_epochs=4.0),
    }
    return Ablation(
        name="vlmo-staged-or-not",
        variants={
            "VLMo, three stages": config(),
            "VLMo, pairs alone": replace(
                base,
                model=replace(base.model, weights=None, vl_start="weights"),
                train=replace(base.train, steps=330),
            ),
            "ALBEF, pairs alone": replace(
                base,
                model=albef,
                objectives=distilled,
                momentum=MomentumConfig(decay=0.99, mode="train"),
                train=replace(base.train, steps=355),
            ),
        },
        metrics=("retrieval/mean_recall", "retrieval/mean_r@1", "retrieval/mean_r@10"),
        seeds=(0, 1, 2),
    )
