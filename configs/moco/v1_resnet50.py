"""MoCo v1 at the paper's scale: ResNet-50, a queue of 65,536 keys.

Paper:    He et al. 2020, arXiv:1911.05722: linear head to 128, temperature 0.07, momentum 0.999, ShuffleBN over 8 GPUs,
          SGD with lr 0.03, a tenth of it after 120 and again after 160 of 200 epochs, weight decay 1e-4, batch 256. v2
          (arXiv:2003.04297): head "mlp", temperature 0.2, a cosine schedule, and a GaussianBlur() in the views, whose
          colours are distorted with probability 0.8.
Data:     ImageNet's pictures as your own shards.
Differs from the paper: biases and BatchNorm's scales have no weight decay; hues turn by 0.1 instead of 0.4.
Command:  accelerate launch --config_file launch/gpu8.yaml -m vlp.train configs/moco/v1_resnet50.py data.train=...
Hardware: 8 GPUs of 16 GB; 53 hours on 8 V100 in the paper. Not run here.
Expect:   linear probe 60.8 % top-1 of ImageNet, v2 67.5 % (their repository).
"""

from vlp.config import Data, Experiment, Saving, Training
from vlp.data.augment import ColourDistortion, RandomResizedCrop
from vlp.data.shards import Source
from vlp.encoders.image import TimmImage
from vlp.models.single import Single
from vlp.objectives.moco import Moco
from vlp.optim.ema import MomentumConfig
from vlp.optim.optimizers import Sgd
from vlp.optim.schedule import Schedule

VIEW = RandomResizedCrop(scale=(0.2, 1.0), then=(ColourDistortion(strength=0.5, probability=1.0),))


def config() -> Experiment:
    return Experiment(
        name="moco-v1-resnet50",
        model=Single(image=TimmImage("resnet50", image_size=224), head="linear", embed_size=128),
        objectives={"moco": Moco()},
        data=Data(train=(Source("shards/train"),), batch_size=256, augment=VIEW, views=(VIEW,), workers=8),
        optim=Sgd(lr=0.03, momentum=0.9, weight_decay=1e-4),
        schedule=Schedule(kind="constant", drops=(0.6, 0.8)),
        train=Training(epochs=200, clip_norm=None),
        momentum=MomentumConfig(decay=0.999),
        save=Saving(every=5000, keep=2),
    )
