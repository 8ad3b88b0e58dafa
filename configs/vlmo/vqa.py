"""VLMo-base fine-tuned on VQA v2: 3,129 answers as classes, 480 pixels.

Paper: Bao et al. 2022, arXiv:2111.02358, section 4.2: 76.64 % test-dev, 76.89 % test-std.
Data: VQA v2's train and val questions on COCO's images under images/, from the official files of each split, test-dev
    without answers. The list of answers must have 3,129 entries; where your count differs, give the published list as
    classes. Starts from weights/vlmo_base_patch16_224.pt, the published pre-training; relative positions are resized
    from 224 to 480 pixels; the classifier is new.
As published: an answer given by 1, 2, 3 or more annotators has the target 0.3, 0.6, 0.9 or 1. Binary cross-entropy,
    summed over classes. 3e-5, 20 times that for the classifier; a tenth of the steps of warm-up, then linear decay.
    Stochastic depth of 0.15, and the same number as dropout of the text embeddings. The list is normalised; the answers
    of annotators are looked up in it without normalisation. Questions without an answer in the list are skipped.
Differs: an image whose question or answer mentions left or right is not mirrored. bfloat16, where the published code
    uses float16. Norms, layer scales, class token, positions and token types have no weight decay. AutoContrast and
    Sharpness of RandAugment do not overflow in uint8.
Cost: 128 questions a step, 10 epochs. Not run here.
Command: vlp data annotations vqa2 QUESTIONS.json ANNOTATIONS.json data/vqa-train.jsonl     # also val and test-dev
    vlp data answers data/vqa-train.jsonl data/vqa-val.jsonl data/vqa-answers.txt --field multiple_choice_answer --normalise --min-count 9 --order appearance
    accelerate launch --config_file launch/ddp_gpu8.yaml -m vlp.train configs/vlmo/vqa.py
    vlp eval runs/vlmo-vqa-v2 vqa data=data/vqa-test.jsonl mode=classify submission=results.json
"""

from dataclasses import replace

from vlp.config import Data, Experiment, Saving, Training
from vlp.data.augment import RandAugment, RandomResizedCrop, Resize
from vlp.data.reading.annotated import Annotated
from vlp.encoders.mome import BASE
from vlp.models.vlmo import Vlmo
from vlp.objectives.classification import Classification
from vlp.optim.optimizers import AdamW
from vlp.optim.schedule import Schedule


def questions(split: str) -> Annotated:
    return Annotated(f"data/vqa-{split}.jsonl", images="images", answers="answers", classes="data/vqa-answers.txt")


def config() -> Experiment:
    """VQA v2, as published."""
    return Experiment(
        name="vlmo-vqa-v2",
        model=Vlmo(
            encoder=replace(BASE, image_size=480, drop_path=0.15, text_dropout=0.15),
            itc=False,
            itc_vl=False,
            itm=False,
            mlm=False,
            classes=3129,
            weights="weights/vlmo_base_patch16_224.pt",
        ),
        objectives={"vqa": Classification(loss="bce")},
        data=Data(
            train=(questions("train"), questions("val")),
            tokenizer="weights/bert-base-uncased",
            batch_size=128,
            max_length=40,
            augment=RandomResizedCrop(scale=(0.5, 1.0), flip=0.5, then=(RandAugment(n=2, magnitude=7),)),
            resize=Resize(mode="squash"),
            workers=8,
            max_bad_fraction=0.2,  # questions without an answer in the list are skipped, as published
        ),
        optim=AdamW(lr=3e-5, betas=(0.9, 0.98), eps=1e-8, weight_decay=0.01),
        schedule=Schedule(warmup_steps=5140, kind="linear"),
        train=Training(
            epochs=10.0,
            precision="bf16",
            clip_norm=None,
            lr_scales={"classifier": 20.0},
            activation_checkpointing="cheap",
        ),
        save=Saving(every=2000, keep=2),
    )
