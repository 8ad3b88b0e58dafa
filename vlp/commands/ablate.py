"""``vlp ablate``: train the variants of an ablation over seeds and tabulate their metrics."""

from __future__ import annotations

import argparse
import shlex


def add_parser(commands) -> None:
    parser = commands.add_parser(
        "ablate",
        help="train variants over seeds, and tabulate what each change is worth",
        epilog="example: vlp ablate configs/albef/world.py:table1 seeds=0,1,2",
    )
    parser.add_argument("config", help="a Python config, or FILE.py:NAME, that returns a vlp.sweeps.ablation.Ablation")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. seeds=0,1 train.steps=100")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    from vlp.specs.user_code import code_of_config
    from vlp.sweeps.ablation import ablate, load_ablation

    ablation = load_ablation(options.config, options.overrides)
    if not ablate(ablation, code=code_of_config(options.config, ablation)):
        print(f"stopped; continue with: {shlex.join(['vlp', 'ablate', options.config, *options.overrides])}")
        return 0
    print((ablation.folder / "table.md").read_text() + f"\n{ablation.folder}/table.md and plot.png")
    return 0
