"""What a search found: the winner, how it does on data that nothing was chosen by, and all that was tried."""

import io
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lrp_prune.engine import composite_text
from lrp_prune.engine.composites import Composite
from lrp_prune.figures import new_figure, saved
from lrp_prune.pruning.methods import LRP
from lrp_prune.pruning.scope import Scope

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_WIDTH = 120
_SHOWN = 10


@dataclass(frozen=True)
class Tried:
    """One trial.

    Args:
        number: in the order in which they were settled.
        chosen: the choice on each axis.
        value: of the metric on the selection part; None if it was given up, or failed.
        curve: the values by rate, as far as they were measured.
        why: it has no value.
    """

    number: int
    chosen: dict[str, str]
    value: float | None
    curve: dict[float, float]
    why: str = ""


@dataclass(frozen=True)
class Judged:
    """A composite on the selection and on the test part: the metric, and the values by rate."""

    selection: float
    test: float
    selection_curve: dict[float, float]
    test_curve: dict[float, float]


@dataclass(frozen=True)
class CompositeSearch:
    """The result of :func:`lrp_prune.search_composite`; printing it says what was chosen, and what that gains.

    Args:
        composite: the winner.
        scope: how its relevance is ranked.
        statistic: that it is collected in.
        granularity: of what is pruned.
        chosen: the choice on each axis.
        searched: the winner, on both parts.
        plain: the base composite (plain epsilon), with the usual ranking, on both parts.
        base: the name of the base.
        tried: all trials.
        importance: of each axis for the metric, of sum 1.
        metric: its name.
        maximized: whether more is better.
        exhausted: whether everything that there was to choose has been tried.
    """

    composite: Composite
    scope: Scope
    statistic: Any
    granularity: Any
    chosen: dict[str, str]
    searched: Judged
    plain: Judged
    base: str
    tried: tuple[Tried, ...]
    importance: dict[str, float]
    metric: str
    maximized: bool
    exhausted: bool = False

    @property
    def method(self) -> LRP:
        """The winner as a method: ``prune(model, batches, 0.5, result.method, result.scope, granularity=result.granularity)``."""
        return LRP(composite=self.composite, statistic=self.statistic)

    @property
    def gain(self) -> float:
        """By how much the winner is better than the plain base on the test part; negative if it is worse."""
        difference = self.searched.test - self.plain.test
        return difference if self.maximized else -difference

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the winner to a file that is accepted wherever a composite is; how it is ranked stands in its first lines.

        Raises:
            ValueError: for a file that does not end in ``.yaml``, or a rule without a name.
        """
        head = "\n".join(
            f"# {line}" for line in (*str(self).splitlines(), f"statistic={self.statistic!r}, scope={self.scope!r}")
        )
        composite_text.save(f"{head}\n{self.composite.to_yaml()}", path)

    def __str__(self) -> str:
        given_up = sum(trial.value is None for trial in self.tried)
        what = ", ".join(f"{axis}: {choice}" for axis, choice in self.chosen.items()) or "the only choice"
        all_of = f"all {len(self.tried)} choices" if self.exhausted else f"{len(self.tried)} trials"
        lines = [f"Of {all_of} ({given_up} without a result), the best is {what}."]
        if self.searched.selection_curve == self.plain.selection_curve:
            lines.append(
                f"It prunes as plain {self.base} does: {self.metric} {self.searched.test:.4f} on the test part."
            )
            return "\n".join(lines)
        verb = "beats" if self.gain > 0 else "is behind" if self.gain < 0 else "equals"
        by = f" by {abs(self.gain):.4f}" if self.gain else ""
        if math.isnan(self.gain):
            verb, by = "cannot be compared with", ""
        lines.append(
            f"Its {self.metric} on the test part, by which nothing was chosen, is {self.searched.test:.4f}, and {verb} plain "
            f"{self.base} ({self.plain.test:.4f}){by}; on the selection part {self.searched.selection:.4f} "
            f"against {self.plain.selection:.4f}."
        )
        return "\n".join(lines)

    def ranked(self) -> list[Tried]:
        """The trials with a value, the best first."""
        known = [(trial.value, trial) for trial in self.tried if trial.value is not None]
        return [trial for _, trial in sorted(known, key=lambda pair: -pair[0] if self.maximized else pair[0])]

    def table(self, trials: int = _SHOWN) -> str:
        """The best trials as text."""
        from rich.box import SIMPLE_HEAD
        from rich.console import Console
        from rich.table import Table

        table = Table(box=SIMPLE_HEAD)
        for column in ("trial", self.metric, *self.chosen):
            table.add_column(column, overflow="fold")
        for trial in self.ranked()[:trials]:
            table.add_row(str(trial.number), f"{trial.value:.4f}", *trial.chosen.values())
        buffer = io.StringIO()
        Console(file=buffer, width=_WIDTH).print(table)
        return "\n".join(line.rstrip() for line in buffer.getvalue().splitlines() if line.strip())

    def plot(self, path: str | os.PathLike[str] | None = None) -> "Figure":
        """A figure: the trials, how much each choice matters, and the winner beside the plain base on the test part.

        Args:
            path: a file to write it to; its ending says in which format. None writes none.

        Raises:
            ImportError: without matplotlib.
        """
        figure = new_figure(13.0, 4.0)
        history, importance, curves = figure.subplots(1, 3)
        known = [(trial.number, trial.value) for trial in self.tried if trial.value is not None]
        history.scatter(*zip(*known, strict=True), s=14, label="trial")
        best = [
            max(self._until(number), default=0.0) if self.maximized else min(self._until(number)) for number, _ in known
        ]
        history.step([number for number, _ in known], best, where="post", color="C1", label="best so far")
        left = [trial.number for trial in self.tried if trial.value is None]
        low = min(value for _, value in known)
        history.scatter(left, [low] * len(left), s=14, marker="x", color="grey", label="without a result")
        history.axhline(
            self.plain.selection, color="black", linewidth=0.9, linestyle="dashed", label=f"plain {self.base}"
        )
        history.set(xlabel="trial", ylabel=f"{self.metric} (selection)", title="Trials")
        history.legend(fontsize="small", frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2)
        shares = sorted(self.importance.items(), key=lambda item: item[1])
        importance.barh([axis for axis, _ in shares], [share for _, share in shares])
        importance.set(xlabel="share of importance", title="What the choices matter")
        for label, curve in (("searched", self.searched.test_curve), (f"plain {self.base}", self.plain.test_curve)):
            curves.plot([100 * rate for rate in curve], list(curve.values()), marker="o", markersize=3, label=label)
        curves.set(xlabel="pruned (%)", ylabel="value", title="On the test part")
        curves.legend(fontsize="small", frameon=False)
        for axes in (history, importance, curves):
            axes.grid(alpha=0.25)
        return saved(figure, path)

    def _until(self, number: int) -> list[float]:
        return [trial.value for trial in self.tried if trial.value is not None and trial.number <= number]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON or a data frame."""
        return {
            "composite": self.composite.description,
            "chosen": dict(self.chosen),
            "metric": self.metric,
            "searched": {"selection": self.searched.selection, "test": self.searched.test},
            self.base: {"selection": self.plain.selection, "test": self.plain.test},
            "importance": dict(self.importance),
            "trials": [
                {"number": trial.number, "value": trial.value, "why": trial.why, **trial.chosen} for trial in self.tried
            ],
        }


def tried_of(trials: Sequence[Any], rates: Sequence[float], why: str, curve: str) -> tuple[Tried, ...]:
    """Optuna's finished trials as ours.

    Args:
        trials: frozen ones.
        rates: of the curves.
        why, curve: the names of what is kept with them.
    """
    found = []
    for trial in trials:
        kept: Mapping[str, Any] = trial.user_attrs
        value = None if why in kept else trial.value
        values = dict(zip(rates, kept.get(curve, ()), strict=False))
        found.append(Tried(trial.number, dict(trial.params), value, values, kept.get(why, "")))
    return tuple(found)
