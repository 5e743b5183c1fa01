"""Table and figures of the panel's results."""

from collections.abc import Sequence
from pathlib import Path
from sys import path as search_path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

search_path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))
from presenting import INK, colour, new_figure, titled

SIMPLE = ("wanda, not recalibrated", "wanda", "magnitude", "magnitude, not recalibrated", "magnitude, global",
          "magnitude, global, not recalibrated")  # fmt: skip


def _mean(found: Sequence[dict[str, Any]], **wanted: Any) -> float | None:
    values = [entry["share"] for entry in found if all(entry[name] == value for name, value in wanted.items())]
    return float(np.mean(values)) if values else None


def _unique(found: Sequence[dict[str, Any]], name: str) -> list[Any]:
    return list(dict.fromkeys(entry[name] for entry in found))


def _complete(found: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each model and seed all methods at all sparsities or nothing: means over different models compare nothing."""
    wanted = {(entry["method"], entry["sparsity"]) for entry in found}
    have: dict[tuple[str, int], set[Any]] = {}
    for entry in found:
        have.setdefault((entry["case"], entry["seed"]), set()).add((entry["method"], entry["sparsity"]))
    return [entry for entry in found if have[entry["case"], entry["seed"]] == wanted]


def table(found: Sequence[dict[str, Any]]) -> str:
    """Mean share of the dense advantage, mean rank and worst case, by method and sparsity; one shot, and in rounds."""
    lines = []
    for rounds in sorted(_unique(found, "rounds")):
        here = _complete([entry for entry in found if entry["rounds"] == rounds])
        sparsities, methods, cases = (sorted(_unique(here, "sparsity")), _unique(here, "method"), _unique(here, "case"))
        lines += [
            f"{len(cases)} models, {len(_unique(here, 'seed'))} seeds, "
            + ("one shot" if rounds == 1 else f"{rounds} rounds with training")
            + ": mean share of the dense advantage that is kept (worst model); rank is the mean over models and sparsities",
            "",
            "| method | " + " | ".join(f"{value:.0%}" for value in sparsities) + " | rank |",
            "|---|" + "---|" * (len(sparsities) + 1),
        ]
        ranks: dict[str, list[float]] = {method: [] for method in methods}
        for case in cases:
            for sparsity in sparsities:
                means = {method: _mean(here, case=case, sparsity=sparsity, method=method) for method in methods}
                known = {method: value for method, value in means.items() if value is not None}
                for method, value in known.items():
                    ranks[method].append(1 + sum(other > value + 1e-9 for other in known.values()))
        for method in methods:
            cells = []
            for sparsity in sparsities:
                each = [_mean(here, case=case, sparsity=sparsity, method=method) for case in cases]
                values = [value for value in each if value is not None]
                cells.append(f"{np.mean(values):.3f} ({min(values):.2f})" if values else "")
            lines.append(f"| {method} | " + " | ".join(cells) + f" | {np.mean(ranks[method]):.1f} |")
        lines += ["", *_shortfalls(here, cases, sparsities), ""]
    return "\n".join(lines)


def _shortfalls(here: Sequence[dict[str, Any]], cases: Sequence[str], sparsities: Sequence[float]) -> list[str]:
    """Where the default is worse than the best of the simple methods by more than three points."""
    told = []
    for case in cases:
        for sparsity in sparsities:
            mine = _mean(here, case=case, sparsity=sparsity, method="lrp")
            others = {name: _mean(here, case=case, sparsity=sparsity, method=name) for name in SIMPLE}
            best = max(((value, name) for name, value in others.items() if value is not None), default=None)
            if mine is not None and best is not None and best[0] > mine + 0.03:
                told.append(f"{case} at {sparsity:.0%}: {mine:.2f}, {best[1]} {best[0]:.2f}")
    return [
        f"lrp is more than 0.03 behind the best of wanda and magnitude at: {'; '.join(told) or 'no model and sparsity'}"
    ]


_STYLES = {
    "no floor": "-.",
    "by row": (0, (1, 3)),
    "global, not recalibrated": "-.",
    "not recalibrated": ":",
    "global": "--",
    "": "-",
}
"""Lines of a method's variants, which have its colour: the first whose words are in the name."""


def overview(found: Sequence[dict[str, Any]], path: Path) -> Path:
    """All models together: the mean share that is kept by each method, and the worst model's, one shot."""
    here = [entry for entry in found if entry["rounds"] == 1]
    sparsities, cases = sorted(_unique(here, "sparsity")), _unique(here, "case")
    drawn, axes = new_figure(11, 4.2, columns=2)
    for method in ("lrp", "magnitude", "wanda", "random", "gradient"):
        each = [[_mean(here, case=case, sparsity=value, method=method) for case in cases] for value in sparsities]
        kept = np.array([[np.nan if share is None else share for share in shares] for shares in each], dtype=float)
        for axis, values in zip(axes, (kept.mean(1), kept.min(1)), strict=True):
            style = "--" if method == "gradient" else "-"  # which lies on that of lrp
            width = 3.4 if method == "lrp" else 1.6
            shares = [100 * sparsity for sparsity in sparsities]
            axis.plot(shares, values, style, marker="o", color=colour(method), linewidth=width, label=method)
    for axis, title in zip(axes, (f"Mean of {len(cases)} models", "The worst of them"), strict=True):
        axis.set_ylim(-0.03, 1.06)
        axis.axhline(1, color=INK, linewidth=1, linestyle="dashed")
        titled(axis, title, "weights removed (%)", "share of what the dense model can do")
    axes[0].legend(frameon=False, fontsize=10, loc="lower left")
    drawn.savefig(path, dpi=110)
    return path


def figure(found: Sequence[dict[str, Any]], path: Path) -> Path:
    """One small plot a model: what is kept by sparsity, one shot."""
    here = [entry for entry in found if entry["rounds"] == 1]
    cases, methods = _unique(here, "case"), [name for name in _unique(here, "method") if "round" not in name]
    rows = -(-len(cases) // 4)
    drawn = Figure(figsize=(14, 2.6 * rows + 1), layout="constrained")
    axes = np.atleast_1d(drawn.subplots(rows, 4, sharex=True, sharey=True)).reshape(-1)
    for axis, case in zip(axes, cases, strict=False):
        for method in methods:
            sparsities = sorted(_unique(here, "sparsity"))
            shares = [_mean(here, case=case, sparsity=sparsity, method=method) for sparsity in sparsities]
            bold = method == "lrp"
            style = next(style for words, style in _STYLES.items() if words in method)
            axis.plot(
                [100 * value for value in sparsities], [np.nan if share is None else share for share in shares], linestyle=style,
                label=method, linewidth=2.6 if bold else 1.2, color=colour(method.split(",")[0]), zorder=3 if bold else 2,
            )  # fmt: skip
        titled(axis, case, "", "")
        axis.set_ylim(-0.03, 1.08)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", alpha=0.25)
    for axis in axes[len(cases) :]:
        axis.set_visible(False)
    for axis in axes[max(len(cases) - 4, 0) : len(cases)]:
        axis.set_xlabel("weights removed (%)")
    drawn.supylabel("share of what the dense model can do")
    if len(cases):
        handles, labels = axes[0].get_legend_handles_labels()
        drawn.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=9, frameon=False)
    drawn.savefig(path, dpi=75)
    return path
