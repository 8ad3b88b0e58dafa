"""Supervised SimCSE as published, BERT-base on the triples of SNLI and MNLI.

Paper:    Gao et al. 2021, arXiv:2104.08821, table 5: mean Spearman of the seven STS tasks 81.57; app. A has the settings.
Data:     the paper's nli_for_simcse.csv, 275,601 lines of sent0, sent1, hard_neg; `vlp data triples` makes such a table.
Start:    bert-base-uncased as a transformers folder.
Command:  vlp train configs/simcse/sup_bert.py data.train=data/nli_for_simcse.csv model.text.weights=weights/bert-base-uncased
          vlp eval runs/simcse-sup-bert sts data=../shared/data/sts features=embed max_length=128   # of the best checkpoint
Hardware: one GPU. Not run here.
As in the paper: batch 512, learning rate 5e-5 without warm-up, three epochs, 32 tokens, temperature 0.05, the linear and tanh
          head also in the test, the checkpoint that is best on STS-B dev, looked at every 125 steps.
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
        name="simcse-sup-bert",
        model=Single(text=BertText(weights="weights/bert-base-uncased", config={"model_type": "bert"}), head="tanh"),
        objectives={"simcse": SimCse()},
        data=Data(
            train=(Sentences("data/nli_for_simcse.csv", columns=("sent0", "sent1", "hard_neg")),),
            tokenizer="weights/bert-base-uncased",
            batch_size=512,
            max_length=32,
            workers=4,
        ),
        optim=AdamW(lr=5e-5, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0),
        schedule=Schedule(kind="linear"),
        train=Training(epochs=3, precision="bf16"),
        evaluate={
            "dev": SentenceSimilarity(
                "../shared/data/sts", tasks=("stsb-dev",), geometry=(), features="embed", max_length=128
            ),
        },
        evaluate_every=125,
        save=Saving(every=125, keep=1, best="dev/mean"),
    )
