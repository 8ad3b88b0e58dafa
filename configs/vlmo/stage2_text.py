"""VLMo's second stage, small: masked language modelling on texts alone, through the attention that pictures have shaped.

Paper:    Bao et al. 2022, arXiv:2111.02358, sec. 3.3: attention and image experts stay, text experts are trained from copies of
          the image experts. In the published code the last norm is trained, too, so that the image branch drifts:
          `vlp.models.vlmo_start.PAPER`. Here it stays as it is, to the bit: RECOMMENDED.
Data:     100,000 English captions (Multi30k task 2, without the photos of Flickr8k's val and test).
Differs from the paper: 6 layers of 192; short texts; the head for words shares the matrix of the word embeddings.
Commands: vlp train configs/vlmo/stage2_text.py    (or all three: vlp train configs/vlmo/stages.py)
          vlp eval runs/vlmo-small/2-text masked data=../shared/data/flickr8k/captions.jsonl split=val
Hardware: 2 CPU cores.
Measured: 23.8 % of masked tokens found (22.9 to 24.7), as seed 0 of staged_or_not.py; the most frequent one is 12.8 %.
"""

from dataclasses import replace

from vlp.config import Data, Experiment, Logging, Saving, Training
from vlp.data.sentences import Sentences
from vlp.encoders.mome import TINY
from vlp.models.vlmo import Vlmo
from vlp.models.vlmo_start import RECOMMENDED
from vlp.objectives.mlm import MaskedText
from vlp.optim.optimizers import AdamW
from vlp.optim.schedule import Schedule


def config() -> Experiment:
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
        train=Training(steps=350, precision="bf16", frozen=RECOMMENDED),
        save=Saving(every=175, keep=1),
        log=Logging(geometry_every=0),
    )
