"""What a search tried: each trial, the frontier of behaviour against the worst side effect, and what was chosen and why."""

import math
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

from lrp_prune.correction.patch import Patch
from lrp_prune.figures import finished, new_figure, percent_axis

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Trial(NamedTuple):
    """One amount at one strength, and what it did.

    Attributes:
        amount: as it was asked for.
        strength: at which it was applied.
        entries: how many entries the patch has.
        undesired: the undesired metric with the patch.
        general: what each measure of the general behaviour gives with it, by name.
        reduction: of the undesired metric, as a share of what it was: 1 if nothing is left.
        losses: of each measure, as a share of what it was; negative if it became better.
        worst: the measure that is the furthest beyond its limit, or the nearest to it.
        within: whether each loss is within its limit.
        accepted: whether the reduction is reached, too.
    """

    amount: float | int
    strength: float
    entries: int
    undesired: float
    general: dict[str, float]
    reduction: float
    losses: dict[str, float]
    worst: str
    within: bool
    accepted: bool

    @property
    def loss(self) -> float:
        """That of the worst measure."""
        return self.losses[self.worst]


class Search(NamedTuple):
    """What a search found; printing it gives a table.

    Attributes:
        patch: the chosen one; None if none was accepted.
        undesired: the undesired metric before.
        general: the measures of the general behaviour before, by name.
        curve: all trials, by growing amount and strength.
        chosen: the trial of the patch; None if none was accepted.
        reduction: what was asked for.
        allowed: the limit of each measure.

    Example:
        >>> trials = [Trial(10, 0.5, 10, 0.6, {"speeches": 20.1, "copying": 3.0}, 0.4, {"speeches": 0.005, "copying": 0.01},
        ...                 "copying", True, False),
        ...           Trial(10, 1.0, 10, 0.2, {"speeches": 20.2, "copying": 6.0}, 0.8, {"speeches": 0.01, "copying": 1.0},
        ...                 "copying", False, False)]
        >>> found = Search(None, 1.0, {"speeches": 20.0, "copying": 3.0}, trials, None, 0.5, {"speeches": 0.02, "copying": 0.05})
        >>> print(found.reason)
        none of 2 trials reduces the behaviour by 50.0 % within the limits: within them 40.0 % are reached (10 entries at strength
        0.5), and 80.0 % take +100.0 % of 'copying', where +5.0 % are allowed
    """

    patch: Patch | None
    undesired: float
    general: dict[str, float]
    curve: list[Trial]
    chosen: Trial | None
    reduction: float
    allowed: dict[str, float]

    @property
    def frontier(self) -> list[Trial]:
        """The trials that no other one beats, by growing reduction: none reduces as much at a smaller worst excess of a limit."""
        best: list[Trial] = []
        for trial in sorted(self.curve, key=lambda trial: (-_known(trial.reduction, -math.inf), self._excess(trial))):
            if math.isfinite(trial.reduction) and (not best or self._excess(trial) < self._excess(best[-1])):
                best.append(trial)
        return best[::-1]

    @property
    def reason(self) -> str:
        """What was chosen and why, in a sentence."""
        tried = f"{len(self.curve)} trial{'s' if len(self.curve) != 1 else ''}"
        wanted = f"reduces the behaviour by {_share(self.reduction)}"
        if self.chosen is not None:
            return (
                f"the smallest of {tried} that {wanted} within all limits: {_what(self.chosen)} reduces it by "
                f"{_share(self.chosen.reduction)}, and the worst is {self._said(self.chosen)}"
            )
        within = [trial for trial in self.curve if trial.within and trial.reduction > 0]
        enough = [trial for trial in self.curve if trial.reduction >= self.reduction]
        parts = []
        if within:
            most = max(within, key=lambda trial: trial.reduction)
            parts.append(f"within them {_share(most.reduction)} are reached ({_what(most)})")
        if enough:
            least = min(enough, key=self._excess)
            parts.append(f"{_share(least.reduction)} take {self._said(least)}")
        rest = ", and ".join(parts) or "no trial within them reduces it at all"
        return f"none of {tried} {wanted} within the limits: {rest}"

    def _excess(self, trial: Trial) -> float:
        return max(_known(loss, math.inf) - self.allowed.get(name, math.inf) for name, loss in trial.losses.items())

    def _said(self, trial: Trial) -> str:
        limit = self.allowed.get(trial.worst)
        allowed = "which has no limit" if limit is None else f"where {_share(limit, '+')} are allowed"
        return f"{_share(trial.loss, '+')} of {trial.worst!r}, {allowed}"

    def table(self) -> str:
        """All trials as a Markdown table: `*` is the chosen one, `o` the others of the frontier."""
        frontier, names = self.frontier, list(self.general)
        rows = [["", "amount", "entries", "strength", "undesired", "reduction", *names, "worst"]]
        limits = [f"{self.allowed[name]:+.1%}" if name in self.allowed else "" for name in names]
        rows.append(
            ["", "before", "", "", f"{self.undesired:.4g}", "", *(f"{self.general[name]:.4g}" for name in names), ""]
        )
        rows.append(["", "allowed", "", "", "", f"{self.reduction:.1%}", *limits, ""])
        for trial in self.curve:
            mark = "*" if trial is self.chosen else "o" if trial in frontier else ""
            losses = [f"{trial.losses[name]:+.1%}" for name in names]
            rows.append(
                [mark, f"{trial.amount:g}" if isinstance(trial.amount, float) else f"{trial.amount:,}", f"{trial.entries:,}",
                 f"{trial.strength:g}", f"{trial.undesired:.4g}", f"{trial.reduction:.1%}", *losses, trial.worst]
            )  # fmt: skip
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        lines = ["| " + " | ".join(cell.rjust(w) for cell, w in zip(row, widths, strict=True)) + " |" for row in rows]
        return "\n".join([lines[0], "|" + "|".join(f"{'-' * (w + 1)}:" for w in widths) + "|", *lines[1:]])

    def __str__(self) -> str:
        return f"{self.table()}\n{self.reason}"

    def plot(self, path: str | os.PathLike[str] | None = None) -> "Figure":
        """A figure of all trials, the reduction of the behaviour by the loss of the worst measure, with the frontier as a line.

        Args:
            path: a file to write it to; its ending says in which format. None writes none.

        Raises:
            ImportError: without matplotlib.
        """
        figure = new_figure(7.0, 4.6)
        axes = figure.add_subplot()
        frontier = self.frontier
        axes.plot(
            [100 * self._largest(trial) for trial in frontier],
            [100 * trial.reduction for trial in frontier],
            color="#0b6fb8",
            linewidth=1.6,
            label="frontier",
        )
        for index, strength in enumerate(dict.fromkeys(trial.strength for trial in self.curve)):
            some = [trial for trial in self.curve if trial.strength == strength]
            axes.plot(
                [100 * self._largest(trial) for trial in some],
                [100 * trial.reduction for trial in some],
                linestyle="",
                marker="os^vD*P"[index % 7],
                label=f"strength {strength:g}",
            )
        if self.chosen is not None:
            axes.plot([100 * self._largest(self.chosen)], [100 * self.chosen.reduction], marker="o", markersize=13,
                      markerfacecolor="none", markeredgecolor="#b0306a", linestyle="", label="chosen")  # fmt: skip
        for trial in frontier:
            axes.annotate(
                trial.worst,
                (100 * self._largest(trial), 100 * trial.reduction),
                textcoords="offset points",
                xytext=(6, -10),
                fontsize=7,
            )
        axes.axhline(100 * self.reduction, color="#9aa5b1", linewidth=1, linestyle="dashed", label="wanted")
        percent_axis(axes, (100 * trial.loss for trial in self.curve if math.isfinite(trial.loss)))
        axes.set(
            xlabel="loss of the worst measure (%)",
            ylabel="reduction of the behaviour (%)",
            title="Behaviour against side effects",
        )
        return finished(figure, axes, path)

    def _largest(self, trial: Trial) -> float:
        return trial.loss if math.isfinite(trial.loss) else math.nan


def worst_of(losses: Mapping[str, float], allowed: Mapping[str, float]) -> str:
    """The measure that is the furthest beyond its limit; what is no number is beyond all others, what has no limit behind."""
    return max(losses, key=lambda name: _known(losses[name], math.inf) - allowed.get(name, math.inf))


def _what(trial: Trial) -> str:
    return f"{trial.entries:,} entries at strength {trial.strength:g}"


def _share(value: float, sign: str = "") -> str:
    return f"{100 * value:{sign},.1f} %"


def _known(value: float, otherwise: float) -> float:
    return otherwise if math.isnan(value) else value
