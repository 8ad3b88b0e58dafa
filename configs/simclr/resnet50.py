"""SimCLR at the paper's scale: ResNet-50, batches of 4,096, LARS.

Paper:    Chen et al. 2020, arXiv:2002.05709, appendix B.9: MLP head with BatchNorm to 128, lr 0.3 for each 256
          pictures, weight decay 1e-6, 10 epochs of warm-up, temperature 0.1, colour distortion 1, blur, 100 (or 1,000)
          epochs.
Data:     ImageNet's pictures as your own shards.
Differs from the paper: a process normalises (BatchNorm) its own rows instead of those of all.
Command:  accelerate launch --config_file launch/gpu8.yaml -m vlp.train configs/simclr/resnet50.py data.train=...
Hardware: 8 GPUs of 80 GB, or more: 512 pictures, 1,024 views, a GPU. Not run here.
Expect:   linear probe 69.3 % top-1 of ImageNet after 1,000 epochs (the paper); lightly has 63.2 %, kNN 44.8 %, after
          100 with 256.
"""

from vlp.config import Data, Experiment, Saving, Training
from vlp.data.augment import simclr
from vlp.data.shards import Source
from vlp.encoders.image import TimmImage
from vlp.models.single import Single
from vlp.objectives.simclr import SimClr
from vlp.optim.optimizers import Lars
from vlp.optim.schedule import Schedule


def config() -> Experiment:
    return Experiment(
        name="simclr-resnet50",
        model=Single(
            image=TimmImage("resnet50", image_size=224), head="mlp", head_norm=True, hidden_size=2048, embed_size=128
        ),
        objectives={"simclr": SimClr(temperature=0.1)},
        data=Data(
            train=(Source("shards/train"),), batch_size=4096, augment=simclr(1.0), views=(simclr(1.0),), workers=12
        ),
        optim=Lars(lr=4.8, weight_decay=1e-6),
        schedule=Schedule(warmup_steps=3130, kind="cosine"),
        train=Training(epochs=100, precision="bf16", clip_norm=None),
        save=Saving(every=1000, keep=2),
    )
