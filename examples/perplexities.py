"""The table and the figure of `prune_smollm2.py`: perplexity by method and sparsity, and where weights were removed."""

import argparse
import re
from collections import defaultdict

from matplotlib.figure import Figure
from presenting import FAINT, INK, colour, new_figure, row_of, titled

import lrp_prune

Results = dict[tuple[str, float], float]
COMPENSATED = "lrp, one shot, kept weights updated"


def is_compensated(options: argparse.Namespace) -> bool:
    """Whether there is a row of it."""
    return options.compensation != "none" and "lrp" in options.methods


def sparsity_by_layer(masks: lrp_prune.Masks) -> dict[str, dict[int, float]]:
    """Sorts the sparsity of each tensor by its kind (`q_proj`, ...) and by its depth, the first number in its name."""
    kinds: dict[str, dict[int, float]] = defaultdict(dict)
    for name, kept in masks.items():
        depth = re.search(r"\.(\d+)\.", name)
        if depth:
            kinds[name.removesuffix(".weight").rsplit(".", 1)[-1]][int(depth[1])] = 1 - kept.float().mean().item()
    return kinds


class Table:
    """The perplexities as a Markdown table, whose rows can be shown as they are measured.

    Args:
        options: of the script: `methods`, `sparsities`, `sparsity`, `rounds`, `steps`.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.tuned_label = f"lrp, {options.rounds} rounds of {options.steps} training steps"
        labels = ["dense, nothing removed", *(f"{method}, one shot" for method in options.methods), self.tuned_label]
        labels += [COMPENSATED] if is_compensated(options) else []
        self.widths = [max(map(len, labels)), *[10] * len(options.sparsities)]

    def _row(self, *cells: str) -> str:
        return row_of(cells, self.widths)

    def head(self) -> str:
        """The heading and the rule under it."""
        shown = [f"{100 * sparsity:g} %" for sparsity in self.options.sparsities]
        return self._row("perplexity", *shown) + "\n" + self._row(*["---"] * (1 + len(shown)))

    def dense(self, value: float) -> str:
        """The model as it was, which is the same for every sparsity."""
        return self._row("dense, nothing removed", *[f"{value:.2f}"] * len(self.options.sparsities))

    def one_shot(self, method: str, results: Results) -> str:
        """A method at each sparsity."""
        return self._row(f"{method}, one shot", *(f"{results[method, each]:.2f}" for each in self.options.sparsities))

    def tuned(self, value: float) -> str:
        """The rounds with training, at their sparsity."""
        return self._at_one_sparsity(self.tuned_label, value)

    def compensated(self, results: Results) -> str:
        """LRP with what it keeps updated, at one sparsity."""
        return self._at_one_sparsity(COMPENSATED, results[COMPENSATED, self.options.sparsity])

    def _at_one_sparsity(self, label: str, value: float) -> str:
        options = self.options
        return self._row(label, *(f"{value:.2f}" if s == options.sparsity else "" for s in options.sparsities))

    def whole(self, dense: float, results: Results, tuned: float | None) -> str:
        """All rows."""
        rows = [self.head(), self.dense(dense)]
        for method in self.options.methods:
            rows.append(self.one_shot(method, results))
            if method == "lrp" and is_compensated(self.options):
                rows.append(self.compensated(results))
        return "\n".join(rows if tuned is None else [*rows, self.tuned(tuned)])


def plot(
    dense: float, results: Results, tuned: float | None, masks: lrp_prune.Masks, options: argparse.Namespace
) -> Figure:
    """Draws the perplexity by sparsity and method, and the sparsity by layer of the LRP mask."""
    figure, (left, right) = new_figure(11, 4.4, columns=2)
    left.axhline(dense, color=INK, linewidth=1, linestyle="dashed", label="dense")
    for index, method in enumerate(options.methods):
        values = [results[method, sparsity] for sparsity in options.sparsities]
        shares = [100 * sparsity for sparsity in (0.0, *options.sparsities)]
        width = 2.4 if method == "lrp" else 1.4
        left.plot(shares, [dense, *values], marker="o", color=colour(method, index), linewidth=width, label=method)
    stars: list[tuple[str, float, str]] = []
    if tuned is not None:
        label = f"lrp, {options.rounds} rounds of {options.steps} steps"
        stars = [("*", tuned, label)]
    if is_compensated(options):
        stars.append(("D", results[COMPENSATED, options.sparsity], "lrp, kept weights updated"))
    for marker, value, label in stars:
        style = {"markersize": 14 if marker == "*" else 8, "color": colour("lrp"), "markeredgecolor": "white"}
        left.plot([100 * options.sparsity], [value], marker, label=label, **style)
    left.set_yscale("log")
    ticks = [
        value for value in (10, 20, 30, 50, 100, 200, 500, 1000, 2000, 5000) if _near(value, [dense, *results.values()])
    ]
    left.set_yticks(ticks, [f"{tick:,}" for tick in ticks])
    left.set_yticks([], minor=True)
    titled(left, "Perplexity on held-out text", "weights removed (%)", "")
    left.legend(frameon=False, fontsize=9)
    for index, (kind, depths) in enumerate(sparsity_by_layer(masks).items()):
        order = sorted(depths)
        right.plot(
            order, [100 * depths[depth] for depth in order], color=colour(kind, index), linewidth=1.6, label=kind
        )
    right.axhline(100 * masks.sparsity, color=FAINT, linewidth=1, linestyle="dotted")
    right.set_ylim(0, 100)
    titled(right, f"Where {100 * masks.sparsity:.0f} % were removed", "layer", "removed (%)")
    right.legend(ncols=3, frameon=False, fontsize=9, loc="lower center")
    return figure


def _near(value: float, measured: list[float]) -> bool:
    return 0.8 * min(measured) <= value <= 1.2 * max(measured)
