"""What can be said against an experiment before anything is built or written."""

from __future__ import annotations

import json
import math
import types
import typing
from dataclasses import fields, is_dataclass
from typing import Any, Literal

from vlp import grad_cache, per_loss
from vlp.config import Experiment, describe_type, dump, from_plain
from vlp.errors import UserError
from vlp.logging import require

# dotted key -> smallest and largest value; None (the setting is off) passes
LIMITS = {
    "data.batch_size": (1, math.inf),
    "data.max_length": (2, math.inf),  # [CLS] and a token
    "data.workers": (0, math.inf),
    "data.max_bad_fraction": (0, 1),
    "train.accumulation": (1, math.inf),
    "train.clip_norm": (1e-12, math.inf),
    "train.ema_decay": (0, 1),
    "train.threads": (1, math.inf),
    "momentum.decay": (0, 1),
    "model.embed_size": (1, math.inf),
    "optim.lr": (0, math.inf),
    "optim.eps": (0, math.inf),
    "optim.weight_decay": (0, math.inf),
    "seed": (0, math.inf),
    "evaluate_every": (0, math.inf),
    "save.every": (1, math.inf),
    "save.keep": (1, math.inf),
    "log.geometry_every": (0, math.inf),
}
# fields of tasks, and of `vlp.opening.Opening`, by name: what they mean is the same wherever they are
OF_TASKS = {
    "batch_size": (1, math.inf),
    "beams": (1, math.inf),
    "examples": (0, math.inf),
    "head_width": (1, math.inf),
    "image_size": (1, math.inf),
    "k": (1, math.inf),
    "max_answer": (1, math.inf),
    "max_length": (2, math.inf),
    "questions": (1, math.inf),
    "resamples": (0, math.inf),
    "text_batch": (1, math.inf),
    "workers": (0, math.inf),
}


def validate(experiment: Experiment) -> None:
    """Raises UserError for values of a wrong type, out of range, or that do not go together."""
    check_types(experiment)
    _check_json(experiment)
    for key, (least, most) in LIMITS.items():
        value: Any = experiment
        for name in key.split("."):
            value = getattr(value, name, None)
        _within(key, value, least, most)
    for beta in getattr(experiment.optim, "betas", ()):
        if not 0 <= beta < 1:
            raise UserError(f"optim.betas has {beta}; give numbers from 0 to below 1")
    if not experiment.name:
        raise UserError("the run has no name; set name=NAME, which its folder gets")
    data, train = experiment.data, experiment.train
    if data.batch_size % train.accumulation:
        raise UserError(
            f"data.batch_size={data.batch_size} is not a multiple of train.accumulation={train.accumulation}"
        )
    if not data.train:
        raise UserError("data.train names no data; set data.train=SHARDS")
    if not experiment.objectives:
        raise UserError("the experiment has no objective; add one to objectives")
    objectives = list(experiment.objectives.values())
    if any(a == b for n, a in enumerate(objectives) for b in objectives[:n]):
        raise UserError("objectives has the same objective twice; give it once, with the weight of both")
    for objective in objectives:
        if hasattr(objective, "check"):
            objective.check(experiment)
    if train.backward == "per_loss":
        per_loss.check(experiment)
    if train.grad_cache:
        grad_cache.check(experiment)
    if train.mix:
        train.mix.check(experiment)
    for name, task in experiment.evaluate.items():
        if not callable(task):
            raise UserError(f"evaluate.{name} is not a task; the tasks are in vlp.tasks")
        check_limits(task, f"evaluate.{name}.")
    best = experiment.save.best
    if best is not None and best.split("/")[0] not in experiment.evaluate:
        raise UserError(
            f"save.best={best!r} names no task of evaluate ({', '.join(experiment.evaluate) or 'there is none'})"
        )
    require(experiment.log)


def _within(key: str, value: Any, least: float, most: float) -> None:
    if value is not None and not least <= value <= most:
        raise UserError(
            f"{key} is {value}; set it to {f'at least {least:g}' if value < least else f'at most {most:g}'}"
        )


def check_limits(task: Any, prefix: str = "") -> None:
    """Raises UserError for the first field of a task, or of an `Opening`, that is out of `OF_TASKS`' range or an empty list."""
    for field in fields(task) if is_dataclass(task) else ():
        value = getattr(task, field.name)
        if field.name in OF_TASKS:
            _within(prefix + field.name, value, *OF_TASKS[field.name])
        if field.name == "ks" and not (value and min(value) >= 1):
            raise UserError(f"{prefix}ks is {value}; give one rank or more, each at least 1")


def check_types(value: Any, key: str = "") -> None:
    """Raises UserError for the first field, at any depth, whose value is not of the type that it is declared with."""
    if is_dataclass(value):
        hints = typing.get_type_hints(type(value))
        for field in fields(value):
            inner, name = getattr(value, field.name), f"{key}.{field.name}".lstrip(".")
            if not fits(inner, hints[field.name]):
                raise UserError(f"{name} is {inner!r}; it takes {describe_type(hints[field.name])}")
            check_types(inner, name)
    elif isinstance(value, (dict, tuple)):
        for name, inner in value.items() if isinstance(value, dict) else enumerate(value):
            check_types(inner, f"{key}.{name}")


def fits(value: Any, hint: Any) -> bool:
    """Whether ``value`` is of the type; a whole number is also a number, but true and false are neither."""
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return True
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, option) for option in options)
    if origin is Literal:
        return value in options
    if origin is tuple:
        each = options[:1] * len(value) if options[-1] is ... and isinstance(value, tuple) else options
        return isinstance(value, tuple) and len(value) == len(each) and all(map(fits, value, each))
    if origin is dict:
        return isinstance(value, dict) and all(fits(k, options[0]) and fits(v, options[1]) for k, v in value.items())
    if hint in (int, float):
        return isinstance(value, (int, hint)) and not isinstance(value, bool)
    return isinstance(value, hint)


def _check_json(experiment: Experiment) -> None:
    """A run is rebuilt from its experiment.json, so that must hold everything."""
    try:
        from_plain(json.loads(dump(experiment)))
    except TypeError as e:
        raise UserError(f"the experiment cannot be kept as JSON ({e}); use numbers, texts, tuples and dicts") from None
