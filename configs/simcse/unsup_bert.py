"""Unsupervised SimCSE as published, BERT-base on a million sentences of Wikipedia.

Paper:    Gao et al. 2021, arXiv:2104.08821, table 5: mean Spearman of the seven STS tasks 76.25; app. A has the settings.
Data:     the paper's wiki1m_for_simcse.txt, a sentence a line.
Start:    bert-base-uncased as a transformers folder.
Command:  vlp train configs/simcse/unsup_bert.py \\
            data.train=data/wiki1m_for_simcse.txt model.text.weights=weights/bert-base-uncased
          vlp eval runs/simcse-unsup-bert sts data=../shared/data/sts max_length=128        # of the best checkpoint
Hardware: one GPU. Not run here.
As in the paper: batch 64, learning rate 3e-5 without warm-up, one epoch, 32 tokens, temperature 0.05, the linear and tanh head
          in training only, the checkpoint that is best on STS-B dev, looked at every 250 steps (its code: every 125).
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
        name="simcse-unsup-bert",
        model=Single(text=BertText(weights="weights/bert-base-uncased", config={"model_type": "bert"}), head="tanh"),
        objectives={"simcse": SimCse()},
        data=Data(
            train=(Sentences("data/wiki1m_for_simcse.txt"),),
            tokenizer="weights/bert-base-uncased",
            batch_size=64,
            max_length=32,
            text_views=(Same(),),
            workers=4,
        ),
        optim=AdamW(lr=3e-5, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0),
        schedule=Schedule(kind="linear"),
        train=Training(epochs=1, precision="bf16"),
        evaluate={
            "dev": SentenceSimilarity("../shared/data/sts", tasks=("stsb-dev",), geometry=(), max_length=128),
        },
        evaluate_every=250,
        save=Saving(every=250, keep=1, best="dev/mean"),
    )
