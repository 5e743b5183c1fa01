"""Figures of the relevance of units: by layer, and by head."""

import os
from typing import TYPE_CHECKING

from lrp_prune.figures import new_figure, saved
from lrp_prune.relevance import Relevance
from lrp_prune.visualization.colours import colour_map, hexadecimal

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def plot_by_layer(relevance: Relevance, path: str | os.PathLike[str] | None = None) -> "Figure":
    """A figure of how much of all relevance, whatever its sign, each tensor or group of units has.

    Args:
        relevance: of weights or units.
        path: a file to write it to; None writes none.

    Raises:
        ImportError: without matplotlib (the extra ``plots``).
    """
    sizes = {name: float(values.double().abs().sum()) for name, values in relevance.items()}
    total = sum(sizes.values()) or 1.0
    figure = new_figure(8.0, 1.2 + 0.2 * len(sizes))
    axes = figure.add_subplot()
    axes.barh(range(len(sizes)), [100 * size / total for size in sizes.values()], color=hexadecimal(1.0), height=0.75)
    axes.set_yticks(range(len(sizes)), list(sizes), fontsize="x-small")
    axes.invert_yaxis()
    axes.set(xlabel="share of all relevance (%)", title=f"Relevance by layer ({relevance.granularity})")
    axes.grid(axis="x", alpha=0.25)
    return saved(figure, path)


def plot_heads(relevance: Relevance, path: str | os.PathLike[str] | None = None) -> "Figure":
    """A figure of each head of each layer, from ``attribute(..., granularity="head")``.

    Args:
        relevance: of heads.
        path: a file to write it to; None writes none.

    Raises:
        ValueError: if it is of no heads.
        ImportError: without matplotlib (the extra ``plots``).
    """
    if "head" not in relevance.granularity:
        raise ValueError(f"relevance must be of heads (granularity='head'), got {relevance.granularity!r}")
    rows = {name: values for name, values in relevance.items() if ":" not in name or name.startswith("head:")}
    width = max(len(values) for values in rows.values())
    table = [values.tolist() + [float("nan")] * (width - len(values)) for values in rows.values()]
    largest = max(float(values.abs().max()) for values in rows.values()) or 1.0
    signed = any(bool((values < 0).any()) for values in rows.values())
    figure = new_figure(3.5 + 0.35 * width, 1.6 + 0.28 * len(rows))
    axes = figure.add_subplot()
    # Without a sign the upper half of the scale is left.
    shown = axes.imshow(table, cmap=colour_map(), vmin=-largest, vmax=largest, aspect="auto")
    axes.set_yticks(range(len(rows)), list(rows), fontsize="x-small")
    axes.set_xticks(range(width))
    axes.set(xlabel="head", title="Relevance by head")
    bar = figure.colorbar(shown, ax=axes, shrink=0.8)
    bar.ax.set_ylim(-largest if signed else 0.0, largest)
    return saved(figure, path)
