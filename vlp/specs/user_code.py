"""A user's own code in an experiment: which classes it brings, and which files to keep with the run.

An experiment.json names its types. The types of vlp are imported from a fixed table. Any other class, such as an
objective that is defined next to the config, is code that somebody wrote, and opening a folder must not run it. So it
comes from a config that the user names on the command line, or, if the user says that the folder can be trusted, from
the copy that the run folder keeps in ``code/``.
"""

from __future__ import annotations

import importlib
import sys
import sysconfig
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, is_dataclass
from pathlib import Path
from typing import Any

from vlp.errors import UserError
from vlp.specs.config_file import call_config, split_name
from vlp.specs.fields import field_values
from vlp.specs.json import read_plain
from vlp.specs.names import is_own, name_of


@dataclass(frozen=True)
class UserCode:
    """The user's own code of an experiment.

    Args:
        types: Name in experiment.json -> class, of the user's own types.
        folder: Folder that the modules were imported from. None if the experiment has no code of its own.
        options: Command-line options with which a command can read the run again.
    """

    types: Mapping[str, type] = field(default_factory=dict)
    folder: Path | None = None
    options: tuple[str, ...] = ()

    def files(self) -> dict[str, Path]:
        """Return the imported modules of ``folder``: path under ``RUN/code/`` -> file."""
        if self.folder is None:
            return {}
        installed = [Path(sysconfig.get_path(name)).resolve() for name in ("stdlib", "purelib", "platlib")]
        found = {}
        for name, module in list(sys.modules.items()):
            file = vars(module).get("__file__")
            if not file or not file.endswith(".py") or name == "__main__" or name.partition(".")[0] == "vlp":
                continue
            path = Path(file).resolve()
            if path.is_relative_to(self.folder) and not any(map(path.is_relative_to, installed)):
                inside = name.replace(".", "/")
                found[f"{inside}/__init__.py" if path.name == "__init__.py" else f"{inside}.py"] = path
        return found


NO_CODE = UserCode()


def code_of_config(config: str, spec: Any = None) -> UserCode:
    """Return the code of a config that the user has named.

    Args:
        config: ``FILE.py`` or ``FILE.py:NAME``.
        spec: Result of the config, if it has been loaded already.

    Raises:
        UserError: If the config cannot be loaded.
    """
    if spec is None:
        spec = call_config(config, (object,))
    types = own_types(spec)
    return UserCode(types, split_name(config)[0].resolve().parent, ("--config", config) if types else ())


def code_of_run(experiment_json: Path) -> UserCode:
    """Import the user's own types of a run from the copy in its folder, which the user has said to trust.

    Raises:
        UserError: If a type cannot be imported.
    """
    folder = experiment_json.resolve().parent / "code"
    names = sorted({name for name in _type_names(read_plain(experiment_json)) if is_own(name)})
    sys.path.insert(0, str(folder))
    return UserCode({name: _import(name, folder) for name in names}, folder, ("--trust-code",))


def own_types(spec: Any) -> dict[str, type]:
    """Return the classes outside vlp of a spec and of the specs in it, by their name in experiment.json.

    Raises:
        UserError: For a class that is defined inside a function, which no name leads back to.
    """
    if isinstance(spec, (dict, tuple, list)):
        inner = spec.values() if isinstance(spec, dict) else spec
        return {name: cls for item in inner for name, cls in own_types(item).items()}
    if not is_dataclass(spec):
        return {}
    cls = type(spec)
    if "<locals>" in cls.__qualname__:
        raise UserError(f"{cls.__name__} is defined inside a function; move it to the top of its module")
    return ({name_of(cls): cls} if is_own(name_of(cls)) else {}) | own_types(field_values(spec))


def _type_names(plain: Any) -> Iterator[str]:
    if isinstance(plain, (dict, list)):
        if isinstance(plain, dict) and isinstance(plain.get("type"), str):
            yield plain["type"]
        for item in plain.values() if isinstance(plain, dict) else plain:
            yield from _type_names(item)


def _import(name: str, folder: Path) -> type:
    module, _, qualname = name.rpartition(":")
    try:
        cls: Any = importlib.import_module(module)
        for part in qualname.split("."):
            cls = vars(cls)[part]
    except (ImportError, KeyError, ValueError) as e:
        raise UserError(f"{name} cannot be imported, also not from {folder} ({e}); give --config CONFIG.py") from None
    if not isinstance(cls, type) or not is_dataclass(cls):
        raise UserError(f"the experiment names {name}, which is not a dataclass; the file was altered")
    return cls
