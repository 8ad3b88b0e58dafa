"""ESimCSE: SimCSE with word repetition and a queue of older sentences.

Paper: Wu et al. 2022, arXiv:2109.04380, section 3 and table 2: mean Spearman of the seven STS tasks 78.27 (SimCSE:
    76.25).
"""

from dataclasses import replace

from vlp.config import Data, Experiment, Saving, Training
from vlp.data.reading.sentences import Sentences
from vlp.data.text_views import Repetition
from vlp.encoders.text import BertText
from vlp.models.single import Single
from vlp.objectives.sentence import ESimCse
from vlp.optim.ema import MomentumConfig
from vlp.optim.optimizers import AdamW
from vlp.optim.schedule import Schedule
from vlp.tasks.sentence_similarity import SentenceSimilarity

STS = "../shared/data/sts"


def config() -> Experiment:
    """BERT-base on a million sentences of Wikipedia, as published.

    Data: SimCSE's wiki1m_for_simcse.txt, one sentence a line. Starts from bert-base-uncased as a transformers folder.
    As published: SimCSE's settings, repetition rate 0.32, a queue of 2.5 batches, a momentum encoder of 0.995 without
        dropout, gradients clipped at norm 1 (the default of the trainer that the published code uses). 50 tokens
        instead of SimCSE's 32 leave room for the repetitions.
    Differs: bfloat16; the published code leaves the precision to its command line. As in the paper and not in its code:
        the momentum encoder starts as a copy of the loaded tower, words are repeated differently in every epoch, and
        the queue goes through the head of the momentum encoder (objectives.esimcse.queue_head=student is the published
        code's).
    Cost: one GPU. Not run here.
    Command: vlp train configs/esimcse/unsupervised.py data.train=data/wiki1m_for_simcse.txt
        vlp eval runs/esimcse-bert sts data=../shared/data/sts max_length=128     # of the best checkpoint
    """
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
        evaluate={"dev": SentenceSimilarity(STS, tasks=("stsb-dev",), geometry=(), max_length=128)},
        evaluate_every=125,
        save=Saving(every=125, keep=1, best="dev/mean"),
    )


def captions() -> Experiment:
    """100,000 captions, from our own masked language model.

    Data: 100,000 English captions (Multi30k task 2, without the images of Flickr8k's val and test), a quarter of them
        once. Starts from runs/mlm-captions (configs/mlm/pretrain.py:captions), which was trained on the same captions.
    Differs: a smaller tower and less data, 32 tokens, learning rate 1e-4, the last checkpoint: all as in
        configs/simcse/unsupervised.py:captions, with which it is compared.
    Measured: mean of seeds 0, 1, 2: Spearman on STS-B test 0.262, on the seven tasks 0.278; SimCSE has 0.263 and 0.258
        (vlp train configs/esimcse/unsupervised.py:captions seed=S name=esimcse-captions-S).
    Cost: 2 CPU cores, 3.7 minutes.
    Command: vlp train configs/mlm/pretrain.py:captions     # once, for all that start from it
        vlp train configs/esimcse/unsupervised.py:captions
    """
    bert = config()
    return replace(
        bert,
        name="esimcse-captions",
        model=Single(text=BertText(weights="runs/mlm-captions"), head="tanh"),
        data=replace(
            bert.data,
            train=(Sentences("../shared/data/text/captions_100k.txt"),),
            tokenizer="runs/mlm-captions/tokenizer",
            max_length=32,
            workers=1,
        ),
        optim=AdamW(lr=1e-4, betas=(0.9, 0.999), weight_decay=0.0),
        schedule=Schedule(warmup_steps=20, kind="linear"),
        train=Training(steps=400, precision="bf16"),
        evaluate={"sts": SentenceSimilarity(data=STS, max_length=128)},
        evaluate_every=0,
        save=Saving(every=500, keep=1),
    )
