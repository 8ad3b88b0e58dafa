"""Figures as images of a page."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAX_LABEL = 80  # characters


def png(figure: Figure, **metadata: str) -> bytes:
    """Return a figure as PNG with texts such as ``Description`` inside."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, metadata=metadata)
    return buffer.getvalue()


def label(text: str) -> str:
    """Return a name of the user's as a text that matplotlib draws as it is.

    Dollars would begin a formula, control characters and lone surrogates have no glyph, and a leading underscore would
    hide an entry of a legend.
    """
    text = text if len(text) <= MAX_LABEL else text[: MAX_LABEL - 3] + "..."
    text = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)
    return (" " if text.startswith("_") else "") + text.replace("$", r"\$")
