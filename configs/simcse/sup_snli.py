"""Supervised SimCSE on SNLI's triples, from our own masked language model: what a sentence entails is its positive, what
contradicts it a hard negative.

Paper:    Gao et al. 2021, arXiv:2104.08821, sec. 4.
Data:     the triples of SNLI dev and test, 5,883 (the paper: 275,601 of SNLI and MNLI train).
Start:    runs/mlm-captions: 4 layers of 256, trained on captions by configs/mlm/captions.py.
Differs from the paper: tower and data are smaller; batch 128 instead of 512, learning rate 1e-4 instead of 5e-5; the last
          checkpoint is taken, not the best on STS-B dev.
Command:  vlp train configs/mlm/captions.py            # once, for all that start from it
          vlp data triples ../shared/data/sts/snli-dev.tsv ../shared/data/sts/snli-test.tsv data/snli/triples.tsv
          vlp train configs/simcse/sup_snli.py
Hardware: 2 CPU cores, 3.4 minutes.
Goal:     mean Spearman of the seven STS tasks above that of configs/simcse/unsup_captions.py.
Measured: STS-B test 0.386, the seven 0.357 (start 0.274, 0.284).
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
        name="simcse-snli",
        model=Single(text=BertText(weights="runs/mlm-captions"), head="tanh"),
        objectives={"simcse": SimCse()},
        data=Data(
            train=(Sentences("data/snli/triples.tsv", columns=("sentence", "entailed", "contradicted")),),
            tokenizer="runs/mlm-captions/tokenizer",
            batch_size=128,
            max_length=32,
            workers=1,
        ),
        optim=AdamW(lr=1e-4, betas=(0.9, 0.999), weight_decay=0.0),
        schedule=Schedule(warmup_steps=20, kind="linear"),
        train=Training(epochs=5, precision="bf16"),
        # with NLI the head stays on, as in the paper
        evaluate={"sts": SentenceSimilarity(data="../shared/data/sts", features="embed", max_length=128)},
        save=Saving(every=500, keep=1),
    )
