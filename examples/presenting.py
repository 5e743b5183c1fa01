"""How the examples show what they do: stages, progress, tables in columns, figures of one style, and no noise of libraries."""

import logging
import sys
import time
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import TypeVar

import lightning
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from tqdm import tqdm
from transformers.utils import logging as transformers_logging

Item = TypeVar("Item")
START = time.monotonic()
IN_TERMINAL = sys.stderr.isatty()
"""Whether bars of progress are seen while they move; in a file they are only in the way."""

INK, FAINT = "#1f2933", "#9aa5b1"
COLOURS = {
    "lrp": "#0b6fb8",
    "wanda": "#d9822b",
    "magnitude": "#b0306a",
    "gradient": "#2a9d6f",
    "random": "#7b8794",
}
"""A method has the same colour in every figure (told apart also by those who see red and green alike)."""
_OTHERS = ("#0b6fb8", "#d9822b", "#b0306a", "#2a9d6f", "#6f4bb2", "#7b8794", "#8c6d1f", "#3aa0a8")


def quiet() -> None:
    """Keeps what libraries say of themselves out of the results: tips, devices that are not there, bars of loading."""
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_is_no_chat)
    transformers_logging.disable_progress_bar()
    warnings.filterwarnings(
        "ignore", message=r".*isinstance\(treespec, LeafSpec\)"
    )  # raised and meant within Lightning
    warnings.filterwarnings("ignore", message=".*does not have many workers")  # the data are in memory


def _is_no_chat(record: logging.LogRecord) -> bool:
    """Leaves out what Lightning itself has to say short of a warning; callbacks log their tables by the same logger."""
    return record.levelno >= logging.WARNING or not record.pathname.startswith(str(Path(lightning.__file__).parent))


def stage(text: str) -> None:
    """Says what begins, after how many seconds."""
    print(f"\n[{time.monotonic() - START:4.0f} s] {text}", flush=True)


def progress(items: Iterable[Item], label: str) -> Iterable[Item]:
    """A bar while items are gone through, in a terminal; it is gone afterwards."""
    return tqdm(items, desc=label, leave=False, disable=None)


def aligned(table: str) -> str:
    """A Markdown table whose columns stand under each other; lines that are no rows stay as they are."""
    rows = [
        [cell.strip() for cell in line.strip().strip("|").split("|")] for line in table.splitlines() if _is_row(line)
    ]
    if not rows:
        return table
    widths = [max(len(row[column]) for row in rows if column < len(row)) for column in range(max(map(len, rows)))]
    lines = []
    for line in table.splitlines():
        lines.append(row_of(rows.pop(0), widths) if _is_row(line) else line)
    return "\n".join(lines)


def row_of(cells: Iterable[str], widths: Iterable[int]) -> str:
    """A row of a Markdown table: the first cell on the left of its column, the others on the right; `---` is a rule."""
    padded = []
    for column, (cell, width) in enumerate(zip(cells, widths, strict=False)):
        if cell and not cell.strip("-:"):
            padded.append("-" * width if column == 0 else "-" * max(width - 1, 2) + ":")
        else:
            padded.append(cell.ljust(width) if column == 0 else cell.rjust(width))
    return "| " + " | ".join(padded) + " |"


def _is_row(line: str) -> bool:
    return line.startswith("|")


def colour(name: str, index: int = 0) -> str:
    """The colour of a method, or one by number for anything else."""
    return COLOURS.get(name, _OTHERS[index % len(_OTHERS)])


def new_figure(width: float, height: float, columns: int = 1) -> tuple[Figure, list[Axes]]:
    """A figure of so many inches, with axes beside each other."""
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = list(figure.subplots(1, columns, squeeze=False)[0])
    for each in axes:
        each.spines[["top", "right"]].set_visible(False)
        each.spines[["left", "bottom"]].set_color(FAINT)
        each.tick_params(colors=INK, which="both", labelsize=9)
        each.grid(axis="y", color=FAINT, alpha=0.25, linewidth=0.8)
        each.set_axisbelow(True)
    return figure, axes


def titled(axes: Axes, title: str, xlabel: str, ylabel: str) -> None:
    """Title and labels in the style of all figures."""
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold", color=INK)
    axes.set_xlabel(xlabel, fontsize=9, color=INK)
    axes.set_ylabel(ylabel, fontsize=9, color=INK)
