"""Instance discrimination at the paper's scale: ResNet-50, NCE with 4,096 noise rows.

Paper:    Wu et al. 2018, arXiv:1805.01978: linear head to 128, temperature 0.07, proximal term, SGD with lr 0.03, a
          tenth of it after 120 and again after 160 of 200 epochs, batch 256. Rows of the bank move by half, as in the
          published code.
Data:     ImageNet's pictures as your own shards.
Differs from the paper: biases and BatchNorm's scales have no weight decay; hues turn by 0.1 instead of 0.4.
Command:  accelerate launch --config_file launch/gpu8.yaml -m vlp.train configs/instance/resnet50.py data.train=...
Hardware: 8 GPUs of 16 GB, and 0.7 GB of each for the bank of 1.28 M rows. Not run here.
Expect:   kNN (k = 200) 46.8 % top-1 of ImageNet (the published repository).
"""

from vlp.config import Data, Experiment, Saving, Training
from vlp.data.augment import ColourDistortion, RandomResizedCrop
from vlp.data.shards import Source
from vlp.encoders.image import TimmImage
from vlp.models.single import Single
from vlp.objectives.instance import InstanceDiscrimination
from vlp.optim.optimizers import Sgd
from vlp.optim.schedule import Schedule

VIEW = RandomResizedCrop(scale=(0.2, 1.0), then=(ColourDistortion(strength=0.5, probability=1.0),))


def config() -> Experiment:
    return Experiment(
        name="instance-resnet50",
        model=Single(image=TimmImage("resnet50", image_size=224), head="linear", embed_size=128),
        objectives={"instance": InstanceDiscrimination()},
        data=Data(train=(Source("shards/train"),), batch_size=256, augment=VIEW, workers=8),
        optim=Sgd(lr=0.03, momentum=0.9, weight_decay=1e-4),
        schedule=Schedule(kind="constant", drops=(0.6, 0.8)),
        train=Training(epochs=200, clip_norm=None),
        save=Saving(every=5000, keep=2),
    )
