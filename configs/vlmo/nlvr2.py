"""VLMo-base fine-tuned on NLVR2: the sentence with each image separately, and a classifier on both results.

Paper: Bao et al. 2022, arXiv:2111.02358, section 4.2: 82.77 % dev, 83.34 % test-P.
Data: NLVR2 (Suhr et al. 2019): 86,373 sentences with two images each to train, 6,982 dev, 6,967 test-P. Starts from
    weights/vlmo_base_patch16_224.pt, the published pre-training; relative positions are resized from 224 to 384 pixels;
    the token type of the second image starts as that of the first; the classifier is new.
As published: 5e-5, a tenth of the steps of warm-up, then linear decay. Stochastic depth of 0.1, and the same number as
    dropout of the text embeddings.
Differs: an image whose sentence says left or right is not mirrored. bfloat16, where the published code uses float16.
    Norms, layer scales, class token, positions and token types have no weight decay. AutoContrast and Sharpness of
    RandAugment do not overflow in uint8.
Cost: 128 sentences a step, 10 epochs. Not run here.
Command: vlp data annotations nlvr2 nlvr2/data/train.json annotations/nlvr2_train.jsonl     # also dev
    accelerate launch --config_file launch/ddp_gpu8.yaml -m vlp.train configs/vlmo/nlvr2.py
    vlp eval runs/vlmo-nlvr2 classification data=annotations/nlvr2_dev.jsonl
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
from vlp.tasks.pair_classification import PairClassification


def config() -> Experiment:
    """NLVR2, as published."""
    return Experiment(
        name="vlmo-nlvr2",
        model=Vlmo(
            encoder=replace(BASE, image_size=384, image_kinds=2, drop_path=0.1, text_dropout=0.1),
            itc=False,
            itc_vl=False,
            itm=False,
            mlm=False,
            classes=2,
            images=2,
            weights="weights/vlmo_base_patch16_224.pt",
        ),
        objectives={"nlvr2": Classification()},
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
            batch_size=128,
            max_length=40,
            augment=RandomResizedCrop(scale=(0.5, 1.0), flip=0.5, then=(RandAugment(n=2, magnitude=7),)),
            resize=Resize(mode="squash"),
            workers=8,
        ),
        optim=AdamW(lr=5e-5, betas=(0.9, 0.98), eps=1e-8, weight_decay=0.01),
        schedule=Schedule(warmup_steps=675, kind="linear"),
        train=Training(epochs=10.0, precision="bf16", clip_norm=None, activation_checkpointing="cheap"),
        evaluate={"dev": PairClassification(data="annotations/nlvr2_dev.jsonl", images="nlvr2", baseline=False)},
        evaluate_every=675,
        save=Saving(every=675, keep=2, best="dev/accuracy"),
    )
