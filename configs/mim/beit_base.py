"""BEiT-base's masked image modelling at the paper's scale, from nothing: VLMo's first stage.

Paper:    Bao et al. 2022, arXiv:2106.08254: ViT-B/16 with relative positions and layer scale 0.1 at 224 px, 40 % of the
          patches masked in blocks, codes of DALL-E's tokenizer as targets; batch 2048, 800 epochs of ImageNet-1k (500,000
          steps), AdamW at 1.5e-3 with betas 0.9 and 0.999, weight decay 0.05, 10 epochs of warm-up, cosine, clipping at 3,
          drop path 0.1; random crops, flips and colour jitter.
Data:     the 1.28 M photos of ImageNet-1k as shards; captions are not read.
Differs from the paper: a table of relative positions in each layer, as timm's model has it, where the paper shares one; the
          tokenizer sees the tower's picture at half its size, where the paper resizes the photo once more.
Weights:  OpenAI's encoder.pkl, converted once (`vlp.encoders.dall_e`). Without it: model.mim=RandomCodes() or Pixels().
Commands: accelerate launch --config_file launch/gpu8.yaml -m vlp.train configs/mim/beit_base.py
          vlp eval runs/mim-beit-base probe data=IMAGENET
Hardware: 16 GPUs, about five days (the paper's own figure, 32 GB V100). Not run here.
Goal:     83.2 % top-1 of ImageNet-1k after fine-tuning, 56.7 % by a linear probe on a middle layer (the paper's numbers as
          recalled; look them up before citing).
"""

from vlp.config import Data, Experiment, Logging, Saving, Training
from vlp.data.augment import ColourDistortion, RandomResizedCrop
from vlp.data.shards import Source
from vlp.encoders.dall_e import DallE
from vlp.encoders.image import TimmImage
from vlp.models.single import Single
from vlp.objectives.mim import MaskedImage
from vlp.optim.optimizers import AdamW
from vlp.optim.schedule import Schedule


def config() -> Experiment:
    return Experiment(
        name="mim-beit-base",
        model=Single(
            image=TimmImage("beit_base_patch16_224", drop_path=0.1), mim=DallE(weights="weights/dall_e_encoder.pt")
        ),
        objectives={"mim": MaskedImage()},
        data=Data(
            train=(Source("data/imagenet/train"),),
            batch_size=2048,
            augment=RandomResizedCrop(
                scale=(0.08, 1.0), flip=0.5, then=(ColourDistortion(0.5, probability=1.0, greyscale=0.0),)
            ),
            workers=8,
        ),
        optim=AdamW(lr=1.5e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.05),
        schedule=Schedule(warmup_steps=6250, kind="cosine", final_fraction=1e-5 / 1.5e-3),
        train=Training(steps=500_000, precision="bf16", clip_norm=3.0),
        save=Saving(every=5000, keep=2),
        log=Logging(geometry_every=0),
    )
