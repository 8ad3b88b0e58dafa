"""ALBEF pre-training: contrast with momentum queues, matching with hard negatives and masked words, with distillation.

Paper: Li et al. 2021, arXiv:2107.07651, section 3. From 4 M images, after fine-tuning: VQA 74.5 / 74.7, NLVR2 80.2 /
    80.5. From 14 M images: Flickr30k R@1 88.5 / 75.9 at 384 pixels without fine-tuning and 95.9 / 85.6 with it, COCO
    77.6 / 60.7 with it. tests/test_parity_albef.py compares these objectives with numbers printed by the published
    code.
Data: your own shards of COCO, Visual Genome, Conceptual Captions 3M and SBU (4.0 M images, 5.1 M captions); the `_14m`
    variants add Conceptual 12M (14.1 M images, 15.2 M captions). The published loader draws captions uniformly, vlp
    draws an image and then one of its captions. The weight of a source is therefore its number of captions
    (`vlp data stats`). Starts from DeiT-base (the file of its authors) and a folder with bert-base-uncased in weights/;
    both are public.
As published: `config` and `paper_14m` repeat the published step, including its flaws. The momentum encoder runs with
    dropout. The keys of a row are the 64 of its own process and a queue that starts full of random vectors. The other
    captions of an image are negatives in ITC and ITM. A text has no [SEP] and no punctuation. A masked token may be
    replaced by any id of the vocabulary, special tokens included. Pixels are normalised with CLIP's statistics although
    the weights are DeiT's. No gradient clipping, float32.
Differs: the learning rate falls with every step, not once an epoch, and warms up from 0, not from 1e-5. Temperature,
    class token, position and token-type embeddings have no weight decay. An image whose caption mentions left or right
    is not mirrored. AutoContrast and Sharpness of RandAugment do not overflow in uint8. An epoch here is as many
    samples as there are images; an epoch of the paper, as many as there are captions, is 1.27 (4 M) or 1.08 (14 M) of
    them: hence the ramps. The `recommended_` variants correct what the published step gets wrong. A row sees the keys
    of all processes, and the queue contains only real rows. Captions of one image are positives in ITC and never
    negatives in ITM. No special token is masked or substituted, and the MLM mean is over the masked tokens of all
    processes. Pixels are normalised as DeiT was trained. Texts have up to 30 tokens. bfloat16, gradients clipped at
    norm 1.
Cost: the paper used 8 A100, 512 captions a step, 30 epochs. Not run here.
Command: accelerate launch --config_file launch/ddp_gpu8.yaml -m vlp.train configs/albef/pretrain.py
    accelerate launch --config_file launch/ddp_gpu8.yaml -m vlp.train configs/albef/pretrain.py:recommended_14m
"""

from dataclasses import replace

from vlp.config import Data, Experiment, Saving, Training
from vlp.data.augment import RandAugment, RandomResizedCrop, Resize
from vlp.data.reading.shards import Source
from vlp.models.albef import BASE
from vlp.objectives.itc import MomentumContrast
from vlp.objectives.itm import ImageTextMatching
from vlp.objectives.masking import TextMasking
from vlp.objectives.mlm import MaskedText
from vlp.optim.ema import MomentumConfig
from vlp.optim.optimizers import AdamW
from vlp.optim.schedule import Schedule
from vlp.tasks.retrieval import Retrieval

BERT = "weights/bert-base-uncased"


def config() -> Experiment:
    """4 M images, as published."""
    return Experiment(
        name="albef-paper-4m",
        model=replace(
            BASE,
            image=replace(BASE.image, weights="weights/deit_base_patch16_224-b5f2ef4d.pth", image_size=256),
            text=replace(BASE.text, weights=BERT),
            fusion=replace(BASE.fusion, weights=BERT, first_layer=6),
        ),
        objectives=published_objectives(ramp_epochs=1.27),
        momentum=MomentumConfig(decay=0.995, mode="train"),
        data=Data(
            train=(
                Source("shards/coco", weight=567_000),
                Source("shards/visual-genome", weight=769_000),
                Source("shards/cc3m", weight=2_950_000),
                Source("shards/sbu", weight=860_000),
            ),
            val="shards/flickr30k-val",
            tokenizer=BERT,
            add_sep=False,
            clean_captions=True,
            batch_size=512,
            readers=64,
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


def published_objectives(ramp_epochs: float) -> dict:
    return {
        "itc": MomentumContrast(
            queue_size=65_536,
            random_start=True,
            keys="local",
            duplicates="negative",
            distill=0.4,
            ramp_epochs=ramp_epochs,
        ),
        "itm": ImageTextMatching(keys="momentum", candidates="local", duplicates="negative"),
        "mlm": MaskedText(
            masking=TextMasking(probability=0.15, exclude="first", random_from="all"),
            distill=0.4,
            ramp_epochs=ramp_epochs,
            mean_over="local",
        ),
    }


def paper_14m() -> Experiment:
    """14 M images, as published."""
    return with_cc12m(replace(config(), name="albef-paper-14m", objectives=published_objectives(ramp_epochs=1.08)))


def recommended_4m() -> Experiment:
    """4 M images, with the flaws of the published step corrected."""
    paper = config()
    return replace(
        paper,
        name="albef-recommended-4m",
        model=replace(paper.model, image=replace(paper.model.image, mean=None, std=None)),
        objectives={
            "itc": MomentumContrast(queue_size=65_536, distill=0.4, ramp_epochs=1.0),
            "itm": ImageTextMatching(),
            "mlm": MaskedText(distill=0.4, ramp_epochs=1.0),
        },
        data=replace(paper.data, max_length=30),
        train=Training(steps=paper.train.steps, precision="bf16", processes=8),
    )


def recommended_14m() -> Experiment:
    """14 M images, with the flaws of the published step corrected."""
    return with_cc12m(replace(recommended_4m(), name="albef-recommended-14m"))


def with_cc12m(experiment: Experiment) -> Experiment:
    train = (*experiment.data.train, Source("shards/cc12m", weight=10_060_000))
    return replace(
        experiment,
        data=replace(experiment.data, train=train),
        train=replace(experiment.train, steps=891_000),
    )
