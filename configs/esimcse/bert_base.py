"""ESimCSE as published, BERT-base on a million sentences of Wikipedia.

Paper:    Wu et al. 2022, arXiv:2109.04380, table 2: mean Spearman of the seven STS tasks 78.27 (its SimCSE: 76.25).
Data:     SimCSE's wiki1m_for_simcse.txt, a sentence a line.
Start:    bert-base-uncased as a transformers folder.
Command:  vlp train configs/esimcse/bert_base.py \\
            data.train=data/wiki1m_for_simcse.txt model.text.weights=weights/bert-base-uncased
          vlp eval runs/esimcse-bert sts data=../shared/data/sts max_length=128         # of the best checkpoint
Hardware: one GPU. Not run here.
As in the paper: SimCSE's settings, repetition rate 0.32, a queue of 2.5 batches, momentum 0.995 without dropout. Its code has
          the trained model's head for the queue: objectives.esimcse.queue_head=student. 50 tokens instead of SimCSE's 32 leave
          room for the repetitions.
"""

from vlp.config import Data, Experiment, Saving, Training
from vlp.data.sentences import Sentences
from vlp.data.text_views import Repetition
from vlp.encoders.text import BertText
from vlp.models.single import Single
from vlp.objectives.sentence import ESimCse
from vlp.optim.ema import MomentumConfig
from vlp.optim.optimizers import AdamW
from vlp.optim.schedule import Schedule
from vlp.tasks.sentence_similarity import SentenceSimilarity


def config() -> Experiment:
    return Experiment(
        name="esimcse-bert",
        model=Single(text=BertText(weights="weights/bert-base-uncased", config={"model_type": "bert"}), head="tanh"),
        objectives={"esimcse": ESimCse(queue_size=160)},
        momentum=MomentumConfig(decay=0.995, mode="eval"),
        data=Data(
            train=(Sentences("data/wiki1m_for_simcse.txt"),),
            tokenizer="weights/bert-base-uncased",
            batch_size=64,
            max_length=50,
            text_views=(Repetition(rate=0.32),),
            workers=4,
        ),
        optim=AdamW(lr=3e-5, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0),
        schedule=Schedule(kind="linear"),
        train=Training(epochs=1, precision="bf16"),
        evaluate={
            "dev": SentenceSimilarity("../shared/data/sts", tasks=("stsb-dev",), geometry=(), max_length=128),
        },
        evaluate_every=125,
        save=Saving(every=125, keep=1, best="dev/mean"),
    )
