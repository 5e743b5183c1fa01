r"""Results of an evaluation: what circuits score, what of the full model's behaviour that is, and areas over size."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# 97.5 % quantiles of Student's t distribution for 1 ... 30 degrees of freedom.
_T = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
    2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip


def half_interval(values: Tensor) -> Tensor:
    """Half the width of the 95 % interval of the mean over the first dimension; NaN for one seed.

    Example:
        >>> import torch
        >>> round(float(half_interval(torch.tensor([1.0, 3.0]))), 3)
        12.706
    """
    number = values.shape[0]
    if number < 2:
        return values[0] * math.nan
    quantile = _T[number - 2] if number - 2 < len(_T) else 1.96
    half: Tensor = quantile * values.std(0, unbiased=True) / math.sqrt(number)
    return half


@dataclass(frozen=True, repr=False)
class EvaluationResult:
    r"""What circuits score on a task, over seeds.

    With the metric :math:`m`, the full model :math:`N`, and the empty circuit :math:`\emptyset`, in which all ranked nodes are
    ablated, everything is given by :math:`f(C) = (m(C) - m(\emptyset)) / (m(N) - m(\emptyset))` (MIB, arXiv 2504.13151).

    Args:
        sizes: nodes in each circuit.
        total: nodes in all.
        ablation: what ablated nodes are replaced by.
        metric: the one that faithfulness is about.
        order: ``"absolute"`` or ``"signed"`` scores, or ``"given"`` circuits; it changes the areas.
        full: metric -> ``[seeds]``, of the full model.
        empty: metric -> ``[seeds]``, of the empty circuit.
        circuits: metric -> ``[seeds, sizes]``.
        complements: metric -> ``[seeds, sizes]``, of the models without the circuits; empty if not asked for.
        minimality: ``[sizes]`` by :func:`lrp_prune.circuits.minimality`, NaN where not asked for.
        description: of the ranking or circuit.
    """

    sizes: tuple[int, ...]
    total: int
    ablation: str
    metric: str
    order: str
    full: dict[str, Tensor]
    empty: dict[str, Tensor]
    circuits: dict[str, Tensor]
    complements: dict[str, Tensor]
    minimality: Tensor
    description: dict[str, Any]

    def __repr__(self) -> str:
        """A table: a line for each size."""
        full, empty = (float(values[self.metric].mean()) for values in (self.full, self.empty))
        seeds = len(self.full[self.metric])
        lines = [
            f"EvaluationResult: {self.ablation} ablation, {self.metric} {full:.3f} of the full model and {empty:.3f} of the "
            f"empty circuit, {seeds} seed{'s' if seeds > 1 else ''}"
        ]
        others = [name for name in self.circuits if name != self.metric]
        titles = ["nodes", "share", "faithfulness", *(["completeness"] if self.complements else []), *others]
        rows = [titles]
        for index, (size, share) in enumerate(zip(self.sizes, self.fractions, strict=True)):
            half = float(self.faithfulness_interval[index])
            row = [f"{size:,}", f"{share:.2%}", f"{float(self.faithfulness[index]):.3f}"]
            row[-1] += "" if math.isnan(half) else f" ± {half:.3f}"
            row += [f"{float(self.completeness[index]):.3f}"] if self.complements else []
            rows.append(row + [f"{float(self.mean(name)[index]):.3f}" for name in others])
        widths = [max(len(row[column]) for row in rows) for column in range(len(titles))]
        lines += ["  ".join(entry.rjust(width) for entry, width in zip(row, widths, strict=True)) for row in rows]
        if len(set(self.sizes)) > 1:
            lines.append(f"CPR {self.cpr:.3f}, CMD {self.cmd:.3f}")
        return "\n".join(lines)

    @property
    def fractions(self) -> tuple[float, ...]:
        """Sizes as shares of all nodes."""
        return tuple(size / self.total for size in self.sizes)

    def _normalized(self, values: Tensor) -> Tensor:
        full, empty = self.full[self.metric][:, None], self.empty[self.metric][:, None]
        return (values - empty) / (full - empty)

    @property
    def faithfulness_by_seed(self) -> Tensor:
        """:math:`f(C)`, ``[seeds, sizes]``."""
        return self._normalized(self.circuits[self.metric])

    @property
    def faithfulness(self) -> Tensor:
        """:math:`f(C)`, mean over seeds, ``[sizes]``: 1 for the full model, 0 for the empty circuit."""
        return self.faithfulness_by_seed.mean(0)

    @property
    def completeness(self) -> Tensor:
        r""":math:`1 - f(N \setminus C)`, mean over seeds, ``[sizes]``: 1 where the model without the circuit does nothing.

        :math:`f(N \setminus C)` is what is called completeness where lower is better (Marks et al., arXiv 2403.19647).

        Raises:
            ValueError: if complements were not evaluated.
        """
        if not self.complements:
            raise ValueError("complements were not evaluated: pass complements=True")
        return 1 - self._normalized(self.complements[self.metric]).mean(0)

    @property
    def faithfulness_interval(self) -> Tensor:
        """Half the 95 % interval of :attr:`faithfulness` over seeds, ``[sizes]``; NaN for one seed."""
        return half_interval(self.faithfulness_by_seed)

    def mean(self, metric: str) -> Tensor:
        """A metric of the circuits, mean over seeds, ``[sizes]``."""
        return self.circuits[metric].mean(0)

    def interval(self, metric: str) -> Tensor:
        """Half the 95 % interval of :meth:`mean` over seeds, ``[sizes]``; NaN for one seed."""
        return half_interval(self.circuits[metric])

    def area(self, distance: bool = False, logarithmic: bool = False) -> Tensor:
        r"""Trapezoidal area over the fraction of nodes, from the smallest circuit to the largest, for each seed.

        Args:
            distance: of :math:`|1 - f|` (CMD) instead of :math:`f` (CPR).
            logarithmic: over the logarithm of the fraction, as in MIB's code with ``log_scale``.

        Raises:
            ValueError: for fewer than two sizes, or an empty circuit on a logarithmic scale.
        """
        if len(set(self.sizes)) < 2:
            raise ValueError(f"an area needs circuits of at least two sizes, got {self.sizes}")
        order = sorted(range(len(self.sizes)), key=lambda index: self.sizes[index])
        x = [self.fractions[index] for index in order]
        if logarithmic and x[0] == 0:
            raise ValueError("the circuit of size 0 has no place on a logarithmic scale: leave it out")
        values = self.faithfulness_by_seed[:, order]
        places = torch.tensor([math.log(value) for value in x] if logarithmic else x, dtype=values.dtype, device="cpu")
        return torch.trapezoid((1 - values).abs() if distance else values, places, dim=1)

    @property
    def cpr(self) -> float:
        """Circuit performance ratio: area under :math:`f`; higher is better (MIB, arXiv 2504.13151)."""
        return float(self.area().mean())

    @property
    def cmd(self) -> float:
        """Circuit-model distance: area between :math:`f` and 1; 0 is best (MIB, arXiv 2504.13151)."""
        return float(self.area(distance=True).mean())

    @property
    def cpr_interval(self) -> float:
        """Half the 95 % interval of :attr:`cpr` over seeds."""
        return float(half_interval(self.area()))

    @property
    def cmd_interval(self) -> float:
        """Half the 95 % interval of :attr:`cmd` over seeds."""
        return float(half_interval(self.area(distance=True)))

    def to_dict(self) -> dict[str, Any]:
        """All figures in plain values, for JSON, which knows no NaN: None stands for it."""
        areas = len(set(self.sizes)) > 1
        figures: dict[str, Any] = {
            "sizes": list(self.sizes),
            "total": self.total,
            "ablation": self.ablation,
            "metric": self.metric,
            "order": self.order,
            "seeds": len(self.full[self.metric]),
            "full": {name: float(values.mean()) for name, values in self.full.items()},
            "empty": {name: float(values.mean()) for name, values in self.empty.items()},
            "circuits": {name: values.mean(0).tolist() for name, values in self.circuits.items()},
            "faithfulness": self.faithfulness.tolist(),
            "faithfulness_interval": self.faithfulness_interval.tolist(),
            "completeness": self.completeness.tolist() if self.complements else None,
            "minimality": self.minimality.tolist(),
            "cpr": self.cpr if areas else None,
            "cmd": self.cmd if areas else None,
            "cpr_interval": self.cpr_interval if areas else None,
            "cmd_interval": self.cmd_interval if areas else None,
            "description": self.description,
        }
        return {name: _without_nan(value) for name, value in figures.items()}


def _without_nan(value: Any) -> Any:
    if isinstance(value, list):
        return [_without_nan(entry) for entry in value]
    return None if isinstance(value, float) and math.isnan(value) else value
