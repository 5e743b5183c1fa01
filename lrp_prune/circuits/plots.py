"""Figures of circuits: curves over size, kept nodes per layer, overlaps. Matplotlib is imported when one is drawn."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lrp_prune.circuits.circuit import Circuit
from lrp_prune.circuits.result import EvaluationResult, half_interval
from lrp_prune.figures import new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def size_curves(results: Mapping[str, EvaluationResult], metric: str | None = None) -> "Figure":
    """What circuits of each method score over their size, with 95 % intervals where there are several seeds.

    Args:
        results: method -> evaluation.
        metric: a metric's name; None for faithfulness.
    """
    figure = new_figure(9, 4)
    axes = figure.add_subplot()
    means: list[float] = []
    shares: list[float] = []
    for name, result in results.items():
        by_seed = result.faithfulness_by_seed if metric is None else result.circuits[metric]
        order = sorted(range(len(result.sizes)), key=lambda index: result.sizes[index])
        x = [100 * result.fractions[index] for index in order]
        y = by_seed.mean(0)[order].tolist()
        (line,) = axes.plot(x, y, marker="o", markersize=3, label=name)
        if len(by_seed) > 1:
            half = half_interval(by_seed)[order].tolist()
            low, high = ([a + sign * b for a, b in zip(y, half, strict=True)] for sign in (-1, 1))
            axes.fill_between(x, low, high, alpha=0.15, linewidth=0, color=line.get_color())
        means += y
        shares += x
    if metric is None:
        axes.axhline(1.0, color="grey", linewidth=0.8, linestyle="--")
        means += [0.0, 1.0]
    # Wide intervals of bad methods would flatten all the rest.
    margin = 0.08 * (max(means) - min(means)) or 0.1
    axes.set_ylim(min(means) - margin, max(means) + margin)
    _percent_axis(axes, shares)
    axes.set_xlabel("nodes kept (%)")
    axes.set_ylabel("faithfulness" if metric is None else metric.replace("_", " "))
    axes.grid(alpha=0.25)
    figure.legend(loc="outside right upper", fontsize="small", frameon=False)
    return figure


def _percent_axis(axes: Any, shares: Sequence[float]) -> None:
    """A logarithmic axis of percentages; linear below the smallest circuit, so that the empty one has a place."""
    positive = [share for share in shares if share > 0] or [100.0]
    low = 0.0 if min(shares) == 0 else min(positive)
    axes.set_xscale("symlog", linthresh=min(positive)) if low == 0 else axes.set_xscale("log")
    ticks = [tick for tick in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100) if min(positive) <= tick <= max(positive)]
    ticks = [0.0, *ticks] if low == 0 else ticks
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_xticks([], minor=True)


def kept_per_layer(circuits: Mapping[str, Circuit]) -> "Figure":
    """How many nodes of each kind each layer keeps; one panel for each kind, one line for each circuit.

    Raises:
        ValueError: if no circuit has units.
    """
    kinds = list(dict.fromkeys(site.kind for circuit in circuits.values() for site in circuit.sites))
    if not kinds:
        raise ValueError("there is no circuit of units to draw")
    figure = new_figure(9, 2.6 * len(kinds))
    panels: Any = figure.subplots(len(kinds), 1, squeeze=False)
    lines: dict[str, Any] = {}
    for (axes,), kind in zip(panels, kinds, strict=True):
        for number, (name, circuit) in enumerate(circuits.items()):
            kept = [int(circuit.kept[site.name].sum()) for site in circuit.sites if site.kind == kind]
            if kept:
                (line,) = axes.plot(range(len(kept)), kept, marker="o", markersize=3, color=f"C{number}")
                lines[name] = line
        axes.set_title(f"{plural(kind)} kept", fontsize="medium")
        axes.set_xlabel("layer")
        axes.locator_params(axis="both", integer=True)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.25)
    figure.legend(lines.values(), lines.keys(), loc="outside right upper", fontsize="small", frameon=False)
    return figure


def plural(kind: str) -> str:
    """What units of a kind are called.

    Example:
        >>> plural("mlp_neuron"), plural("head")
        ('MLP neurons', 'heads')
    """
    return f"{kind.replace('mlp', 'MLP').replace('_', ' ')}s"


def overlaps(circuits: Mapping[str, Circuit]) -> "Figure":
    """The shared nodes over the nodes of either, of each two circuits of the same groups; empty where they are of others."""
    names = list(circuits)
    table = [
        [
            circuits[a].overlap(circuits[b]).jaccard
            if circuits[a].kept.keys() == circuits[b].kept.keys()
            else float("nan")
            for b in names
        ]
        for a in names
    ]
    figure = new_figure(3.5 + 0.65 * len(names), 1.5 + 0.4 * len(names))
    axes = figure.add_subplot()
    axes.imshow(table, vmin=0, vmax=1, cmap="Blues", aspect="auto")
    axes.set_xticks(range(len(names)), names, rotation=30, ha="right", fontsize="small")
    axes.set_yticks(range(len(names)), names, fontsize="small")
    for row, values in enumerate(table):
        for column, value in enumerate(values):
            if value == value:
                shade = "white" if value > 0.6 else "black"
                axes.text(column, row, f"{value:.2f}", ha="center", va="center", color=shade, fontsize="small")
    return figure
