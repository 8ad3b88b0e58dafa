"""CERT on captions, from our own masked language model: a sentence finds its paraphrase in a queue of momentum keys.

Paper: Fang et al. 2020, arXiv:2005.12766: paraphrases by translation to German or Chinese and back; MoCo on sentences.
Data: 12,000 pairs of captions that describe the same image of Flickr8k's train split. They are not translations: two
    people saw the same image, so that a pair may name different things. No translation model comes with pip; with one,
    or with any function of yours, `vlp data paraphrase SENTENCES.txt OUT.tsv --translator THERE BACK` makes the paper's
    kind of file. Starts from runs/mlm-captions (configs/mlm/pretrain.py:captions): 4 layers of 256.
Differs: data and tower as above; a queue of 4,096 of the 12,000 sentences, which starts empty; momentum 0.99, because
    there are few steps; AdamW at 1e-4 instead of SGD at 4e-5, batch 64 instead of 32, 32 tokens instead of 64. The goal
    is a mean Spearman of the seven STS tasks above that of the start; it was not run to its end.
Cost: 2 CPU cores, about 3 minutes: a step takes 0.55 seconds on one core (measured on 4 steps).
Command: vlp train configs/mlm/pretrain.py:captions     # once, for all that start from it
    vlp data paraphrase ../shared/data/flickr8k/captions.jsonl data/flickr8k/paraphrases.tsv --same-picture --split train
    vlp train configs/cert/captions.py
"""

from vlp.config import Data, Experiment, Saving, Training
from vlp.data.reading.sentences import Sentences
from vlp.encoders.text import BertText
from vlp.models.single import Single
from vlp.objectives.sentence import Cert
from vlp.optim.ema import MomentumConfig
from vlp.optim.optimizers import AdamW
from vlp.optim.schedule import Schedule
from vlp.tasks.sentence_similarity import SentenceSimilarity


def config() -> Experiment:
    """12,000 pairs of captions."""
    return Experiment(
        name="cert-captions",
        model=Single(text=BertText(weights="runs/mlm-captions"), head="mlp", embed_size=128),
        objectives={"cert": Cert(queue_size=4096)},
        momentum=MomentumConfig(decay=0.99),
        data=Data(
            train=(Sentences("data/flickr8k/paraphrases.tsv", columns=("sentence", "paraphrase")),),
            tokenizer="runs/mlm-captions/tokenizer",
            batch_size=64,
            max_length=32,
            workers=1,
        ),
        optim=AdamW(lr=1e-4, betas=(0.9, 0.999), weight_decay=0.0),
        schedule=Schedule(warmup_steps=50, kind="cosine"),
        train=Training(steps=600, precision="bf16"),
        evaluate={"sts": SentenceSimilarity(data="../shared/data/sts", max_length=128)},
        save=Saving(every=500, keep=1),
    )
