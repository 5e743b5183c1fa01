"""What an audit found, in words, in numbers and as a figure."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lrp_prune.auditing.passages import Passage
from lrp_prune.figures import new_figure, saved

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CAUSES = {
    "rule": "rules that do not conserve, by design",
    "bias": "biases, which absorb relevance",
    "unruled": "operations without a rule",
    "unknown": "not known why",
}
_COLOURS = {"rule": "#0b6fb8", "bias": "#9aa5b1", "unruled": "#b2182b", "unknown": "#d9822b"}
_BARS = 20


@dataclass(frozen=True)
class Remark:
    """One thing that an audit says.

    Args:
        problem: whether something is to be done about it; False for what is as it should be, or good to know.
        about: ``"batch"``, ``"operations"``, ``"conservation"``, ``"first token"``, ``"weights"`` or ``"units"``.
        what: what was found.
        advice: what to do; empty where there is nothing to do.
    """

    problem: bool
    about: str
    what: str
    advice: str = ""


@dataclass(frozen=True)
class AuditReport:
    """What :func:`lrp_prune.audit` found; printing it says what is wrong, and what to do.

    Args:
        remarks: everything there is to say, problems first.
        composite: the rules.
        passages: each module that relevance was followed through, from the model itself on.
        causes: module -> why relevance is lost in it: a key of ``CAUSES``.
        lost: the share of the relevance that is lost on the way, of what arrived and what was lost; None if there was none.
        first_token: the share of relevance, whatever its sign, at each sample's first token; None for other models.
        unscored: weight -> why it has no relevance.
        dead: group of units -> how many have none, and of how many.
    """

    remarks: tuple[Remark, ...]
    composite: str
    passages: tuple[Passage, ...] = ()
    causes: Mapping[str, str] = field(default_factory=dict)
    lost: float | None = None
    first_token: float | None = None
    unscored: Mapping[str, str] = field(default_factory=dict)
    dead: Mapping[str, tuple[int, int]] = field(default_factory=dict)

    @property
    def problems(self) -> tuple[Remark, ...]:
        """What something is to be done about."""
        return tuple(remark for remark in self.remarks if remark.problem)

    def __str__(self) -> str:
        number = len(self.problems)
        counted = "nothing is wrong" if not number else "1 problem" if number == 1 else f"{number} problems"
        lines = [f"{counted} (rules: {self.composite})"]
        for remark in self.remarks:
            lines.append(f"{'PROBLEM' if remark.problem else 'ok':<8}{remark.about}: {remark.what}")
            if remark.advice:
                lines.append(f"        -> {remark.advice}")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "remarks": [vars(remark) for remark in self.remarks],
            "composite": self.composite,
            "passages": [{**vars(passage), "cause": self.causes.get(passage.name)} for passage in self.passages],
            "lost": self.lost,
            "first_token": self.first_token,
            "unscored": dict(self.unscored),
            "dead": {name: list(counts) for name, counts in self.dead.items()},
        }

    def plot(self, path: str | os.PathLike[str] | None = None) -> "Figure":
        """A figure: where relevance is lost and why, and which units have none.

        Args:
            path: a file to write it to; its ending says in which format. None writes none.

        Raises:
            ImportError: without matplotlib (the extra ``plots``).
        """
        whole = self._whole() or 1.0
        losing = sorted(self.causes, key=lambda name: -abs(self._own(name)))[:_BARS]
        losing = [passage.name for passage in self.passages if passage.name in losing]
        groups = list(self.dead)
        figure = new_figure(11.0, 1.7 + 0.24 * max(len(losing), len(groups), 3))
        left, right = figure.subplots(1, 2)
        left.barh(
            range(len(losing)),
            [100 * self._own(name) / whole for name in losing],
            color=[_COLOURS[self.causes[name]] for name in losing],
        )
        left.set_yticks(range(len(losing)), [name or "(the model itself)" for name in losing], fontsize="x-small")
        left.axvline(0, color="grey", linewidth=0.8)
        left.set_xlabel("% of the model's relevance (below 0: gained)")
        left.set_title("Relevance lost, by module" if losing else "No relevance is lost", fontsize="medium")
        for cause in dict.fromkeys(self.causes[name] for name in losing):
            left.bar(0, 0, color=_COLOURS[cause], label=CAUSES[cause])
        shares = [100 * none / max(total, 1) for none, total in self.dead.values()]
        right.barh(range(len(groups)), shares, color=_COLOURS["unknown"])
        right.set_yticks(range(len(groups)), groups, fontsize="x-small")
        right.set(xlim=(0, 100), xlabel="% of units")
        right.set_title("Units without relevance" if groups else "No groups of units", fontsize="medium")
        for axes in (left, right):
            axes.invert_yaxis()
            axes.grid(axis="x", alpha=0.25)
        if losing:
            figure.legend(loc="outside lower left", fontsize="small", frameon=False, ncols=2)
        return saved(figure, path)

    def _whole(self) -> float:
        return next((abs(passage.arrived) for passage in self.passages if not passage.name), 0.0)

    def _own(self, name: str) -> float:
        return next(passage.own for passage in self.passages if passage.name == name)
