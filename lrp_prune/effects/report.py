"""What a correction did to everything else: one line for each entry of a suite, the worst first."""

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from lrp_prune.effects.intervals import Interval
from lrp_prune.effects.limits import ALLOWED, checked_limits, limit_of
from lrp_prune.figures import new_figure, percent_axis, saved

if TYPE_CHECKING:
    from matplotlib.figure import Figure


_SAID = 3
"""How many of what is beyond its limit a verdict has the figures of; the others are named."""


class SideEffectError(ValueError):
    """A correction makes something worse than is allowed."""


@dataclass(frozen=True)
class Effect:
    """One entry of a suite, before and after; each value with its interval over samples.

    Args:
        name: of the entry, and of the line if it has several.
        unit: of the values.
        directed: whether more is worse; what is not is only described.
        samples: how many there were.
        before: the value of the model before.
        after: of the corrected one.
        change: after over before, minus 1, on the same samples.
        divergence: of next-token distributions from those before, in nats; None where there are none.
        beside: the changes by what it is compared with, one for each seed.
    """

    name: str
    unit: str
    directed: bool
    samples: int
    before: Interval
    after: Interval
    change: Interval
    divergence: float | None = None
    beside: dict[str, list[float]] = field(default_factory=dict)

    @property
    def badness(self) -> float:
        """What lines are ordered by; what is no number is the worst, and what is only described the last."""
        if not self.directed:
            return -math.inf
        return math.inf if math.isnan(self.change.value) else self.change.value


@dataclass(frozen=True)
class SideEffects:
    """All lines, the worst first, and what could not be measured; printing it gives a table.

    Args:
        effects: the lines, in any order.
        missing: what the suite has not, and why.
        suite: the fingerprint of the suite's samples.

    Example:
        >>> def effect(name, before, after):
        ...     change = after / before - 1
        ...     return Effect(name, "perplexity", True, 8, *(Interval(value, value, value) for value in (before, after, change)))
        >>> effects = SideEffects([effect("speeches", 20.0, 20.2), effect("copying", 4.0, 6.0)])
        >>> effects.worst.name, [effect.name for effect in effects.beyond({"*": 0.02})]
        ('copying', ['copying'])
        >>> print(effects)
        | entry    | before (95 %) |        after (95 %) |            change (95 %) | KL to before | samples |
        |:---------|--------------:|--------------------:|-------------------------:|-------------:|--------:|
        | copying  |    4 (4 to 4) |          6 (6 to 6) | +50.0 % (+50.0 to +50.0) |              |       8 |
        | speeches | 20 (20 to 20) | 20.2 (20.2 to 20.2) |    +1.0 % (+1.0 to +1.0) |              |       8 |
    """

    effects: Sequence[Effect]
    missing: Mapping[str, str] = field(default_factory=dict)
    suite: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "effects", sorted(self.effects, key=lambda effect: -effect.badness))

    def __getitem__(self, name: str) -> Effect:
        for effect in self.effects:
            if effect.name == name:
                return effect
        raise KeyError(f"no {name!r} was measured, but {', '.join(effect.name for effect in self.effects)}")

    @property
    def worst(self) -> Effect:
        """The line that became worse the most."""
        return self.effects[0]

    def beyond(self, allowed: Mapping[str, float] | float = ALLOWED) -> list[Effect]:
        """The lines that are worse than is allowed, the furthest beyond its limit first.

        Args:
            allowed: the largest change by name or pattern, the most exact one counts: ``{"*": 0.02, "copying": 0.05}``. A number
                is for everything. What is only described is held to limits of its own name only, either way.
        """
        limits = checked_limits(allowed, [effect.name for effect in self.effects])
        found = [(effect, limit_of(effect.name, limits, effect.directed)) for effect in self.effects]
        over = [(excess(effect, limit), effect) for effect, limit in found if limit is not None]
        return [effect for amount, effect in sorted(over, key=lambda pair: -pair[0]) if amount > 0]

    def check(self, allowed: Mapping[str, float] | float = ALLOWED, what: str = "the correction") -> None:
        """Refuse what is worse than is allowed.

        Raises:
            SideEffectError: naming what became worse, by how much, and the limit.
        """
        over = self.beyond(allowed)
        if over:
            raise SideEffectError(self.verdict(allowed, what))

    def verdict(self, allowed: Mapping[str, float] | float = ALLOWED, what: str = "the correction") -> str:
        """Whether everything is within its limit, in a sentence that names what is not, or what is worst."""
        limits = checked_limits(allowed, [effect.name for effect in self.effects])
        over = self.beyond(limits)
        if not over:
            worst = self.worst
            return f"{what} is within its limits: the worst is {worst.name!r} with {_percent(worst.change.value)} {worst.unit}"
        said = [
            f"{effect.name!r} by {_percent(effect.change.value)} ({effect.unit} {effect.before.value:.4g} to "
            f"{effect.after.value:.4g}; allowed {_percent(limit_of(effect.name, limits, effect.directed) or 0.0)})"
            for effect in over[:_SAID]
        ]
        rest = f"; and {', '.join(repr(effect.name) for effect in over[_SAID:])}" if over[_SAID:] else ""
        return (
            f"{what} changes {'; '.join(said)}{rest}: weaken it by a smaller strength or amount, collect general relevance on "
            f"such text too, or allow it{_as_in(over[0])}"
        )

    def table(self) -> str:
        """The lines as a Markdown table whose columns stand under each other."""
        labels = list(dict.fromkeys(label for effect in self.effects for label in effect.beside))
        header = ["entry", "before (95 %)", "after (95 %)", "change (95 %)", *labels, "KL to before", "samples"]
        rows = [header, *(_cells(effect, labels) for effect in self.effects)]
        widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
        rule = "|".join(f":{'-' * (w + 1)}" if not column else f"{'-' * (w + 1)}:" for column, w in enumerate(widths))
        lines = [
            "| "
            + " | ".join(
                cell.rjust(w) if column else cell.ljust(w)
                for column, (cell, w) in enumerate(zip(row, widths, strict=True))
            )
            + " |"
            for row in rows
        ]
        return "\n".join([lines[0], f"|{rule}|", *lines[1:]])

    def __str__(self) -> str:
        return "\n".join([self.table(), *(f"not measured: {name} ({why})" for name, why in self.missing.items())])

    def plot(self, path: str | os.PathLike[str] | None = None, allowed: float | None = ALLOWED["*"]) -> "Figure":
        """A figure of the changes with their intervals, the worst on top, beside the range of what they are compared with.

        Args:
            path: a file to write it to; its ending says in which format. None writes none.
            allowed: a limit that is drawn; None draws none.

        Raises:
            ImportError: without matplotlib.
        """
        figure = new_figure(7.5, 1.4 + 0.32 * len(self.effects))
        axes = figure.add_subplot()
        for row, effect in enumerate(reversed(self.effects)):
            value, low, high = (100 * number for number in effect.change)
            colour = "#0b6fb8" if effect.directed else "#9aa5b1"
            axes.plot([low, high], [row, row], color=colour, linewidth=2, solid_capstyle="butt")
            axes.plot([value], [row], marker="o", markersize=5, color=colour, clip_on=False)  # whole at the edge, too
            for number, values in enumerate(effect.beside.values()):
                axes.plot(
                    [100 * each for each in values],
                    [row - 0.25 - 0.1 * number] * len(values),
                    linestyle="",
                    marker="|",
                    markersize=7,
                    color="#7b8794",
                )
        axes.axvline(0, color="black", linewidth=0.9)
        if allowed is not None:
            axes.axvline(
                100 * allowed, color="#b0306a", linewidth=0.9, linestyle="dashed", label=f"{allowed:.0%} allowed"
            )
            figure.legend(loc="outside lower right", fontsize="small", frameon=False)
        percent_axis(axes, (100 * each for effect in self.effects for each in effect.change if math.isfinite(each)))
        axes.set_yticks(range(len(self.effects)), [effect.name for effect in reversed(self.effects)])
        labels = list(dict.fromkeys(label for effect in self.effects for label in effect.beside))
        beside = f"; ticks: {', '.join(labels)}" if labels else ""
        axes.set(xlabel=f"change (%), with 95 % over samples{beside}", title="Side effects, the worst first")
        axes.grid(axis="x", alpha=0.25)
        return saved(figure, path)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON and for a patch's description; what is no number is None."""
        return {
            "suite": self.suite,
            "missing": dict(self.missing),
            "effects": [_plain(asdict(effect)) for effect in self.effects],
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "SideEffects":
        """What :meth:`to_dict` gave."""
        return cls([_effect(row) for row in values["effects"]], dict(values["missing"]), values["suite"])


def excess(effect: Effect, limit: float) -> float:
    """By how much a line is beyond its limit, more than 0 if it is; what is no number is infinitely far beyond."""
    change = effect.change.value
    if math.isnan(change):
        return math.inf
    return (change if effect.directed else abs(change)) - limit


def _as_in(effect: Effect) -> str:
    """A limit that a line is just within; none for what is no number, which no limit allows."""
    size = abs(effect.change.value)
    return f", as in allowed={{{effect.name!r}: {math.ceil(1000 * size) / 1000:.10g}}}" if math.isfinite(size) else ""


def _cells(effect: Effect, labels: Sequence[str]) -> list[str]:
    before, after = (
        f"{_short(each.value)} ({_short(each.low)} to {_short(each.high)})" for each in (effect.before, effect.after)
    )
    change = (
        f"{_percent(effect.change.value)} ({_percent(effect.change.low, '')} to {_percent(effect.change.high, '')})"
    )
    beside = []
    for label in labels:
        values = effect.beside.get(label, [])
        ends = [_percent(value) for value in values[:1]]
        if len(values) > 1:
            ends = [_percent(min(values), ""), _percent(max(values))]
        beside.append(" to ".join(ends))
    divergence = "" if effect.divergence is None else f"{effect.divergence:.4f}"
    return [effect.name, before, after, change, *beside, divergence, str(effect.samples)]


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _percent(share: float, unit: str = " %") -> str:
    return f"{100 * share:+,.0f}{unit}" if abs(share) >= 10 else f"{100 * share:+.1f}{unit}"


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _effect(row: Mapping[str, Any]) -> Effect:
    values = {
        name: Interval(*(math.nan if each is None else each for each in row[name]))
        for name in ("before", "after", "change")
    }
    return Effect(**{**row, **values})
