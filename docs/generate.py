"""MkDocs hook: write the reference pages from the docstrings of the spec dataclasses and of the configs."""

from __future__ import annotations

import ast
import importlib
import re
from dataclasses import MISSING, Field, fields, is_dataclass
from pathlib import Path

from mkdocs.structure.files import File

from vlp.commands.configs import read_entries, read_sections, read_summary
from vlp.commands.evaluate import shown
from vlp.specs.docstrings import field_docs, summary
from vlp.specs.names import MODULES

ROOT = Path(__file__).resolve().parents[1]
GROUPS = {  # part of a module's name -> heading
    "config": "Experiment",
    "data": "Data",
    "encoders": "Towers and other parts of models",
    "models": "Models",
    "objectives": "Objectives",
    "optim": "Optimization",
    "tasks": "Tasks",
}


def on_files(files, config):
    pages = {"reference/settings.md": settings(), "reference/experiments.md": experiments()}
    for name, text in pages.items():
        files.append(File.generated(config, name, content=text))
    return files


def settings() -> str:
    lines = [
        "# Settings",
        "",
        "Every class that a config can contain, with its fields. A field is set in the config file, or on the command line as "
        "`dotted.key=value`. `vlp eval RUN TASK --help` prints the options of a task.",
    ]
    for part, heading in GROUPS.items():
        lines += ["", f"## {heading}"]
        for module, names in MODULES.items():
            if module.split(".")[1] == part:
                for name in names:
                    lines += ["", *describe(vars(importlib.import_module(module))[name])]
    return "\n".join(lines)


def describe(cls: type) -> list[str]:
    docs = field_docs(cls)
    lines = [f"### {cls.__name__}", "", f"`{cls.__module__}.{cls.__name__}`", "", to_markdown(summary(cls)), ""]
    if fields(cls):
        lines += ["| field | type | default | |", "| --- | --- | --- | --- |"]
    for field in fields(cls):
        cells = f"`{field.name}`", f"`{field.type}`", f"`{default(field)}`", docs.get(field.name, "")
        lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return lines


def default(field: Field) -> str:
    if field.default_factory is not MISSING:
        value = field.default_factory()
        return f"{type(value).__name__}()" if is_dataclass(value) else str(value)
    if isinstance(field.default, tuple):
        return str(field.default)
    return shown(field.default) or '""'


def experiments() -> str:
    lines = [
        "# Experiments",
        "",
        "The configs that come with vlp, from their docstrings. `vlp configs WORD` prints those with a word, "
        "`vlp show CONFIG` prints every value of one.",
    ]
    for path in sorted((ROOT / "configs").rglob("*.py")):
        tree = ast.parse(path.read_text())
        lines += ["", f"## {path.relative_to(ROOT)}", *notebook(ast.get_docstring(tree))]
        docstrings = {node.name: ast.get_docstring(node) for node in tree.body if isinstance(node, ast.FunctionDef)}
        for entry in read_entries(path):
            name = entry.config.rpartition(":")[2] if ":" in entry.config else "config"
            lines += ["", f"### {path.parent.name}/{path.name}:{name}", *notebook(docstrings[name])]
    return "\n".join(lines)


def notebook(docstring: str) -> list[str]:
    title, _, rest = docstring.partition("\n\n")
    lines = ["", read_summary(title)]
    for section, text in read_sections(rest).items():
        if section == "Command":
            lines += ["", "```bash", *text, "```"]
        else:
            lines += ["", f"**{section}:** {to_markdown(' '.join(text))}"]
    return lines


def to_markdown(text: str) -> str:
    """Escape what Markdown would read as HTML, link records, and put a table of reStructuredText into a code block."""
    text = re.sub(r"\(results: ([\w.-]+)\)", r"([record](../results.md#\1))", text)
    text = re.sub(r"(?<!`)<(\w)", r"&lt;\1", text)
    return re.sub(r"^(=+  [= ]+\n(?:.*\n)*?=+  [= ]+)$", r"```text\n\1\n```", text, flags=re.MULTILINE)
