"""Figures without the state of pyplot: they draw without a display, and two threads can draw at once."""

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def new_figure(width: float, height: float) -> "Figure":
    """An empty figure, of so many inches.

    Raises:
        ImportError: without matplotlib, which is imported here only.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("figures need matplotlib: pip install matplotlib") from error
    return Figure(figsize=(width, height), layout="constrained")


def saved(figure: "Figure", path: str | os.PathLike[str] | None) -> "Figure":
    """The figure, written to a file if there is a path; its ending says in which format."""
    if path is not None:
        figure.savefig(path, dpi=150)
    return figure
