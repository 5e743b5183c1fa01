"""Figures of circuits: curves over size, kept nodes per layer, overlaps. Matplotlib is imported when one is drawn."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lrp_prune.circuits.circuit import Circuit
from lrp_prune.circuits.result import EvaluationResult, half_interval

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def _figure(width: float, height: float) -> "Figure":
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("figures need matplotlib: pip install matplotlib") from error
    return Figure(figsize=(width, height), layout="constrained")


def size_curves(results: Mapping[str, EvaluationResult], metric: str | None = None) -> "Figure":
    """What circuits of each method score over their size, with 95 % intervals where there are several seeds.

    Args:
        results: method -> evaluation.
        metric: a metric's name; None for faithfulness.
    """
    figure = _figure(7, 4.2)
    axes = figure.add_subplot()
    for name, result in results.items():
        by_seed = result.faithfulness_by_seed if metric is None else result.circuits[metric]
        order = sorted(range(len(result.sizes)), key=lambda index: result.sizes[index])
        x = [100 * result.fractions[index] for index in order]
        y = by_seed.mean(0)[order].tolist()
        (line,) = axes.plot(x, y, marker="o", markersize=3, label=name)
        if len(by_seed) > 1:
            half = half_interval(by_seed)[order].tolist()
            low, high = ([a + sign * b for a, b in zip(y, half, strict=True)] for sign in (-1, 1))
            axes.fill_between(x, low, high, alpha=0.2, color=line.get_color())
    if metric is None:
        axes.axhline(1.0, color="grey", linewidth=0.8, linestyle="--")
    # Linear near 0, so that the empty circuit has a place.
    axes.set_xscale("symlog", linthresh=0.1)
    axes.set_xlabel("nodes kept (%)")
    axes.set_ylabel("faithfulness" if metric is None else metric.replace("_", " "))
    axes.legend(fontsize="small")
    return figure


def kept_per_layer(circuits: Mapping[str, Circuit]) -> "Figure":
    """How many nodes of each kind each layer keeps; one panel for each kind, one line for each circuit.

    Raises:
        ValueError: if no circuit has units.
    """
    kinds = list(dict.fromkeys(site.kind for circuit in circuits.values() for site in circuit.sites))
    if not kinds:
        raise ValueError("there is no circuit of units to draw")
    figure = _figure(7, 2.4 * len(kinds))
    panels: Any = figure.subplots(len(kinds), 1, squeeze=False)
    for (axes,), kind in zip(panels, kinds, strict=True):
        for name, circuit in circuits.items():
            kept = [int(circuit.kept[site.name].sum()) for site in circuit.sites if site.kind == kind]
            if kept:
                axes.plot(range(len(kept)), kept, marker="o", markersize=3, label=name)
        axes.set_title(f"{kind.replace('_', ' ')}s kept", fontsize="medium")
        axes.set_xlabel("layer")
        axes.set_ylim(bottom=0)
        axes.legend(fontsize="small")
    return figure


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
    figure = _figure(1.5 + 0.8 * len(names), 1.2 + 0.7 * len(names))
    axes = figure.add_subplot()
    axes.imshow(table, vmin=0, vmax=1, cmap="viridis")
    axes.set_xticks(range(len(names)), names, rotation=30, ha="right")
    axes.set_yticks(range(len(names)), names)
    for row, values in enumerate(table):
        for column, value in enumerate(values):
            if value == value:
                shade = "black" if value > 0.6 else "white"
                axes.text(column, row, f"{value:.2f}", ha="center", va="center", color=shade)
    return figure
