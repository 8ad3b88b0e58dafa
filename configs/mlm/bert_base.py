"""BERT-base's masked language modelling at the paper's scale, as later work does it: without next-sentence prediction.

Paper:    Devlin et al. 2019, arXiv:1810.04805: 12 layers of 768, 256 sequences of 512 tokens, 1,000,000 steps, Adam at 1e-4
          with 10,000 steps of warm-up and linear decay, weight decay 0.01, dropout 0.1; Liu et al. 2019, arXiv:1907.11692
          (RoBERTa): next-sentence prediction does no good, masks are drawn anew every time.
Data:     any text, a passage of about 500 tokens a line: Wikipedia and books, 3.3 billion words.
Differs from the paper: 512 tokens throughout, where the paper has 128 for nine tenths of the steps; no next-sentence
          prediction; random tokens are never special ones.
Commands: accelerate launch --config_file launch/gpu8.yaml -m vlp.train configs/mlm/bert_base.py data.train=passages.txt
          vlp eval runs/mlm-bert-base masked data=held_out.txt
Hardware: 8 GPUs of 80 GB, about a day: 1e6 steps x 131,072 tokens x 0.7 GFLOP at 1 PFLOP/s. Not run here.
Goal:     a perplexity near 4 on held-out text (the paper's ablation of sizes, as recalled: 3.99; look it up before citing).
"""

from vlp.config import Data, Experiment, Logging, Saving, Training
from vlp.data.sentences import Sentences
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


def config() -> Experiment:
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
