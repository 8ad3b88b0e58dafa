"""Unsupervised SimCSE on captions, from our own masked language model: dropout is the only augmentation.

Paper:    Gao et al. 2021, arXiv:2104.08821, sec. 3.
Data:     100,000 English captions (Multi30k task 2, without the photos of Flickr8k's val and test), a quarter of them once.
Start:    runs/mlm-captions: 4 layers of 256, trained on the same captions by configs/mlm/captions.py.
Differs from the paper: tower and data are smaller; learning rate 1e-4 instead of 3e-5; the last checkpoint is taken, not the
          best on STS-B dev.
Command:  vlp train configs/mlm/captions.py            # once, for all that start from it
          vlp train configs/simcse/unsup_captions.py
          vlp eval runs/mlm-captions sts data=../shared/data/sts max_length=128    # the start, to compare with
Hardware: 2 CPU cores, 3.1 minutes.
Goal:     Spearman on STS-B test above that of the start.
Measured: mean of seeds 0, 1, 2: STS-B test 0.263, the seven 0.258: below the start (0.274, 0.284); see the README.
"""

from vlp.config import Data, Experiment, Saving, Training
from vlp.data.sentences import Sentences
from vlp.data.text_views import Same
from vlp.encoders.text import BertText
from vlp.models.single import Single
from vlp.objectives.sentence import SimCse
from vlp.optim.optimizers import AdamW
from vlp.optim.schedule import Schedule
from vlp.tasks.sentence_similarity import SentenceSimilarity


def config() -> Experiment:
    return Experiment(
        name="simcse-captions",
        model=Single(text=BertText(weights="runs/mlm-captions"), head="tanh"),
        objectives={"simcse": SimCse()},
        data=Data(
            train=(Sentences("../shared/data/text/captions_100k.txt"),),
            tokenizer="runs/mlm-captions/tokenizer",
            batch_size=64,
            max_length=32,
            text_views=(Same(),),
            workers=1,
        ),
        optim=AdamW(lr=1e-4, betas=(0.9, 0.999), weight_decay=0.0),
        schedule=Schedule(warmup_steps=20, kind="linear"),
        train=Training(steps=400, precision="bf16"),
        evaluate={"sts": SentenceSimilarity(data="../shared/data/sts", max_length=128)},
        save=Saving(every=500, keep=1),
    )
