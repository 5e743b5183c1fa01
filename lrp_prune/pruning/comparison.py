"""What a comparison of methods found, as a table, a figure and plain values."""

import io
import math
import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lrp_prune.figures import finished, new_figure
from lrp_prune.metrics.pruning import pruning_area, top_pruning_rate

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_WIDTH = 100
# Sparsities that differ by more than this are not the same in a table.
_VISIBLE = 0.005
# Values over more than this range are drawn on a logarithmic axis.
_WIDE = 30.0


@dataclass(frozen=True)
class Comparison:
    """Scores of a model that was pruned by each method to each sparsity; printing it gives a table.

    Args:
        scores: ``{method: {sparsity: value}}``.
        dense: the value of the dense model.
        reached: ``{method: {sparsity: share}}``, what was pruned of all weights that were asked for: a scope that cannot make up
            for weights without scores leaves these dense. Of units it is what was asked for, as many of them are gone.
        higher_is_better: whether a larger value is better.

    Example:
        >>> found = Comparison({"lrp": {0.5: 0.9, 0.7: 0.8}, "random": {0.5: 0.6, 0.7: 0.5}}, 0.95)
        >>> print(found)
          method     50 %     70 %
         ──────────────────────────
          dense      0.95     0.95
          lrp      * 0.9    * 0.8
          random     0.6      0.5
        * best of its column
        >>> found.best(0.5), found.to_dict()["scores"]
        (['lrp'], {'lrp': [0.9, 0.8], 'random': [0.6, 0.5]})
    """

    scores: dict[str, dict[float, float]]
    dense: float
    reached: dict[str, dict[float, float]] = field(default_factory=dict)
    higher_is_better: bool = True

    @property
    def sparsities(self) -> list[float]:
        """The sparsities, in the order that was asked for."""
        return list(next(iter(self.scores.values()), {}))

    def best(self, sparsity: float) -> list[str]:
        """The methods with the best value at a sparsity; several if they are equal, none where there is no number."""
        values = {method: row[sparsity] for method, row in self.scores.items() if not math.isnan(row[sparsity])}
        if not values:
            return []
        top = (max if self.higher_is_better else min)(values.values())
        return [method for method, value in values.items() if value == top]

    def area(self, method: str) -> float:
        """The mean of the value over the pruning rates, from the dense model on: see :func:`lrp_prune.metrics.pruning_area`.

        Example:
            >>> round(Comparison({"lrp": {0.5: 0.9, 0.9: 0.5}}, 1.0).area("lrp"), 4)  # (0.5 * 0.95 + 0.4 * 0.7) / 0.9
            0.8389
        """
        row = {0.0: self.dense, **self.scores[method]}
        return pruning_area(list(row), list(row.values()))

    def top_rate(self, method: str, share: float = 0.95) -> float:
        """The highest rate that keeps a share of the dense value: see :func:`lrp_prune.metrics.top_pruning_rate`.

        Example:
            >>> round(Comparison({"lrp": {0.5: 0.97, 0.9: 0.93}}, 1.0).top_rate("lrp"), 3)
            0.7
        """
        row = self.scores[method]
        return top_pruning_rate(list(row), list(row.values()), self.dense, share, self.higher_is_better)

    def __str__(self) -> str:
        from rich.box import SIMPLE_HEAD
        from rich.console import Console
        from rich.table import Table

        table = Table(box=SIMPLE_HEAD)
        table.add_column("method", overflow="fold")
        for sparsity in self.sparsities:
            table.add_column(f"  {100 * sparsity:g} %", no_wrap=True)
        table.add_row("dense", *[f"  {self.dense:.4g}"] * len(self.sparsities))
        best = {sparsity: self.best(sparsity) for sparsity in self.sparsities}
        off = []
        for method, row in self.scores.items():
            cells = [f"{'*' if method in best[sparsity] else ' '} {value:.4g}" for sparsity, value in row.items()]
            table.add_row(method, *cells)
            reached = self.reached.get(method, {})
            off += [
                f"{method} prunes {100 * reached[sparsity]:.2f} % where {100 * sparsity:g} % was asked for"
                for sparsity in row
                if abs(reached.get(sparsity, sparsity) - sparsity) > _VISIBLE
            ]
        buffer = io.StringIO()
        Console(file=buffer, width=_WIDTH).print(table)
        lines = [line.rstrip() for line in buffer.getvalue().splitlines() if line.strip()]
        return "\n".join([*lines, "* best of its column", *off])

    def plot(self, path: str | os.PathLike[str] | None = None) -> "Figure":
        """A figure of each method's values by sparsity, from the dense model on.

        Args:
            path: a file to write it to; its ending says in which format. None writes none.

        Raises:
            ImportError: without matplotlib.
        """
        figure = new_figure(7.0, 4.2)
        axes = figure.add_subplot()
        for method, row in self.scores.items():
            points = sorted(row.items())
            x, y = [0.0, *(100 * rate for rate, _ in points)], [self.dense, *(value for _, value in points)]
            axes.plot(x, y, marker="o", markersize=4, label=method)
        axes.axhline(self.dense, color="black", linewidth=0.9, linestyle="dashed", label="dense")
        values = [value for row in self.scores.values() for value in row.values() if math.isfinite(value)]
        values.append(self.dense)
        if min(values) > 0 and max(values) / min(values) > _WIDE:
            axes.set_yscale("log")
        better = "higher" if self.higher_is_better else "lower"
        axes.set(xlabel="sparsity (%)", ylabel=f"value ({better} is better)", title="Methods by sparsity")
        return finished(figure, axes, path)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON or a data frame: ``scores`` and ``reached`` have lists in the order of ``sparsities``."""
        return {
            "dense": self.dense,
            "higher_is_better": self.higher_is_better,
            "sparsities": self.sparsities,
            "scores": {method: list(row.values()) for method, row in self.scores.items()},
            "reached": {method: list(row.values()) for method, row in self.reached.items()},
        }
