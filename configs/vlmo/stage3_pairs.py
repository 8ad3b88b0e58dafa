"""VLMo's third stage, small: contrast, matching and masked words on pictures with captions, everything trained.

Paper:    Bao et al. 2022, arXiv:2111.02358, sec. 3.2: ITC by two heads, ITM with hard negatives of the whole batch, MLM with a
          look at the picture, weighted 0.25 in the published code; the vision-language experts start at random.
Data:     Flickr8k (Hodosh et al. 2013), 6,000 photos with five captions each; for research and education only.
Differs from the paper: 6 layers of 192, vision-language experts in the last 2, at 96 px; these start as copies of the text
          experts.
Commands: vlp data pack ../shared/data/flickr8k/captions.jsonl data/flickr8k/train --split train
          vlp data pack ../shared/data/flickr8k/captions.jsonl data/flickr8k/val --split val
          vlp train configs/vlmo/stage3_pairs.py    (or all three: vlp train configs/vlmo/stages.py)
          vlp eval runs/vlmo-small/3-pairs rerank
Hardware: 2 CPU cores.
Measured: R@10 of both ways 2.9 % (chance 1 %), see staged_or_not.py.
"""

from vlp.config import Data, Experiment, Logging, Saving, Training
from vlp.data.augment import RandomResizedCrop, Resize
from vlp.data.shards import Source
from vlp.encoders.mome import TINY
from vlp.models.vlmo import Vlmo
from vlp.objectives.itc import ImageTextContrast
from vlp.objectives.itm import ImageTextMatching
from vlp.objectives.mlm import MaskedText
from vlp.optim.optimizers import AdamW
from vlp.optim.schedule import Schedule
from vlp.tasks.retrieval import Retrieval


def config() -> Experiment:
    return Experiment(
        name="3-pairs",
        output="runs/vlmo-small",
        model=Vlmo(encoder=TINY, tie_words=True, weights="runs/vlmo-small/2-text", vl_start="text"),
        objectives={
            "itc": ImageTextContrast(weight=0.5),
            "itc_vl": ImageTextContrast(weight=0.5, head="vl"),
            "itm": ImageTextMatching(keys="student", candidates="all"),
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
