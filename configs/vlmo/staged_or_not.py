"""What the first two stages of VLMo are worth: all three, the third alone, and ALBEF, for the same total time.

Paper:    Bao et al. 2022, arXiv:2111.02358, table 6: stagewise pre-training against vision-language pre-training from scratch.
          Li et al. 2021, arXiv:2107.07651: two towers with fusion on top, queues, and distillation from a momentum encoder.
Data:     that of stage1_images.py, stage2_text.py and stage3_pairs.py; retrieval on Flickr8k's val.
Start:    random weights, all three. VLMo has 11.3 M parameters, ALBEF 11.4 M: a ViT of 12 layers of 192 in patches of 16, three layers
          of 136 that read the text and three that fuse it.
Commands: vlp ablate configs/vlmo/staged_or_not.py
Hardware: 1 CPU core, about 10 minutes for a seed of a variant.
Measured: mean recall of both ways over 3 seeds, chance 0.53 %: three stages 1.6 % ± 0.1, pairs alone 1.1 % ± 0.1, ALBEF 0.6 % ± 0.1, in 11.4,
          10.1 and 9.1 minutes beside other work; staged_or_not.png.
Differs from the paper: there both see the same pairs, and the stages before come on top; here the time is the same.
"""

from dataclasses import replace
from pathlib import Path

from vlp.config import load_config
from vlp.encoders.fusion import Fusion
from vlp.encoders.image import TimmImage
from vlp.encoders.text import BertText
from vlp.models.albef import Albef
from vlp.objectives.itc import MomentumContrast
from vlp.objectives.itm import ImageTextMatching
from vlp.objectives.mlm import MaskedText
from vlp.optim.ema import MomentumConfig
from vlp.specs.overrides import override
from vlp.sweeps.ablation import Ablation
from vlp.sweeps.stages import Stages

SIZES = {
    "model_type": "bert",
    "vocab_size": 30522,
    "hidden_size": 136,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 544,
    "max_position_embeddings": 40,
}


def config() -> Ablation:
    staged = load_config(str(Path(__file__).with_name("stages.py")), Stages)
    pairs = staged.stages["3-pairs"]
    alone = replace(pairs, model=replace(pairs.model, weights=None, vl_start="weights"))
    albef = replace(
        pairs,
        model=Albef(
            image=TimmImage("vit_tiny_patch16_224", image_size=96, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)),
            text=BertText(config=SIZES, dropout=0.0),
            fusion=Fusion(layers=3),
            embed_size=192,
            temperature=0.07,
        ),
        objectives={
            "itc": MomentumContrast(queue_size=2048, distill=0.4, ramp_epochs=4.0),
            "itm": ImageTextMatching(),
            "mlm": MaskedText(distill=0.4, ramp_epochs=4.0),
        },
        momentum=MomentumConfig(decay=0.99, mode="train"),
    )
    return Ablation(
        name="vlmo-staged-or-not",
        variants={
            "VLMo, three stages": staged,
            "VLMo, pairs alone": override(alone, ["train.steps=330"]),
            "ALBEF, pairs alone": override(albef, ["train.steps=355"]),
        },
        metrics=("retrieval/mean_recall", "retrieval/mean_r@1", "retrieval/mean_r@10"),
        seeds=(0, 1, 2),
    )
