"""``vlp eval``: evaluate a run or published weights with the run's own tasks, with a task of vlp, or with a user's task."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlp.commands.code import add_code_options, read_code
from vlp.errors import UserError
from vlp.files import local_path
from vlp.specs.names import NO_TYPES

if TYPE_CHECKING:
    from vlp.config import Experiment
    from vlp.tasks.base import Result, Task


def add_parser(commands) -> None:
    parser = commands.add_parser(
        "eval",
        help="evaluate a run or published weights",
        description="Evaluate a run or published weights. Without TASK, run the tasks that the run's experiment names.",
        epilog="example: vlp eval runs/demo retrieval data=shards/val; vlp eval RUN TASK --help lists the options of a task",
        add_help=False,
    )
    parser.add_argument(
        "model",
        metavar="RUN_OR_WEIGHTS",
        help="a run, or its copy at a URL; a file of ALBEF or VLMo weights; a transformers folder (CLIP, ALIGN, SigLIP); "
        "open_clip:NAME/TAG_OR_FILE",
    )
    parser.add_argument(
        "task",
        nargs="?",
        metavar="TASK",
        help="a task of the run's experiment, a task of vlp, file.py:Class or module:Class",
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="e.g. data=shards/val ks=1,5,10 tokenizer=bert-base-uncased/"
    )
    parser.add_argument(
        "--checkpoint", metavar="STEP", help="of a run: a step, 'best' or 'last' (default: best if there is one)"
    )
    parser.add_argument("-h", "--help", action=Help, nargs=0, help="show this help, or that of TASK, and exit")
    add_code_options(parser)
    parser.set_defaults(run=run)


class Help(argparse.Action):
    """Print the options of the task, or the help of the command where no task was given."""

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        from vlp.tasks.find import shipped_tasks

        model, name = namespace.model, namespace.task
        if name is None or "=" in name:
            parser.print_help()
            print(f"tasks of vlp: {', '.join(shipped_tasks())}")
            parser.exit()
        try:
            print(describe(name, described_tasks(model).get(name)))
        except UserError as e:
            parser.exit(2, f"vlp: {e}\n")
        parser.exit()


def run(options: argparse.Namespace) -> int:
    from dataclasses import replace

    from vlp.distributed import rank
    from vlp.loading.base import LoadOptions
    from vlp.loading.load_model import load_model
    from vlp.specs.fields import check_limits
    from vlp.specs.overrides import override
    from vlp.tasks.contamination import contaminated_images, has_training_data
    from vlp.tasks.naming import result_path
    from vlp.training.store import fetch_run, is_url

    if is_url(options.model):
        options.model = str(fetch_run(options.model, Path("runs")))
    name, assignments = options.task, options.overrides
    if name is not None and "=" in name:  # the task was left out
        name, assignments = None, [name, *assignments]
    # the earlier name of the option
    assignments = [f"allow_contamination={a[11:]}" if a.startswith("allow_leak=") else a for a in assignments]
    own_types = read_code(options, local_path(options.model)).types
    tasks, assignments = choose_tasks(options.model, name, assignments, own_types)
    load_options = override(LoadOptions(), assignments)
    for key, task in tasks.items():
        check_limits(task, key if name is None else "")
    check_limits(load_options)
    loaded = load_model(options.model, options.checkpoint, load_options, own_types)
    model = loaded.eval_model
    model.has_training_data = has_training_data(loaded.folder, model.data)
    for part, report in loaded.reports.items():
        print(f"{part} weights: {report or 'random'}")
    for task in tasks.values():
        task.validate(model.data)
    seen = {
        key: contaminated_images(task, model.data, load_options.allow_contamination)
        if model.has_training_data
        else None
        for key, task in tasks.items()
    }
    for key, task in tasks.items():
        result = replace(task(model), trained_on=seen[key])
        if rank() > 0:
            continue
        path = result_path(loaded.folder / "eval", key, result)
        try:
            result.write(path, model, loaded.step)
        except OSError as e:
            raise UserError(f"cannot write {path}: {e.strerror or e}; check the folder") from None
        show(result, loaded.step, model.checkpoint, path)
    return 0


def run_experiment(model: str, own_types: Mapping[str, type] = NO_TYPES) -> Experiment | None:
    """Return the experiment of a run, whose tasks have been checked. None for weights that are not a run's.

    Args:
        own_types: Classes outside vlp that the run's experiment.json may name: see `vlp.specs.user_code`.

    Raises:
        UserError: if the experiment is damaged, or a task has a name or a value that it may not have.
    """
    from vlp.weights.run import is_run

    if not is_run(model):
        return None
    from vlp.config import load_json
    from vlp.specs.types import check_types
    from vlp.tasks.base import Task
    from vlp.tasks.naming import check_task_names
    from vlp.tasks.submission import check_stored_tasks

    path = local_path(model) / "experiment.json"
    experiment = load_json(path, own_types)
    try:
        check_types(experiment)
        check_task_names(experiment.evaluate)
        for name, task in experiment.evaluate.items():
            if not isinstance(task, Task):
                raise UserError(f"evaluate.{name} is not a task")
        check_stored_tasks(experiment.evaluate)
    except UserError as e:
        raise UserError(f"{path}: {e}") from None
    return experiment


def described_tasks(model: str) -> dict[str, Any]:
    """Return the tasks of a run's experiment, with a `vlp.specs.json.Foreign` for each of a user's own type."""
    from vlp.weights.run import is_run

    if not is_run(model):
        return {}
    from vlp.config import load_without_code

    tasks = load_without_code(local_path(model) / "experiment.json").evaluate
    return tasks if isinstance(tasks, dict) else {}


def choose_tasks(
    model: str, name: str | None, assignments: list[str], own_types: Mapping[str, type] = NO_TYPES
) -> tuple[dict[str, Any], list[str]]:
    """Return the tasks by the names of their result files, and the assignments that are not for tasks.

    A name that the run's experiment gives to a task stands for that task with its settings there. Without a name, all of
    them are run, and an assignment for one of them begins with its name: ``retrieval.batch_size=8``.

    Raises:
        UserError: if there is no such task, or an assignment does not fit.
    """
    from vlp.loading.base import LoadOptions
    from vlp.specs.overrides import override, suggest
    from vlp.tasks.naming import result_name

    experiment = run_experiment(model, own_types)
    own = experiment.evaluate if experiment else {}
    for_loading = {field.name for field in fields(LoadOptions)}
    if name is None:
        if not own:
            raise UserError(f"{model} does not say what to evaluate; give a task, e.g. vlp eval {model} retrieval")
        heads = {text: text.partition("=")[0].split(".")[0] for text in assignments}
        for head in heads.values():
            if head not in own and head not in for_loading:
                raise UserError(f"{model} has no task {head!r} to set{suggest(head, [*own, *for_loading])}")
        for_tasks = [text for text in assignments if heads[text] in own]
        tasks = override(own, for_tasks)
        results = {}
        for key, task in tasks.items():
            given = [text.removeprefix(f"{key}.") for text in for_tasks if text.startswith(f"{key}.")]
            results[result_name(key, task, given, own[key])] = task
        return results, [text for text in assignments if text not in for_tasks]
    before = own[name] if name in own else default_task(name, own)
    # an option that both have, such as max_length, is the task's
    of_task = {field.name for field in fields(before)}
    for_loading -= of_task
    for_task = [text for text in assignments if text.partition("=")[0] not in for_loading]
    for text in for_task:
        head = text.partition("=")[0].split(".")[0]
        if "=" in text and head not in of_task:
            raise UserError(f"{name} has no option {head!r}{suggest(head, [*of_task, *for_loading])}")
    task = override(before, for_task)
    if missing := [option for option in required_options(type(task)) if vars(task)[option] is None]:
        raise UserError(f"{name} needs {missing[0]}; give {missing[0]}=...")
    key = result_name(name if name in own else task.name, task, for_task, before)
    return {key: task}, [text for text in assignments if text not in for_task]


def default_task(name: str, own: Iterable[str] = ()) -> Task:
    """Return a task with its defaults, and None for options that must be given.

    Args:
        own: Names of the run's tasks, which the message about an unknown name suggests.

    Raises:
        UserError: if there is no such task.
    """
    from vlp.tasks.find import find_task

    cls = find_task(name, own)
    if not is_dataclass(cls):
        raise UserError(f"{name} is not a dataclass, so that it has no options; decorate it with @dataclass")
    return cls(**dict.fromkeys(required_options(cls)))


def required_options(cls: type) -> list[str]:
    return [each.name for each in fields(cls) if each.default is MISSING and each.default_factory is MISSING]


def describe(name: str, own: Any = None) -> str:
    """Return the help text of a task: its docstring, and its options with their values and explanations.

    Args:
        own: The task with the settings of the run's experiment, where that names it.
    """
    import textwrap

    from vlp.loading.base import LoadOptions
    from vlp.specs.docstrings import field_docs, summary
    from vlp.specs.json import Foreign
    from vlp.tasks.find import find_task

    if isinstance(own, Foreign):  # its class, with the explanations, is code that help does not run
        values = [f"  {field}={shown(value)}" for field, value in own.fields.items()]
        usage = f"usage: vlp eval RUN_OR_WEIGHTS {name} [key=value ...]"
        return "\n".join([usage, "", f"{own.type}, as set in the run's experiment:", *values, ""])
    cls = type(own) if own is not None else find_task(name)
    lines = [f"usage: vlp eval RUN_OR_WEIGHTS {name} [key=value ...]", "", summary(cls), ""]
    task_options = fields(cls) if is_dataclass(cls) else ()
    for title, spec, declared in (
        ("options of the task" + (", as set in the run's experiment" if own is not None else ""), own, task_options),
        ("options of the model", None, fields(LoadOptions)),
    ):
        lines.append(f"{title}:")
        docs = field_docs(cls if declared is task_options else LoadOptions)
        for each in declared:
            value = shown(each.default if spec is None else vars(spec)[each.name])
            text = textwrap.fill(docs.get(each.name, ""), 110, initial_indent=" " * 6, subsequent_indent=" " * 6)
            lines += [f"  {each.name}={value}", *([text] if text else [])]
        lines.append("")
    return "\n".join(lines)


def shown(value: Any) -> str:
    """Return a default as it is typed on the command line, and (required) where there is none."""
    if value is MISSING:
        return "(required)"
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def show(result: Result, step: int | None, checkpoint: str, path: Path) -> None:
    """Print the metrics with their intervals, and how they were measured."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    counts = ", ".join(f"{n:,} {what}" for what, n in result.n.items())
    # Text, since brackets in the names of users' data and classes are not markup
    table = Table(title=Text(f"{result.task} on {result.data}: {counts}", style="table.title"))
    for column in ("metric", "value", "95 % interval", *(["blind"] if result.blind else [])):
        table.add_column(column)
    for metric, interval in result.metrics.items():
        value, low, high = interval.texts(digits=2)
        blind = [result.blind[metric].texts(digits=2)[0]] if metric in result.blind else []
        table.add_row(Text(metric), value, f"{low} to {high}", *blind)
    Console().print(table)
    print(f"protocol: {f'{result.name}: ' if result.name else ''}{result.protocol}")
    if result.blind:
        print("blind: the same with the images of other samples; the difference is what the model reads of the image")
    print(
        f"{'' if step is None else f'step {step}, '}weights {checkpoint[:16]}, "
        f"{f'{result.trained_on:,} of the images trained on, ' if result.trained_on else ''}"
        f"{len(result.bad)} skipped; written to {path}"
    )
