"""What masks prune where, and what is in danger by it: as text and as a figure."""

import io
import math
import os
import re
from collections.abc import Mapping
from textwrap import fill
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from lrp_prune.figures import new_figure, saved
from lrp_prune.names import layer_of
from lrp_prune.pruning.emptied import NEARLY_ALL, CutOff, cut_off, emptied, in_words
from lrp_prune.pruning.kinds import by_kind, common_path, figures_by_kind, in_short, layer_group
from lrp_prune.relevance.unscored import described, entries_of, share

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from lrp_prune.pruning.masks import Masks

WIDTH = 100
_SHOWN = 6
# Names of layers below their bars are legible up to this number.
_NAMED = 24


def report(masks: "Masks", width: int = WIDTH) -> str:
    """See :meth:`lrp_prune.Masks.report`."""
    head = f"total sparsity {masks.sparsity:.2%}: {masks.num_pruned:,} of {masks.num_entries:,} weights pruned"
    if masks.granularity != "weight":
        head += f", by {masks.granularity.replace(',', ' and ')}"
    danger = [fill(line, width, subsequent_indent="  ", break_long_words=False) for line in _danger(masks)]
    return "\n".join([head, *unscored_lines(masks), layer_table(masks, width=width), *danger])


def unscored_lines(masks: "Masks") -> list[str]:
    """What could not be scored, with the reasons; nothing if all was."""
    if not masks.unscored:
        return []
    missing = entries_of(masks.unscored, masks.shapes)
    return [f"not scored and kept: {share(missing, masks.num_entries)}: {described(masks.unscored)}"]


def layer_table(masks: "Masks", newly: Mapping[str, int] | None = None, width: int = WIDTH) -> str:
    """A table by kind of layer: tensors, weights, pruned, sparsity, and of single tensors the lowest and highest.

    Args:
        masks: the masks.
        newly: by kind of layer, how many are pruned now that were not before; None leaves the column out.
        width: characters in a line.
    """
    figures = figures_by_kind(masks)
    shared, names = common_path(list(figures)), in_short(list(figures))
    table = Table(box=SIMPLE_HEAD)
    table.add_column(f"layers of {shared}" if shared else "layers", overflow="fold", min_width=18)
    titles = (
        "tensors",
        "weights",
        "pruned",
        *(["newly"] if newly is not None else []),
        "sparsity",
        "lowest",
        "highest",
    )
    for title in titles:
        table.add_column(title, justify="right")
    for group, each in figures.items():
        counts = [each.tensors, each.entries, each.pruned, *([newly.get(group, 0)] if newly is not None else [])]
        shares = [each.sparsity, each.lowest, each.highest]
        cells = [*(f"{count:,}" for count in counts), *(f"{value:.2%}" for value in shares)]
        table.add_row(names[group], *cells)
    return as_text(table, width)


def as_text(table: Table, width: int = WIDTH) -> str:
    """A table as plain lines."""
    buffer = io.StringIO()
    Console(file=buffer, width=width).print(table)
    return "\n".join(line.rstrip() for line in buffer.getvalue().splitlines() if line.strip())


def _danger(masks: "Masks") -> list[str]:
    lines, names = [], emptied(masks)
    if names:
        gone = sum(masks.pruned_in(name) == math.prod(masks.shapes[name]) for name in names)
        whole = f", {gone} of them all" if gone else ""
        lines.append(
            f"{len(names)} of {len(masks)} tensors lose more than {100 * NEARLY_ALL:.0f} %{whole}: {in_words(masks, names)}"
        )
    if masks.granularity != "weight":  # whole rows and columns are what units are made of
        return lines
    counts = {name: cut_off(masks.whole(name), masks.layouts.get(name)) for name in masks}
    for what, reach in (("outputs", "without any input"), ("inputs", "that nothing reads")):
        found = _by_kind({name: count for name, count in counts.items() if count is not None}, what)
        lost, every = (sum(pair[i] for pair in found.values()) for i in (0, 1))
        if lost:
            worst = sorted((group for group in found if found[group][0]), key=lambda group: -found[group][0])
            each = [f"{group} ({found[group][0]:,} of {found[group][1]:,})" for group in worst[:_SHOWN]]
            more = f" and {len(worst) - _SHOWN} more" if len(worst) > _SHOWN else ""
            lines.append(f"{lost:,} of {every:,} {what} {reach}: {', '.join(each)}{more}")
    return lines or [f"no tensor loses more than {100 * NEARLY_ALL:.0f} %, and no output or input all of its weights"]


def _by_kind(counts: Mapping[str, CutOff], what: str) -> dict[str, tuple[int, int]]:
    """By kind of layer, how many outputs or inputs are cut off, and how many there are."""
    found: dict[str, tuple[int, int]] = {}
    for name, count in counts.items():
        lost, every = (count.outputs, count.all_outputs) if what == "outputs" else (count.inputs, count.all_inputs)
        before = found.get(layer_group(name), (0, 0))
        found[layer_group(name)] = (before[0] + lost, before[1] + every)
    return found


def plot(masks: "Masks", path: str | os.PathLike[str] | None = None) -> "Figure":
    """See :meth:`lrp_prune.Masks.plot`."""
    names, kinds = list(masks), by_kind(masks)
    labels = in_short(list(kinds))
    figure = new_figure(max(7.0, min(3.0 + 0.09 * len(names), 16.0)), 4.2)
    axes = figure.add_subplot()
    place = {name: index for index, name in enumerate(names)}
    for number, (kind, members) in enumerate(kinds.items()):
        heights = [masks.sparsity_of(name) for name in members]
        color = _color(number, len(kinds))
        axes.bar([place[name] for name in members], heights, width=0.85, color=color, label=labels[kind])
    axes.axhline(masks.sparsity, color="black", linewidth=0.9, linestyle="dashed", label=f"all: {masks.sparsity:.1%}")
    ticks = _ticks(names)
    short = max(map(len, ticks.values()), default=0) <= 3
    turn: dict[str, Any] = {} if short else {"rotation": 60, "ha": "right", "rotation_mode": "anchor"}
    axes.set_xticks(list(ticks), list(ticks.values()), fontsize="small", **turn)
    axes.set(ylim=(0, 1), xlim=(-0.8, len(names) - 0.2), ylabel="sparsity", title="Sparsity by layer")
    axes.set_xlabel("block" if short else "")
    axes.grid(axis="y", alpha=0.25)
    axes.set_axisbelow(True)
    figure.legend(loc="outside right upper", fontsize="small", frameon=False)
    return saved(figure, path)


def _color(number: int, of: int) -> Any:
    import matplotlib

    return matplotlib.colormaps["tab10" if of <= 10 else "tab20"](number % 20)


def _ticks(names: list[str]) -> dict[int, str]:
    """Where the bars of a block begin, and its number; the layers' names where these are few."""
    if len(names) <= _NAMED:
        return dict(enumerate(in_short([layer_of(name) for name in names]).values()))
    found: dict[int, str] = {}
    last = None
    for index, name in enumerate(names):
        block = next(iter(re.findall(r"\.(\d+)\.", name)), None)
        if block != last and block is not None:
            found[index] = block
        last = block
    step = math.ceil(len(found) / _NAMED) if found else 1
    return dict(list(found.items())[::step])
