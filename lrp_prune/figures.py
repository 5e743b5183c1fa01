"""Figures without the state of pyplot: they draw without a display, and two threads can draw at once."""

import os
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

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
        raise ImportError("figures need matplotlib: pip install 'lrp-prune[plots]'") from error
    return Figure(figsize=(width, height), layout="constrained")


_WIDE = 40.0
"""Percentages beyond this are drawn on an axis that is logarithmic from a tenth of a whole on."""


def percent_axis(axes: Any, percentages: Iterable[float]) -> None:
    """The x axis for changes in percent, which may be a few or thousands: both are told apart."""
    if max((abs(value) for value in percentages), default=0.0) > _WIDE:
        axes.set_xscale("symlog", linthresh=10, linscale=2)
    axes.xaxis.set_major_formatter("{x:,g}")


_LETTERS = 48
"""Of a name beside an axis; longer ones would leave no room for the axis."""


def shortened(text: str, letters: int) -> str:
    """A text of at most so many letters: what it begins with, and twice as much of what it ends with.

    Example:
        >>> shortened("backbone.encoder.layers.3.mlp", 16)
        'backb…yers.3.mlp'
    """
    if len(text) <= letters:
        return text
    begin = letters // 3
    return f"{text[:begin]}…{text[len(text) - (letters - begin - 1) :]}"


def _as_written(figure: "Figure") -> None:
    """Names stay names: no two dollar signs make a formula of what is between them, and none takes all the room."""
    from matplotlib.text import Text
    from matplotlib.ticker import LogFormatter, ScalarFormatter

    numbers = set[Any]()
    for axis in (axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)):
        for minor in (False, True):
            ticks = axis.get_ticklabels(minor=minor)
            formatter = axis.get_minor_formatter() if minor else axis.get_major_formatter()
            if isinstance(formatter, LogFormatter | ScalarFormatter):
                numbers.update(ticks)  # powers of ten are formulas
            elif any(len(tick.get_text()) > _LETTERS for tick in ticks):
                names = [shortened(tick.get_text(), _LETTERS) for tick in ticks]
                axis.set_ticks(axis.get_ticklocs(minor=minor), names, minor=minor)
    for text in figure.findobj(Text):
        if isinstance(text, Text) and text not in numbers:
            text.set_parse_math(False)


def saved(figure: "Figure", path: str | os.PathLike[str] | None) -> "Figure":
    """The figure, written to a file if there is a path; its ending says in which format."""
    _as_written(figure)
    if path is not None:
        figure.savefig(path, dpi=150)
    return figure


def finished(figure: "Figure", axes: Any, path: str | os.PathLike[str] | None) -> "Figure":
    """The figure of lines with a grid and the legend beside it, written to a file if there is a path."""
    axes.grid(alpha=0.25)
    figure.legend(loc="outside right upper", fontsize="small", frameon=False)
    return saved(figure, path)
