"""``vlp train``: train an experiment or stages, or continue a run."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from dataclasses import replace
from typing import TYPE_CHECKING

from vlp.commands.code import add_code_options, read_code
from vlp.errors import UserError
from vlp.files import local_path

if TYPE_CHECKING:
    from vlp.config import Experiment


def add_parser(commands) -> None:
    train = commands.add_parser(
        "train",
        help="train an experiment, or continue a run",
        epilog="example: vlp train configs/align/demo.py name=mine data.batch_size=128",
    )
    train.add_argument(
        "config", nargs="?", help="a Python config, FILE.py:NAME for another function of it, or an experiment.json"
    )
    train.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. data.batch_size=256 optim.lr=5e-4")
    train.add_argument(
        "--resume", metavar="RUN", help="continue this run folder, or its copy at a URL, where it stopped"
    )
    add_code_options(train)
    train.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    # argparse reads the first override as the config if --resume comes without a config
    config, overrides = options.config, options.overrides
    if config and "=" in config:
        config, overrides = None, [config, *overrides]
    if options.resume is not None:
        return resume(options, options.resume, config, overrides)
    if config is None:
        raise UserError("give a config to train, e.g. vlp train configs/align/demo.py, or --resume RUN")
    return start(options, config, overrides)


def start(options: argparse.Namespace, config: str, overrides: list[str]) -> int:
    from vlp.config import Experiment
    from vlp.specs.overrides import override
    from vlp.sweeps.stages import Stages, train_stages
    from vlp.train import train

    spec, code = load(options, config, Experiment, Stages)
    if isinstance(spec, Experiment):
        experiment = override(spec, overrides)
        if config.endswith(".json"):
            check_commands(experiment, overrides, options.trust_code)
        return train(experiment, code=code)
    train_stages(spec.overridden(overrides), shlex.join(["vlp", "train", config, *overrides]), code=code)
    return 0


def resume(options: argparse.Namespace, name: str, config: str | None, overrides: list[str]) -> int:
    from vlp.config import CHECKED_ON_RESUME, Experiment, changed_keys, load_json
    from vlp.specs.overrides import override
    from vlp.train import train
    from vlp.training.store import check_url, fetch_run, is_url

    # a run at a URL is copied back to where it came from
    copy_to = check_url(name, "--resume").rpartition("/")[0] if is_url(name) else None
    if copy_to is not None:
        output = next((text.partition("=")[2] for text in overrides if text.startswith("output=")), "runs")
        folder = fetch_run(name, local_path(output))
    else:
        folder = local_path(name)
    if folder.name in ("", ".."):  # of --resume . and the like, which would be a run without a name
        folder = folder.resolve()
    given, code = load(options, config, Experiment) if config else (None, read_code(options, folder))
    saved = load_json(folder / "experiment.json", code.types)
    saved = with_copy_to(replace(saved, name=folder.name, output=str(folder.parent)), copy_to)
    if given is not None and copy_to is not None:
        given = with_copy_to(given, copy_to)
    wanted = with_weights_of(saved, override(given.resolved() if given else saved, overrides))
    if given is None or config.endswith(".json"):
        check_commands(wanted, overrides, options.trust_code)
    if changed := [key for key in changed_keys(saved, wanted) if not CHECKED_ON_RESUME.fullmatch(key)]:
        raise UserError(
            f"{folder} was started with other values of {', '.join(changed[:8])}"
            f"{f' and {len(changed) - 8} more' if len(changed) > 8 else ''}; resume without changing them, "
            f"or start a new run with another name=..."
        )
    return train(replace(wanted, name=folder.name, output=str(folder.parent)), resume=True, code=code)


def with_copy_to(experiment: Experiment, url: str | None) -> Experiment:
    """Return the experiment of a JSON file with another ``save.copy_to``.

    A folder that somebody sent must not cause uploads, so its own value counts only where the user names it again.
    """
    before = experiment.save.copy_to
    if before and before != url and int(os.environ.get("RANK", 0)) == 0:
        print(
            f"vlp: save.copy_to={before!r} of the experiment.json is not used; name it again to copy", file=sys.stderr
        )
    return replace(experiment, save=replace(experiment.save, copy_to=url))


def check_commands(experiment: Experiment, overrides: list[str], trusted: bool) -> None:
    """Check that the user has named the shell commands that an experiment of a JSON file reads its data from.

    A folder that somebody sent must not run commands on this machine.

    Args:
        overrides: Assignments of the command line.
        trusted: Whether the user has said that the file can be trusted.

    Raises:
        UserError: If not.
    """
    stream = experiment.data.stream
    named = {text.partition("=")[0] for text in overrides} & {"data.train", "data.train.0.urls"}
    if stream is not None and stream.has_commands and not trusted and not named:
        raise UserError(
            f"the experiment.json runs the shell command {stream.urls[:200]!r} to read its data; name it again with "
            "data.train.0.urls=URLS to run it, or give --trust-code if you trust the file"
        )


def with_weights_of(saved: Experiment, wanted: Experiment) -> Experiment:
    """Return ``wanted`` with the weights of the saved sources, which ``data.train=NEW`` drops."""
    sources, before = wanted.data.train, saved.data.train
    if len(sources) == len(before):
        pairs = zip(sources, before)
        dropped = lambda new, old: new.weight is None and old.weight is not None  # noqa: E731
        sources = tuple(replace(new, weight=old.weight) if dropped(new, old) else new for new, old in pairs)
    return replace(wanted, data=replace(wanted.data, train=sources))


def load(options: argparse.Namespace, config: str, *kinds: type):
    """Return the spec that a config defines, and the user's own code in it.

    Raises:
        UserError: If the config cannot be loaded, or is a Python file and the options name other code.
    """
    from vlp.config import load_config
    from vlp.specs.user_code import code_of_config

    if config.endswith(".json"):
        code = read_code(options, local_path(config).parent)
        return with_copy_to(load_config(config, own_types=code.types), None), code
    if options.code_config or options.trust_code:
        raise UserError(f"{config} has its classes itself; leave out --config and --trust-code")
    spec = load_config(config, *kinds)
    return spec, code_of_config(config, spec)
