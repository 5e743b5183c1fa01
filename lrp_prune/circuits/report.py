"""A report of circuits in one HTML file that needs nothing else: figures are part of it."""

import base64
import io
import math
import os
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from lrp_prune.circuits.circuit import Circuit
from lrp_prune.circuits.plots import kept_per_layer, overlaps, plural, size_curves
from lrp_prune.circuits.result import EvaluationResult

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff }
body { max-width: 68rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; display: block; overflow-x: auto }
th, td { border-bottom: 1px solid #ddd; padding: .3rem .7rem; text-align: right; white-space: nowrap }
th:first-child, td:first-child { text-align: left }
figure { margin: 1.5rem 0 } img { max-width: 100% } figcaption { color: #555 }
"""


def save_report(
    path: str | os.PathLike[str],
    results: Mapping[str, EvaluationResult],
    circuits: Mapping[str, Circuit] | None = None,
    title: str = "Circuits",
    metrics: Sequence[str] = ("accuracy",),
) -> None:
    """Write evaluations and circuits as one HTML file.

    It has the areas and scores of all methods in a table, their curves over size in one figure, and, where circuits are given,
    how many nodes each keeps per layer and how much they overlap.

    Args:
        path: the file to write.
        results: method -> evaluation; of one task, granularity and ablation, or they cannot be compared.
        circuits: name -> circuit.
        title: the heading.
        metrics: further tables and curves besides faithfulness.

    Raises:
        ValueError: if there are no results, or they differ in ablation, metric or number of nodes.
        ImportError: without matplotlib.
    """
    if not results:
        raise ValueError("there are no results to report")
    kinds = {(result.ablation, result.metric, result.total) for result in results.values()}
    if len(kinds) > 1:
        raise ValueError(
            f"results differ in ablation, metric or number of nodes, {sorted(kinds)}: write a report of each"
        )
    ((ablation, metric, total),) = kinds
    seeds = max(len(result.full[metric]) for result in results.values())
    first = next(iter(results.values()))
    parts = [
        f"<h1>{escape(title)}</h1>",
        f"<p>{total:,} nodes; ablation: {ablation}; faithfulness of: {metric.replace('_', ' ')}; seeds: {seeds}; "
        f"± is half the 95 % interval over seeds. Full model: {_means(first.full)}. Empty circuit: {_means(first.empty)}.</p>",
        "<h2>Areas</h2><p>CPR: area under faithfulness over the fraction of nodes, higher is better. CMD: area between "
        "faithfulness and 1, lower is better (MIB, arXiv 2504.13151).</p>",
        _areas(results),
        "<h2>Faithfulness by size</h2>",
        _table(results),
        _image(size_curves(results), "Faithfulness over the share of nodes kept, a line for each method"),
    ]
    for name in metrics:
        words = name.replace("_", " ").capitalize()
        parts += [
            f"<h2>{words} by size</h2>",
            _table(results, name),
            _image(size_curves(results, name), f"{words} over the share of nodes kept"),
        ]
    if circuits:
        parts.append("<h2>Circuits</h2><ul>")
        parts += [f"<li>{escape(name)}: {_kept(circuit)}</li>" for name, circuit in circuits.items()]
        parts.append("</ul>")
        if any(circuit.sites for circuit in circuits.values()):
            parts.append(_image(kept_per_layer(circuits), "Nodes kept in each layer"))
        if len(circuits) > 1:
            parts.append(_image(overlaps(circuits), "Overlap of circuits: shared nodes over the nodes of either"))
    head = (
        f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{escape(title)}</title>'
        f"<style>{_STYLE}</style>"
    )
    html = f'<!doctype html><html lang="en"><head>{head}</head><body>{"".join(parts)}</body></html>'
    Path(path).write_text(html, encoding="utf-8")


def _means(values: Mapping[str, Tensor]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {float(tensor.mean()):.3g}" for name, tensor in values.items())


def _number(value: float, half: float = math.nan) -> str:
    return f"{value:.3f}" if math.isnan(half) else f"{value:.3f} ± {half:.3f}"


def _row(cells: Sequence[str], tag: str = "td") -> str:
    return "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>"


def _areas(results: Mapping[str, EvaluationResult]) -> str:
    rows = [_row(["method", "scores", "CPR", "CMD"], "th")]
    for name, result in results.items():
        if len(set(result.sizes)) > 1:
            areas = [_number(result.cpr, result.cpr_interval), _number(result.cmd, result.cmd_interval)]
        else:
            areas = ["", ""]
        rows.append(_row([name, result.order, *areas]))
    return f"<table>{''.join(rows)}</table>"


def _kept(circuit: Circuit) -> str:
    parts = [f"{kept:,} of {total:,} {plural(kind)}" for kind, (kept, total) in circuit.sizes().items()]
    return ", ".join(parts)


def _table(results: Mapping[str, EvaluationResult], metric: str | None = None) -> str:
    sizes = sorted({size for result in results.values() for size in result.sizes})
    total = next(iter(results.values())).total
    rows = [_row(["method", *(f"{100 * size / total:.3g} % ({size:,})" for size in sizes)], "th")]
    for name, result in results.items():
        values = result.faithfulness if metric is None else result.mean(metric)
        halves = result.faithfulness_interval if metric is None else result.interval(metric)
        found = {size: _number(float(values[index]), float(halves[index])) for index, size in enumerate(result.sizes)}
        rows.append(_row([name, *(found.get(size, "") for size in sizes)]))
    return f"<table>{''.join(rows)}</table>"


def _image(figure: "Figure", caption: str) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=144)
    data = base64.b64encode(buffer.getvalue()).decode()
    return (
        f'<figure><img alt="{escape(caption)}" src="data:image/png;base64,{data}">'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )
