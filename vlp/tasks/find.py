"""Find a task by its name, or in a user's file or module.

Importing this module is quick: the names are read from the sources of vlp/tasks, where a task is a class that sets ``name``.
"""

from __future__ import annotations

import ast
import importlib
import sys
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from vlp.errors import UserError
from vlp.files import local_path, relative_to
from vlp.specs.config_file import load_module
from vlp.specs.overrides import suggest

if TYPE_CHECKING:
    from vlp.tasks.base import Task


@cache
def shipped_tasks() -> dict[str, tuple[str, str]]:
    """Return the module and class of each task in vlp/tasks by its name, without importing them."""
    found = {}
    for path in sorted(Path(__file__).parent.glob("*.py")):
        classes = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.ClassDef)]
        for node in classes:
            for line in node.body:
                match line:
                    case ast.Assign(targets=[ast.Name(id="name")], value=ast.Constant(value=str(name))):
                        found[name] = (f"{__package__}.{path.stem}", node.name)
    return found


def find_task(name: str, own: Iterable[str] = ()) -> type[Task]:
    """Return the class of a task.

    Args:
        name: Name of a task in vlp/tasks, ``path/to/file.py:Class``, or ``module:Class`` of an importable module.
        own: Further names that the message about an unknown name may suggest.

    Raises:
        UserError: if there is no such task, or the file cannot be imported.
    """
    shipped = shipped_tasks()
    if name in shipped:
        module, class_name = importlib.import_module(shipped[name][0]), shipped[name][1]
    elif ":" not in name:
        raise UserError(
            f"there is no task {name!r}{suggest(name, [*own, *shipped])}; a task of yours is given as file.py:Class"
        )
    else:
        where, _, class_name = name.rpartition(":")
        module = _import(where)
    from vlp.tasks.base import Task  # here, since it imports torch

    cls = vars(module).get(class_name)
    if not isinstance(cls, type) or not issubclass(cls, Task):
        tasks = [n for n, c in vars(module).items() if isinstance(c, type) and issubclass(c, Task) and c is not Task]
        raise UserError(
            f"{name} is not a subclass of vlp.tasks.base.Task; {module.__name__} has {', '.join(tasks) or 'no task'}"
        )
    return cls


def _import(where: str) -> ModuleType:
    try:
        if where.endswith(".py"):
            file = local_path(where)
            if not file.is_file():
                raise UserError(f"no file {where}{relative_to(file)}; give file.py:Class")
            return load_module(file)
        sys.path.insert(0, "")  # modules of the working directory
        return importlib.import_module(where)
    except ImportError as e:
        raise UserError(f"cannot import {where}: {e}") from None
