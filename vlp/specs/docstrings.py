"""Read what the docstring of a spec says of it and of its fields."""

from __future__ import annotations

import inspect
import re


def field_docs(cls: type) -> dict[str, str]:
    """Return the explanation of each documented field, from the ``Args`` of the docstrings of ``cls`` and its bases."""
    docs: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        _, _, section = (inspect.cleandoc(base.__doc__ or "")).partition("\nArgs:\n")
        for name, text in re.findall(r"^    (\w+): ((?:.*\n?)(?:^ {8}.*\n?)*)", section + "\n", re.MULTILINE):
            docs[name] = " ".join(text.split())
    return docs


def summary(cls: type) -> str:
    """Return the docstring of ``cls`` up to its first section."""
    return re.split(r"\n(?:Args|Attributes|Returns|Raises|Metrics):\n", inspect.cleandoc(cls.__doc__ or ""))[0].strip()
