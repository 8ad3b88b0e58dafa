"""VLMo's third stage at the paper's scale: contrast by two heads, matching and masked words; everything is trained.

Paper: Bao et al. 2022, arXiv:2111.02358, sections 3 and 4.1. After fine-tuning (the published code's README), VQA /
    NLVR2 / COCO R@1 text, image / Flickr30k R@1 text, image: base 76.6 / 83.3 / 74.8, 57.2 / 92.3, 79.3; base_plus 78.5
    / 85.1 / 76.3, 58.6 / 93.2, 81.8; large 79.9 / 86.9 / 78.2, 60.6 / 95.3, 84.5. tests/test_parity_vlmo.py compares
    these objectives with numbers printed by the published code.
Data: your own shards of COCO, Visual Genome, Conceptual Captions 3M and SBU: 4.0 M images, 9.9 M captions. The
    published loader draws captions uniformly, vlp draws an image and then one of its captions. The weight of a source
    is therefore its number of captions (those of ViLT's table 1 as recalled, whose loader the published code uses: look
    them up before citing). The published base_plus file saw more images afterwards. Starts from the official file of
    stage 2 of its size in weights/, or the run folder of a stage 2 of your own; vision-language experts start at
    random. The vocabulary is that of weights/bert-base-uncased.
As published: AdamW at 2e-4 (base), 1e-4 (base_plus) or 5e-5 (large) with betas 0.9 and 0.98, weight decay 0.01, 2,500
    steps of warm-up, linear decay. Stochastic depth of 0.1, and the same number as dropout of the text embeddings. MLM
    of whole words, 15 %, with weight 0.25; each head of ITC with weight 0.5. Texts of up to 40 tokens. Crops of half
    the image or more, flips, and two of ALBEF's ten operations of RandAugment at magnitude 7 of 10. base_plus has 24
    layers of width 544, absolute positions (up to 40 tokens) and no layer scale; large has 24 layers of width 1024 and
    vision-language experts in the last three.
Differs: the gradient of ITC is that of the whole batch; the published code computes 1/64 of it with 64 processes. For
    the published proportion of ITC to the other losses, divide its two weights by the number of processes. A negative
    is never another caption of the same image. bfloat16, where the published code uses float16. The scale of
    similarities is at most 100; the published clamp is commented out. Norms, layer scales, class token, positions,
    token types and logit scales have no weight decay; the published list misses several of them. Each pass runs on real
    tokens only, with cheap activation checkpointing and one backward pass a loss. Every word is masked independently
    with 15 %, so that a short text may have no masked word. Negatives may come from all processes, which exchange
    embedded patches instead of pixels. An image whose caption mentions left or right is not mirrored. AutoContrast and
    Sharpness of RandAugment do not overflow in uint8. The published code's config of large builds another model, a ViT
    of timm.
Cost: the paper used 64 V100 for about two days (base) or 128 for about three (large): 1,024 captions a step, 200,000
    steps. Not run here.
Command: accelerate launch --config_file launch/ddp_gpu8.yaml -m vlp.train configs/vlmo/pretrain.py
    accelerate launch --config_file launch/ddp_gpu8.yaml -m vlp.train configs/vlmo/pretrain.py:large
"""

from dataclasses import replace

from vlp.config import Data, Experiment, Saving, Training
from vlp.data.augment import RandAugment, RandomResizedCrop, Resize
from vlp.data.reading.shards import Source
from vlp.encoders.mome import BASE, BASE_PLUS, LARGE, Mome
from vlp.models.vlmo import Vlmo
from vlp.objectives.itc import ImageTextContrast
from vlp.objectives.itm import ImageTextMatching
from vlp.objectives.masking import TextMasking
from vlp.objectives.mlm import MaskedText
from vlp.optim.optimizers import AdamW
from vlp.optim.schedule import Schedule
from vlp.tasks.retrieval import Retrieval


def config() -> Experiment:
    """VLMo-base."""
    return Experiment(
        name="vlmo-base",
        model=Vlmo(
            encoder=replace(BASE, drop_path=0.1, text_dropout=0.1),
            temperature=0.07,
            temperature_min=0.01,
            weights="weights/vlmo_base_patch16_224_stage2.pt",
            vl_start="random",
        ),
        objectives={
            "itc": ImageTextContrast(weight=0.5),
            "itc_vl": ImageTextContrast(weight=0.5, head="vl"),
            "itm": ImageTextMatching(keys="student", candidates="global"),
            "mlm": MaskedText(weight=0.25, masking=TextMasking(probability=0.15, unit="word", random_from="all")),
        },
        data=Data(
            train=(
                Source("shards/coco", weight=567_000),
                Source("shards/visual-genome", weight=5_410_000),
                Source("shards/cc3m", weight=3_010_000),
                Source("shards/sbu", weight=867_000),
            ),
            val="shards/flickr30k-val",
            tokenizer="weights/bert-base-uncased",
            batch_size=1024,
            readers=64,
            max_length=40,
            augment=RandomResizedCrop(scale=(0.5, 1.0), flip=0.5, then=(RandAugment(n=2, magnitude=7),)),
            resize=Resize(mode="squash"),
            workers=8,
        ),
        optim=AdamW(lr=2e-4, betas=(0.9, 0.98), eps=1e-8, weight_decay=0.01),
        schedule=Schedule(warmup_steps=2500, kind="linear"),
        train=Training(
            steps=200_000, precision="bf16", clip_norm=None, activation_checkpointing="cheap", backward="per_loss"
        ),
        evaluate={"retrieval": Retrieval()},
        evaluate_every=10_000,
        save=Saving(every=2000, keep=2, best="retrieval/mean_recall"),
    )


def base_plus() -> Experiment:
    """VLMo-base-plus: 24 layers of width 544."""
    return of_size("vlmo-base-plus", BASE_PLUS, "weights/vlmo_base_plus_patch16_224_stage2.pt", lr=1e-4)


def large() -> Experiment:
    """VLMo-large: 24 layers of width 1024."""
    return of_size("vlmo-large", LARGE, "weights/vlmo_large_patch16_224_stage2.pt", lr=5e-5)


def of_size(name: str, encoder: Mome, weights: str, lr: float) -> Experiment:
    base = config()
    encoder = replace(encoder, drop_path=0.1, text_dropout=0.1)
    return replace(
        base,
        name=name,
        model=replace(base.model, encoder=encoder, weights=weights),
        optim=replace(base.optim, lr=lr),
    )
