"""Cutoff on SNLI, from our own masked language model: a classifier that predicts the same when a span of its input is
missing.

Paper: Shen et al. 2020, arXiv:2009.13818, section 3: cross-entropy of the whole and of the cut input, and their
    Jensen-Shannon divergence.
Data: SNLI dev, 9,842 pairs of sentences (the paper: GLUE); the two sentences are one text, "premise [SEP] hypothesis".
    Starts from runs/mlm-captions (configs/mlm/pretrain.py:captions): 4 layers of 256.
Differs: a smaller tower and less data; learning rate 1e-4 and batch 32 instead of 5e-6 and 8; the true Jensen-Shannon
    divergence, positions without replacement, and [CLS] is never cut (the published code: KL(mean || p), with
    replacement). The goals are a training loss below chance (1.10 a cross-entropy, 2.20 with a copy) and a higher
    accuracy on SNLI test than plain fine-tuning; it was not run to its end.
Cost: 2 CPU cores, about 4 minutes: a step takes 0.66 seconds on one core (measured on 4 steps).
Command: vlp train configs/mlm/pretrain.py:captions     # once, for all that start from it
    vlp train configs/cutoff/snli.py
    vlp train configs/cutoff/snli.py name=snli-plain objectives.cutoff.copies=0     # fine-tuning without Cutoff
"""

from vlp.config import Data, Experiment, Saving, Training
from vlp.data.reading.sentences import Sentences
from vlp.encoders.text import BertText
from vlp.models.single import Single
from vlp.objectives.cutoff import Cutoff
from vlp.optim.optimizers import AdamW
from vlp.optim.schedule import Schedule
from vlp.tasks.sentence_similarity import SentenceSimilarity
from vlp.tasks.text_accuracy import TextAccuracy


def config() -> Experiment:
    """SNLI, with a span of a tenth cut."""
    return Experiment(
        name="cutoff-snli",
        model=Single(text=BertText(weights="runs/mlm-captions"), classes=3),
        objectives={"cutoff": Cutoff(cut="span", ratio=0.1)},
        data=Data(
            train=(snli("../shared/data/sts/snli-dev.tsv"),),
            tokenizer="runs/mlm-captions/tokenizer",
            batch_size=32,
            max_length=64,
            workers=1,
        ),
        optim=AdamW(lr=1e-4, betas=(0.9, 0.999), weight_decay=0.01),
        schedule=Schedule(warmup_steps=60, kind="linear"),
        train=Training(epochs=2, precision="bf16"),
        evaluate={
            "snli": TextAccuracy(snli("../shared/data/sts/snli-test.tsv")),
            "sts": SentenceSimilarity(data="../shared/data/sts", max_length=128),
        },
        save=Saving(every=500, keep=1),
    )


def snli(path: str) -> Sentences:
    return Sentences(
        path,
        columns=("premise", "hypothesis"),
        join=" [SEP] ",
        header=("label", "premise", "hypothesis"),
        label="label",
        classes=("entailment", "neutral", "contradiction"),
    )
