"""What the first two stages of VLMo are worth: all three against the third alone, for the same total time.

Paper:    Bao et al. 2022, arXiv:2111.02358, table 6: stagewise pre-training against vision-language pre-training from scratch.
Data:     that of stage1_images.py, stage2_text.py and stage3_pairs.py; retrieval on Flickr8k's val.
Commands: vlp ablate configs/vlmo/staged_or_not.py
Hardware: 2 CPU cores; a seed of a variant takes about 13 minutes of one core: 4 + 3 + 6 or 13 (by CPU seconds a step: 0.25 for
          pictures, 0.37 for texts, 1.80 for pairs).
Measured: nothing yet.
Differs from the paper: there both see the same pairs, and the stages before come on top; here the time is the same.
"""

from dataclasses import replace
from pathlib import Path

from vlp.ablation import Ablation
from vlp.config import load_config, override
from vlp.stages import Stages


def config() -> Ablation:
    staged = load_config(str(Path(__file__).with_name("stages.py")), Stages)
    pairs = staged.stages["3-pairs"]
    alone = replace(pairs, model=replace(pairs.model, weights=None, vl_start="weights"))
    return Ablation(
        name="vlmo-staged-or-not",
        variants={"three stages": staged, "pairs alone": override(alone, ["train.steps=440"])},
        metrics=("retrieval/mean_recall", "retrieval/mean_r@1", "retrieval/mean_r@10"),
        seeds=(0, 1, 2),
    )
