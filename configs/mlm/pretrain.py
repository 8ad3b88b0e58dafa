"""Masked language modelling: BERT-base at the paper's scale, and the small text tower that the sentence methods start
from.

Paper: Devlin et al. 2019, arXiv:1810.04805, section 3.1: 15 % of the tokens, of these 80 % [MASK], 10 % another token,
    10 % kept; 12 layers of 768, 256 sequences of 512 tokens, 1,000,000 steps, Adam at 1e-4 with 10,000 steps of warm-up
    and linear decay, weight decay 0.01, dropout 0.1; a perplexity of 3.99 on held-out text (ablation of sizes, as
    recalled: look it up before citing). Liu et al. 2019, arXiv:1907.11692 (RoBERTa): next-sentence prediction does not
    help, masks are sampled again every time.
"""

from dataclasses import replace

from vlp.config import Data, Experiment, Logging, Saving, Training
from vlp.data.reading.sentences import Sentences
from vlp.encoders.text import BertText
from vlp.models.single import Single
from vlp.objectives.mlm import MaskedText
from vlp.optim.optimizers import AdamW
from vlp.optim.schedule import Schedule

SIZES = {
    "model_type": "bert",
    "vocab_size": 30522,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "max_position_embeddings": 512,
}
SMALL = {
    "model_type": "bert",
    "vocab_size": 30522,
    "hidden_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 1024,
    "max_position_embeddings": 128,
}


def config() -> Experiment:
    """BERT-base, as published but for next-sentence prediction.

    Data: any text, a passage of about 500 tokens a line; the paper has Wikipedia and books, 3.3 billion words. Starts
        from random weights.
    Differs: 512 tokens throughout, where the paper has 128 for nine tenths of the steps. No next-sentence prediction.
        Random tokens are never special ones. bfloat16, gradients clipped at norm 1.
    Cost: 8 GPUs of 80 GB, about a day: 1e6 steps x 131,072 tokens x 0.7 GFLOP at 1 PFLOP/s. Not run here.
    Command: accelerate launch --config_file launch/ddp_gpu8.yaml -m vlp.train configs/mlm/pretrain.py data.train=passages.txt
        vlp eval runs/mlm-bert-base masked data=held_out.txt
    """
    return Experiment(
        name="mlm-bert-base",
        model=Single(text=BertText(config=SIZES, dropout=0.1, length_groups=1), mlm=True),
        objectives={"mlm": MaskedText()},
        data=Data(
            train=(Sentences("passages.txt"),),
            tokenizer="../shared/data/text/bert_base_uncased_vocab.txt",
            batch_size=256,
            max_length=512,
            workers=4,
        ),
        optim=AdamW(lr=1e-4, betas=(0.9, 0.999), weight_decay=0.01),
        schedule=Schedule(warmup_steps=10_000, kind="linear"),
        train=Training(steps=1_000_000, precision="bf16"),
        save=Saving(every=10_000, keep=2),
        log=Logging(geometry_every=0),
    )


def captions() -> Experiment:
    """A tower of 4 layers on 100,000 captions, in twelve minutes.

    Data: 100,000 English captions (Multi30k task 2, without the images of Flickr8k's val and test), 1.4 M tokens an
        epoch. Starts from random weights.
    Differs: 4 layers of 256, 11 M parameters of which 7.8 M are word embeddings; texts of one sentence; AdamW with
        betas 0.9 and 0.98; random tokens are never special ones.
    Measured: 42.4 % of the masked tokens of Flickr8k's val captions predicted, 41.4 to 43.4 (always the most frequent:
        12.8 %), perplexity 27.4, 25.6 to 29.4 (vlp eval runs/mlm-captions masked
        data=../shared/data/flickr8k/captions.jsonl split=val).
    Cost: 2 CPU cores shared with other work, 12 minutes.
    Command: vlp train configs/mlm/pretrain.py:captions
        vlp eval runs/mlm-captions masked data=../shared/data/flickr8k/captions.jsonl split=val
    """
    bert = config()
    return replace(
        bert,
        name="mlm-captions",
        model=Single(text=BertText(config=SMALL, dropout=0.1), mlm=True),
        data=replace(
            bert.data,
            train=(Sentences("../shared/data/text/captions_100k.txt"),),
            batch_size=128,
            max_length=64,
            workers=1,
        ),
        optim=AdamW(lr=1e-3, weight_decay=0.01),
        schedule=Schedule(warmup_steps=100, kind="linear"),
        train=Training(steps=1000, precision="bf16"),
        save=Saving(every=500, keep=1),
    )
