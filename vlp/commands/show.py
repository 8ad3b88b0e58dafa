"""``vlp show``: print the experiment that a config defines."""

from __future__ import annotations

import argparse
import sys

from vlp.files import local_path


def add_parser(commands) -> None:
    show = commands.add_parser(
        "show",
        help="print the experiment of a config with every value, resolved",
        epilog="example: vlp show configs/align/demo.py data.batch_size=128",
    )
    show.add_argument("config", help="a Python config, FILE.py:NAME for another function of it, or an experiment.json")
    show.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. data.batch_size=256 optim.lr=5e-4")
    show.add_argument("--json", action="store_true", help="print the JSON that a run folder stores")
    show.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    from vlp.config import Experiment, load_config, load_without_code
    from vlp.errors import UserError
    from vlp.specs.json import dump
    from vlp.specs.overrides import override
    from vlp.specs.text import to_text
    from vlp.sweeps.ablation import Ablation
    from vlp.sweeps.stages import Stages

    if options.config.endswith(".json"):
        spec = override(load_without_code(local_path(options.config)), options.overrides)
    else:
        spec = load_config(options.config, Experiment, Stages, Ablation)
        # the later of two stages can be resolved when the earlier one is trained
        if isinstance(spec, Experiment):
            spec = override(spec, options.overrides)
            try:
                spec = spec.resolved()
            except UserError as e:
                print(f"vlp: shown as written, not resolved: {e}", file=sys.stderr)
        else:
            spec = spec.overridden(options.overrides)
    print(dump(spec) if options.json else to_text(spec))
    return 0
