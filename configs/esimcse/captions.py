"""ESimCSE on captions, from our own masked language model: SimCSE with word repetition and a queue of older sentences.

Paper:    Wu et al. 2022, arXiv:2109.04380, sec. 3.
Data:     100,000 English captions (Multi30k task 2, without the photos of Flickr8k's val and test), a quarter of them once.
Start:    runs/mlm-captions: 4 layers of 256, trained on the same captions by configs/mlm/captions.py.
Differs from the paper: tower and data are smaller, learning rate 1e-4: all as in configs/simcse/unsup_captions.py, which it is
          to be compared with. As in the paper, other than in its code: the momentum encoder starts as a copy of the loaded
          tower, and words are repeated anew in every epoch.
Command:  vlp train configs/mlm/captions.py            # once, for all that start from it
          vlp train configs/esimcse/captions.py
          for s in 1 2; do vlp train configs/esimcse/captions.py seed=$s name=esimcse-captions-$s; done
Hardware: 2 CPU cores, 3.7 minutes.
Goal:     mean of 3 seeds, of the mean Spearman of the seven STS tasks, above that of configs/simcse/unsup_captions.py.
Measured: mean of seeds 0, 1, 2: STS-B test 0.262, the seven 0.278 (SimCSE 0.263, 0.258).
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
        name="esimcse-captions",
        model=Single(text=BertText(weights="runs/mlm-captions"), head="tanh"),
        objectives={"esimcse": ESimCse(queue_size=160)},
        momentum=MomentumConfig(decay=0.995, mode="eval"),
        data=Data(
            train=(Sentences("../shared/data/text/captions_100k.txt"),),
            tokenizer="runs/mlm-captions/tokenizer",
            batch_size=64,
            max_length=32,
            text_views=(Repetition(rate=0.32),),
            workers=1,
        ),
        optim=AdamW(lr=1e-4, betas=(0.9, 0.999), weight_decay=0.0),
        schedule=Schedule(warmup_steps=20, kind="linear"),
        train=Training(steps=400, precision="bf16"),
        evaluate={"sts": SentenceSimilarity(data="../shared/data/sts", max_length=128)},
        save=Saving(every=500, keep=1),
    )
