"""Load a Python config file as a module and call one of its functions.

The file is imported under its stem with its folder on ``sys.path``, as Python does with a script. So a config can import
the modules next to it, and a class defined in the config file itself can be pickled to data workers.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import inspect
import re
import sys
import sysconfig
import traceback
from collections.abc import Callable, Sequence
from dataclasses import is_dataclass
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import Any

from vlp.errors import UserError
from vlp.files import local_path
from vlp.specs.overrides import suggest
from vlp.specs.types import is_decorated


class ConfigLoader(SourceFileLoader):
    """Compile a config from its source each time. A bytecode cache would miss a second edit within one second."""

    def path_stats(self, path):
        raise OSError


def split_name(config: str) -> tuple[Path, str]:
    """Split ``FILE.py:NAME`` into the file and the function's name. The default name is ``config``."""
    path, colon, name = config.rpartition(":")
    whole = local_path(config)
    return (local_path(path), name) if colon and not whole.exists() else (whole, "config")


def load_module(path: Path) -> ModuleType:
    """Import a config file under its stem and put its folder on ``sys.path``.

    Raises:
        UserError: If the file has a syntax error, an import of it fails, or its name is that of an imported module.
    """
    name, folder = path.stem, str(path.resolve().parent)
    known = sys.modules.get(name)
    if known is not None and not isinstance(known.__loader__, ConfigLoader):
        file = vars(known).get("__file__")  # a built-in module has none
        if file and Path(file).resolve() == path.resolve():  # another config has imported it
            return known
        raise UserError(f"{path}: Python has imported another module of the name {name}; rename the file")
    if folder not in sys.path:
        sys.path.insert(0, folder)
    spec = importlib.util.spec_from_file_location(name, path, loader=ConfigLoader(name, str(path.resolve())))
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except (SyntaxError, ImportError) as e:
        del sys.modules[name]
        raise UserError(f"{path}: {e}") from None
    except BaseException:
        del sys.modules[name]
        raise
    return module


def call_config(config: str, kinds: Sequence[type]) -> Any:
    """Return the result of the function that ``FILE.py:NAME`` names.

    Args:
        config: Config file, and the name of a function in it if that is not ``config``.
        kinds: Classes of which the result must be an instance.

    Raises:
        UserError: If there is no such file or function, the function passes an unknown field to a spec, or its result is
            of another class.
    """
    path, name = split_name(config)
    if not path.is_file():
        raise UserError(f"no config file {path}; `vlp configs` lists the ones that come with vlp")
    try:
        module = load_module(path)
        function = vars(module).get(name)
        if not callable(function):
            names = _config_functions(module, kinds)
            there = f"; it has {', '.join(names)}" if names else f"; it must return a {_names(kinds)}"
            raise UserError(f"{path} does not define {name}(){there}")
        if needed := _required(function):
            raise UserError(f"{name}() of {path} needs {', '.join(needed)}; name a function that takes no arguments")
        result = function()
    except UserError:
        raise
    except Exception as e:
        raise UserError(f"{path}: {_explain(e)}") from e
    if not isinstance(result, tuple(kinds)):
        raise UserError(
            f"{name}() of {path} returns a {type(result).__name__}, not a {_names(kinds)}; an Experiment or Stages are for "
            f"vlp train, an Ablation for vlp ablate"
        )
    return result


def _config_functions(module: ModuleType, kinds: Sequence[type]) -> list[str]:
    """Return the names of the functions defined in ``module`` that are annotated to return one of ``kinds``."""
    found = []
    for name, value in vars(module).items():
        if inspect.isfunction(value) and value.__module__ == module.__name__:
            annotation = value.__annotations__.get("return")
            text = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
            if text.rpartition(".")[2] in [kind.__name__ for kind in kinds]:
                found.append(name)
    return found


def _required(function: Callable) -> list[str]:
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    parameters = inspect.signature(function).parameters.values()
    return [p.name for p in parameters if p.default is p.empty and p.kind not in variadic]


def _names(kinds: Sequence[type]) -> str:
    return " or ".join(f"{kind.__module__}.{kind.__qualname__}" for kind in kinds)


def _user_line(error: Exception) -> str:
    """Return the innermost line of the traceback outside of vlp and of installed packages, as FILE:LINE in FUNCTION."""
    installed = [Path(sysconfig.get_path(name)).resolve() for name in ("stdlib", "purelib", "platlib")]
    others = [Path(__file__).resolve().parents[1], *installed]
    frames = [f for f in traceback.extract_tb(error.__traceback__) if Path(f.filename).is_file()]
    own = [f for f in frames if not any(map(Path(f.filename).resolve().is_relative_to, others))]
    frame = (own or frames)[-1]
    return f"{frame.filename}:{frame.lineno} in {frame.name}: {frame.line}"


def _explain(error: Exception) -> str:
    """Return a message for a wrong or missing keyword of a dataclass, or the error with its line in the user's code."""
    found = re.match(r"(\w+)\.__init__\(\) (got an unexpected keyword argument '(\w+)'|missing .*)", str(error))
    caller = inspect.getinnerframes(error.__traceback__)[-1].frame
    called = {**caller.f_globals, **caller.f_locals}.get(found[1]) if found else None
    if not found or not inspect.isclass(called) or not is_dataclass(called):
        message = " ".join(str(error).split())
        return f"{type(error).__name__}: {message[:300]} ({_user_line(error)})"
    if found[3] is None:
        return f"{found[1]}: {found[2]}"
    if not is_decorated(called):
        return f"{found[1]} has fields of its own; write @dataclass(frozen=True) above its class"
    return f"{found[1]} has no field {found[3]!r}{suggest(found[3], [f.name for f in dataclasses.fields(called)])}"
