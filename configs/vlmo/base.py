"""VLMo-base's third stage as published, on 4 M images: contrast by two heads, matching, masked words; everything trained.

Paper:    Bao et al. 2022, arXiv:2111.02358, sec. 3 and 4.1. tests/test_parity_vlmo.py holds these objectives to the numbers of the
          published code.
Data:     COCO, Visual Genome, Conceptual Captions 3M, SBU: 4.0 M images; your own shards of them.
Weights:  weights/: the official file of stage 2, whose vision-language experts start at random; or the run folder of a stage 2
          of your own; and a folder with bert-base-uncased's vocabulary.
Command:  accelerate launch --config_file launch/gpu8.yaml -m vlp.train configs/vlmo/base.py
Hardware: the paper: 64 V100 for about two days, 1024 texts a step, 200,000 steps. Not run here.
Goal:     VQA 76.6, NLVR2 83.3, COCO 74.8 / 57.2 and Flickr30k 92.3 / 79.3 (text / image R@1) after fine-tuning
          (the published code's README).
As published: AdamW at 2e-4 with betas 0.9 and 0.98, weight decay 0.01, 2,500 steps of warm-up, linear decay; dropped paths 0.1, and
          the same number as dropout of the embeddings of texts; MLM of whole words, 15 %, by a quarter; each head of ITC by half;
          texts of up to 40 tokens; crops of half the photo or more, flips, and two of ALBEF's ten operations of RandAugment at 7 of 10.
Differs:  ITC's gradient is that of the whole batch, where the published code has 1/64 of it with 64 processes: for its proportion
          of ITC to the rest, divide the two weights by the number of processes. A negative is no other caption of the same picture.
          The scale of similarities is at most 100, where the published code lost the clamp; norms, scales and positions have no
          weight decay, of which its list misses several. Each pass runs on real tokens, keeps what is dear to make again, and takes
          its backward pass before the next. Every word is masked by itself with 15 %, so that a short text may have none masked.
          Negatives may come from all processes, whose embedded patches are sent, not their pixels.
"""

from dataclasses import replace

from vlp.config import Data, Experiment, Saving, Training
from vlp.data.augment import RandAugment, RandomResizedCrop, Resize
from vlp.data.shards import Source
from vlp.encoders.mome import BASE
from vlp.models.vlmo import Vlmo
from vlp.objectives.itc import ImageTextContrast
from vlp.objectives.itm import ImageTextMatching
from vlp.objectives.masking import TextMasking
from vlp.objectives.mlm import MaskedText
from vlp.optim.optimizers import AdamW
from vlp.optim.schedule import Schedule
from vlp.tasks.retrieval import Retrieval


def config() -> Experiment:
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
            "itm": ImageTextMatching(keys="student", candidates="all"),
            "mlm": MaskedText(weight=0.25, masking=TextMasking(probability=0.15, of="word", random_from="all")),
        },
        data=Data(
            train=(
                Source("shards/coco"),
                Source("shards/visual-genome"),
                Source("shards/cc3m"),
                Source("shards/sbu"),
            ),
            val="shards/flickr30k-val",
            tokenizer="weights/bert-base-uncased",
            batch_size=1024,
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
