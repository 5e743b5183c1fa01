"""What the replacement of inputs has shown: two curves, and the area between them."""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lrp_prune.effects.intervals import Interval, intervals
from lrp_prune.figures import new_figure, saved

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class PerturbationCurve:
    """The explained value by the share of the input that is replaced; see :func:`~lrp_prune.metrics.perturbation_curve`.

    Args:
        shares: of the positions that are replaced, from 0 to 1.
        most: values with the most relevant replaced first, ``[samples, shares]``.
        least: values with the least relevant replaced first.
        name: of the relevance.
        baseline: what positions are replaced with.

    Example:
        >>> curve = PerturbationCurve((0.0, 0.5, 1.0), torch.tensor([[4.0, 1.0, 0.0]]), torch.tensor([[4.0, 3.0, 0.0]]))
        >>> curve.area  # (0 + 2) / 2 * 0.5 + (2 + 0) / 2 * 0.5
        1.0
    """

    shares: tuple[float, ...]
    most: Tensor
    least: Tensor
    name: str = "relevance"
    baseline: str = "zero"

    @property
    def areas(self) -> Tensor:
        """The area between the curves, of each sample: ``[samples]``."""
        shares = torch.tensor(self.shares, dtype=torch.float64)
        return torch.trapezoid(self.least.double() - self.most.double(), shares, dim=1)

    @property
    def area(self) -> float:
        """The mean area: larger for more faithful relevance."""
        return float(self.areas.mean())

    @property
    def interval(self) -> Interval:
        """The mean area, and 95 % of a bootstrap over the samples; of a single sample no bounds are known (NaN)."""
        areas = self.areas
        if len(areas) < 2:
            return Interval(self.area, math.nan, math.nan)
        return intervals([(areas, torch.ones_like(areas))], lambda mean: mean)

    def __str__(self) -> str:
        value, low, high = self.interval
        within = "one sample" if len(self.areas) < 2 else f"{low:.4g} to {high:.4g}"
        rows = [f"{self.name}: area {value:.4g} ({within}), baseline {self.baseline}"]
        for name, values in (("most relevant first", self.most), ("least relevant first", self.least)):
            rows.append(f"  {name:<21}" + " ".join(f"{value:8.4g}" for value in values.mean(0).tolist()))
        rows.insert(1, f"  {'replaced':<21}" + " ".join(f"{share:8.0%}" for share in self.shares))
        return "\n".join(rows)

    def plot(self, path: str | os.PathLike[str] | None = None) -> "Figure":
        """A figure of both curves, and the area between them.

        Args:
            path: a file to write it to; its ending says in which format. None writes none.

        Raises:
            ImportError: without matplotlib.
        """
        return plot_curves({self.name: self}, path)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON or a data frame."""
        return {
            "name": self.name,
            "baseline": self.baseline,
            "area": self.area,
            "interval": None if len(self.areas) < 2 else list(self.interval[1:]),
            "shares": list(self.shares),
            "most": self.most.mean(0).tolist(),
            "least": self.least.mean(0).tolist(),
        }


def plot_curves(curves: Mapping[str, PerturbationCurve], path: str | os.PathLike[str] | None = None) -> "Figure":
    """A figure of several curves: least relevant first above (dashed), most relevant first below, one colour each.

    Args:
        curves: what they are called -> curve.
        path: a file to write it to; None writes none.

    Raises:
        ImportError: without matplotlib.
    """
    figure = new_figure(7.5, 4.2)
    axes = figure.add_subplot()
    for number, (name, curve) in enumerate(sorted(curves.items(), key=lambda entry: -entry[1].area)):
        x, colour = [100 * share for share in curve.shares], f"C{number % 10}"
        most, least = (values.mean(0).tolist() for values in (curve.most.double(), curve.least.double()))
        axes.plot(x, most, color=colour, marker="o", markersize=3, label=f"{name}: {curve.area:.3g}")
        axes.plot(x, least, color=colour, marker="o", markersize=3, linestyle="dashed")
        if len(curves) == 1:
            axes.fill_between(x, most, least, color=colour, alpha=0.12, linewidth=0)
    axes.plot([], [], color="grey", label="most relevant first")
    axes.plot([], [], color="grey", linestyle="dashed", label="least relevant first")
    axes.set(xlabel="positions replaced (%)", ylabel="explained value", title="Area between the curves")
    axes.grid(alpha=0.25)
    figure.legend(loc="outside right upper", fontsize="small", frameon=False)
    return saved(figure, path)
