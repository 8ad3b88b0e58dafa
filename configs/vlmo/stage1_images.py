"""VLMo's first stage, small: masked image modelling on pictures alone, from nothing.

Paper:    Bao et al. 2022, arXiv:2111.02358, sec. 3.3: attention and image experts start from BEiT's (arXiv:2106.08254), which the
          published code downloads. Here they are trained.
Data:     8,000 photos without their captions: 6,000 of Flickr8k, 2,000 of imagenette.
Differs from the paper: 6 layers of 192 at 96 px; MAE's targets, the patches' own pixels, since BEiT's tokenizer is a download.
Commands: vlp data pack ../shared/data/flickr8k/captions.jsonl data/flickr8k/train --split train
          vlp data pack --split train ../shared/data/imagenette/labels.jsonl data/imagenette/train
          vlp train configs/vlmo/stage1_images.py    (or all three: vlp train configs/vlmo/stages.py)
          vlp eval runs/vlmo-small/1-images knn data=../shared/data/imagenette
Hardware: 2 CPU cores.
Measured: kNN 27.6 % (25.0 to 30.3) of ten classes, as seed 0 of staged_or_not.py.
"""

from dataclasses import replace

from vlp.config import Data, Experiment, Logging, Saving, Training
from vlp.data.augment import RandomResizedCrop
from vlp.data.shards import Source
from vlp.encoders.mome import TINY
from vlp.encoders.patch_targets import Pixels
from vlp.models.vlmo import Vlmo
from vlp.objectives.mim import MaskedImage
from vlp.optim.optimizers import AdamW
from vlp.optim.schedule import Schedule


def config() -> Experiment:
    return Experiment(
        name="1-images",
        output="runs/vlmo-small",
        model=Vlmo(
            encoder=replace(TINY, experts=("image",)),
            itc=False,
            itc_vl=False,
            itm=False,
            mlm=False,
            mim=Pixels(),
        ),
        objectives={"mim": MaskedImage()},
        data=Data(
            train=(Source("data/flickr8k/train"), Source("data/imagenette/train")),
            batch_size=64,
            augment=RandomResizedCrop(scale=(0.4, 1.0), flip=0.5),
            workers=1,
        ),
        optim=AdamW(lr=1e-3, weight_decay=0.05),
        schedule=Schedule(warmup_steps=30, kind="cosine"),
        train=Training(steps=700, precision="bf16"),
        save=Saving(every=350, keep=1),
        log=Logging(geometry_every=0),
    )
