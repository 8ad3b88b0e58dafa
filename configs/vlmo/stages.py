"""VLMo, small, from nothing: the three stages one after the other, each from the weights of the one before.

Paper:    Bao et al. 2022, arXiv:2111.02358, fig. 3. No public code has all three: the first is a download there.
Data:     that of stage1_images.py, stage2_text.py and stage3_pairs.py, whose docstrings have the commands that make it.
Commands: vlp train configs/vlmo/stages.py
          vlp train configs/vlmo/stages.py stages.1.train.steps=2000 stages.3-pairs.optim.lr=1e-3 name=vlmo-longer
          the same again goes on where it was stopped
Hardware: 2 CPU cores.
Measured: see staged_or_not.py, which runs this over three seeds.
"""

from pathlib import Path

from vlp.config import load_config
from vlp.sweeps.stages import Stages

HERE = Path(__file__).parent


def config() -> Stages:
    stages = [load_config(str(HERE / f"{file}.py")) for file in ("stage1_images", "stage2_text", "stage3_pairs")]
    return Stages(name="vlmo-small", stages={stage.name: stage for stage in stages})
