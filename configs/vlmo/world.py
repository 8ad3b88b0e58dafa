"""VLMo's first two stages for questions about compositions, on a synthetic world of coloured shapes.

Paper: Bao et al. 2022, arXiv:2111.02358, table 6: stagewise pre-training against vision-language pre-training from
    scratch.
Data: 10,000 scenes to train and 1,000 to evaluate; questions whose answer depends on how things are arranged. The texts
    of the second stage are the captions of the scenes. From random weights: 4 layers of width 128, vision-language
    experts in the last 2, at 64 pixels.
Differs: both sides have the same time, and the pairs-only side spends all of it on pairs. Then both learn the answers
    of the questions.
Measured: three stages 30.5 % ± 1.7, pairs only 28.2 % ± 1.2, over 3 seeds; docs/figures/vlmo_staged_or_not_world.png (vlp ablate
    configs/vlmo/world.py). The questions only give 31.2 %: in five minutes neither uses the image.
Cost: one CPU core shared with other work, 5.2 minutes a seed and variant.
Command: vlp data world data/world
    vlp data tokenizer data/world/train data/world/tokenizer --vocab-size 200
    vlp ablate configs/vlmo/world.py
"""

from dataclasses import replace

from vlp.config import Data, Experiment, Logging, Saving, Training
from vlp.data.augment import RandomResizedCrop, Resize
from vlp.data.reading.annotated import Annotated
from vlp.data.reading.shards import Source
from vlp.encoders.mome import TINY
from vlp.encoders.patch_targets import Pixels
from vlp.models.vlmo import Vlmo
from vlp.models.vlmo_start import FROZEN_IN_TEXT_STAGE
from vlp.objectives.classification import Classification
from vlp.objectives.itc import ImageTextContrast
from vlp.objectives.itm import ImageTextMatching
from vlp.objectives.masking import TextMasking
from vlp.objectives.mim import MaskedImage
from vlp.objectives.mlm import MaskedText
from vlp.optim.optimizers import AdamW
from vlp.optim.schedule import Schedule
from vlp.sweeps.ablation import Ablation
from vlp.sweeps.stages import Stages
from vlp.tasks.pair_classification import PairClassification

WORLD = "data/world"
ANSWERS = (
    *("yes", "no", "small", "large", "above", "below", "left of", "right of", "around", "inside"),
    *("circle", "square", "triangle", "diamond", "cross", "star"),
    *("red", "orange", "yellow", "green", "blue", "purple", "black", "white"),
)
MOME = replace(
    TINY, width=128, heads=4, layers=4, vl_from=2, image_size=64, patch_size=8, vocab_size=200, max_text_length=40
)
MASKING = TextMasking(probability=0.25)


def config() -> Ablation:
    """Three stages against pairs only, each followed by the questions."""
    pairs = Experiment(
        name="pairs",
        model=Vlmo(encoder=MOME, tie_words=True),
        objectives={
            "itc": ImageTextContrast(weight=0.5),
            "itc_vl": ImageTextContrast(weight=0.5, head="vl"),
            "itm": ImageTextMatching(keys="student", candidates="global"),
            "mlm": MaskedText(weight=0.25, masking=MASKING),
        },
        data=Data(
            train=(Source(f"{WORLD}/train"),),
            val=f"{WORLD}/val",
            tokenizer=f"{WORLD}/tokenizer",
            batch_size=64,
            max_length=40,
            # captions say where things are: nothing is cropped or mirrored
            augment=RandomResizedCrop(scale=(1.0, 1.0), ratio=(1.0, 1.0), flip=0.0),
            resize=Resize(mode="squash"),
            workers=1,
        ),
        optim=AdamW(lr=1e-3, weight_decay=0.02),
        schedule=Schedule(warmup_steps=50, kind="cosine"),
        train=Training(steps=180, precision="bf16"),
        save=Saving(every=150, keep=1),
        log=Logging(geometry_every=0),
    )
    bare = Vlmo(encoder=MOME, itc=False, itc_vl=False, itm=False, mlm=False, tie_words=True)
    images = replace(
        pairs,
        model=replace(bare, encoder=replace(MOME, experts=("image",)), mim=Pixels()),
        objectives={"mim": MaskedImage()},
    )
    text = replace(
        pairs,
        model=replace(bare, encoder=replace(MOME, experts=("image", "text")), mlm=True, text_start="image"),
        objectives={"mlm": MaskedText(masking=MASKING)},
        train=replace(pairs.train, frozen=FROZEN_IN_TEXT_STAGE),
    )
    questions = Annotated(
        f"{WORLD}/questions.jsonl",
        images=f"{WORLD}/train",
        image=("key",),
        label="answer",
        classes=ANSWERS,
        split="train",
    )
    answering = replace(
        pairs,
        model=replace(bare, classes=len(ANSWERS)),
        objectives={"answers": Classification()},
        data=replace(pairs.data, train=(questions,), val=None),
        evaluate={"questions": PairClassification(images=f"{WORLD}/val", split="val", baseline=False)},
    )
    after_text = replace(pairs, model=replace(pairs.model, vl_start="text"))
    longer = replace(pairs, train=replace(pairs.train, steps=226))
    return Ablation(
        name="vlmo-staged-or-not-world",
        variants={
            "three stages": Stages(
                "staged", {"1-images": images, "2-text": text, "3-pairs": after_text, "4-questions": answering}
            ),
            "pairs alone": Stages("alone", {"1-pairs": longer, "2-questions": answering}),
        },
        metrics=("questions/accuracy",),
        seeds=(0, 1, 2),
    )
