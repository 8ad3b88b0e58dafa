"""Imports between the folders of vlp point one way, and importing one part does not load the rest."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# A folder or module imports only from those after it.
ORDER = (
    "cli",
    "commands",
    "sweeps",
    "report",
    "testing",
    "planning",
    "train",
    "training",
    "loading",
    "tasks",
    "objectives",
    "config",
    "forward",
    "models",
    "encoders",
    "weights",
    "optim",
    "data",
    "losses",
    "distributed",
    "specs",
    "files",
    "types",
    "errors",
)


def modules() -> dict[str, Path]:
    found = {}
    for path in sorted((ROOT / "vlp").rglob("*.py")):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        found[name.removesuffix(".__init__")] = path
    return found


def imports() -> dict[str, set[str]]:
    """Module -> the modules of vlp that it imports anywhere: at the top, in a function, or for type hints."""
    known, found = modules(), defaultdict(set)
    for name, path in known.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "vlp":
                for alias in node.names:
                    inner = f"{node.module}.{alias.name}"
                    found[name].add(inner if inner in known else node.module)
            elif isinstance(node, ast.Import):
                found[name] |= {alias.name for alias in node.names if alias.name.split(".")[0] == "vlp"}
    return found


def part(module: str) -> str:
    return module.split(".")[1] if "." in module else "vlp"


def test_arrows_point_one_way():
    wrong = [
        f"{module} imports {imported}"
        for module, targets in imports().items()
        for imported in targets
        if part(module) != part(imported) and part(imported) != "vlp" and part(module) != "vlp"
        if ORDER.index(part(module)) >= ORDER.index(part(imported))
    ]
    assert not wrong


def test_no_import_cycle_between_modules():
    arrows = {module: {t for t in targets if t != "vlp"} for module, targets in imports().items()}
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join([*path, module])
        if module not in done:
            for target in arrows.get(module, ()):
                visit(target, (*path, module))
            done.add(module)

    for module in arrows:
        visit(module, ())


def test_at_most_ten_modules_at_the_top():
    assert len(list((ROOT / "vlp").glob("*.py"))) <= 10


def test_forward_loads_at_most_eight_modules():
    code = "import sys, vlp.forward; print(*(m for m in sys.modules if m.split('.')[0] == 'vlp'))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert len(loaded.stdout.split()) <= 8, loaded.stdout
