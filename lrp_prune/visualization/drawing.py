"""Figures of explanations: coloured text, heat maps over images, bars of features, relevance through layers."""

import os
import textwrap
from typing import TYPE_CHECKING, Any

from lrp_prune.figures import new_figure, saved, shortened
from lrp_prune.visualization.colours import colour_map, hexadecimal, ink_on
from lrp_prune.visualization.parts import Pixels, Tokens

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from lrp_prune.visualization.explanation import Explanation

_WIDTH = 9.0
_POINTS, _LINE = 9.0, 0.24
"""The size of text in points, and the height of a line of it in inches."""
_LETTER = 0.602 * _POINTS / 72
"""The width in inches of a letter of DejaVu Sans Mono."""
_MARGIN = 0.15
_LINE_WIDTH = _WIDTH - 2 * _MARGIN - 0.3
_TITLE = 100
"""Letters of a title's line, of which it has two at most."""
_BARS, _IMAGE = 2.4, 2.6
_MOST_BARS = 30
_UNDER = 20
"""Letters of a name under an axis."""
_TEXT = ("tokens", "ids")


def plot_explanation(explanation: "Explanation", path: str | os.PathLike[str] | None, samples: int) -> "Figure":
    """See :meth:`~lrp_prune.Explanation.plot`."""
    if samples < 1:
        raise ValueError(f"samples must be 1 or more, got {samples}")
    number = min(samples, len(explanation))
    entries = [(sample, name, part) for sample in range(number) for name, part in explanation.inputs.items()]
    heights = [_height(part, sample) for sample, _, part in entries]
    figure = new_figure(_WIDTH, 0.5 + sum(heights))
    shown = "" if number == len(explanation) else f" (the first {number} of {len(explanation)} samples)"
    title = f"What speaks for (red) and against (blue) {explanation.target}{shown}"
    figure.suptitle("\n".join(textwrap.wrap(title, _TITLE, max_lines=2, placeholder=" ...")), fontsize="medium")
    grid = figure.add_gridspec(len(entries), 1, height_ratios=heights)
    for row, (sample, name, part) in enumerate(entries):
        largest = explanation.largest(sample) or 1.0
        title = _title(explanation, sample, name)
        if isinstance(part, Pixels):
            _draw_image(figure, grid[row], part, sample, title)
            continue
        axes = figure.add_subplot(grid[row])
        axes.set_title(title, loc="left", fontsize="small")
        if part.kind in _TEXT:
            _draw_text(axes, part, sample, largest, heights[row])
        else:
            _draw_bars(axes, part, sample)
    return saved(figure, path)


def _title(explanation: "Explanation", sample: int, name: str) -> str:
    known = explanation.value_of(sample)
    value = "" if known is None else f", explained value {known:.4g}"
    return f"sample {sample}{value}: {name}" if len(explanation) > 1 else f"{name}{value}"


def _height(part: Tokens | Pixels, sample: int) -> float:
    if isinstance(part, Pixels):
        return _IMAGE
    if part.kind not in _TEXT:
        return _BARS
    return 0.4 + _LINE * (1 + max((line for line, _, _ in _laid_out(part, sample)), default=0))


def _laid_out(part: Tokens, sample: int) -> list[tuple[int, float, str]]:
    """The line of each token, where it begins in inches, and its text; a word goes on in the next line if it must."""
    found: list[tuple[int, float, str]] = []
    line, place = 0, 0.0
    for label, _ in part.of(sample):
        text = label.replace("\n", "↵").replace("\t", "→") or " "
        text = f" {text} " if part.kind == "ids" else text
        text = shortened(text, int(_LINE_WIDTH / _LETTER))
        width = _LETTER * len(text)
        if place and place + width > _LINE_WIDTH:
            line, place = line + 1, 0.0
        found.append((line, place, text))
        place += width
        if label.endswith("\n"):
            line, place = line + 1, 0.0
    return found


def _draw_text(axes: Any, part: Tokens, sample: int, largest: float, height: float) -> None:
    from matplotlib.patches import Rectangle

    lines = max((height - 0.4) / _LINE, 1.0)
    axes.set(xlim=(0, _WIDTH - 2 * _MARGIN), ylim=(lines, 0))
    axes.axis("off")
    for (line, place, text), (_, value) in zip(_laid_out(part, sample), part.of(sample), strict=True):
        share = value / largest
        box = Rectangle((place, line + 0.08), _LETTER * len(text), 0.84, color=hexadecimal(share), linewidth=0)
        axes.add_patch(box)
        axes.text(
            place,
            line + 0.5,
            text,
            fontsize=_POINTS,
            family="monospace",
            color=ink_on(share),
            va="center",
        )


def _draw_bars(axes: Any, part: Tokens, sample: int) -> None:
    entries = part.of(sample)
    if part.kind == "features" and len(entries) > _MOST_BARS:
        entries = sorted(entries, key=lambda entry: -abs(entry[1]))[:_MOST_BARS]
        axes.set_title(
            f"{axes.get_title(loc='left')}, the {_MOST_BARS} of most relevance", loc="left", fontsize="small"
        )
    values = [value for _, value in entries]
    largest = max((abs(value) for value in values), default=0.0) or 1.0
    colours = [hexadecimal(0.85 if value > 0 else -0.85) for value in values]
    axes.bar(range(len(values)), values, color=colours, width=0.8)
    axes.axhline(0, color="grey", linewidth=0.8)
    step = max(len(entries) // 40, 1)
    ticks = range(0, len(entries), step)
    names = [shortened(entries[tick][0], _UNDER) for tick in ticks]
    axes.set_xticks(ticks, names, rotation=45, ha="right", fontsize="x-small")
    axes.set_ylim(
        -1.15 * largest if min(values, default=0) < 0 else 0, 1.15 * largest if max(values, default=0) > 0 else 0
    )
    axes.set_ylabel("relevance", fontsize="small")
    axes.grid(axis="y", alpha=0.25)


def _draw_image(figure: "Figure", place: Any, part: Pixels, sample: int, title: str) -> None:
    inner = place.subgridspec(1, 3)
    image, heat = part.images()[sample].numpy(), part.heat[sample].numpy()
    largest = float(abs(heat).max()) or 1.0
    for column, name in enumerate(("the image", "relevance over it", "relevance")):
        axes = figure.add_subplot(inner[column])
        axes.axis("off")
        axes.set_title(f"{title}\n{name}" if column == 0 else name, loc="left", fontsize="small")
        if column < 2:
            axes.imshow(image if column == 0 else image.mean(-1), cmap="gray", vmin=0, vmax=1)
        if column > 0:
            shown = axes.imshow(
                heat,
                cmap=colour_map(),
                vmin=-largest,
                vmax=largest,
                alpha=_veil(heat, largest) if column == 1 else None,
            )
        if column == 2:
            figure.colorbar(shown, ax=axes, shrink=0.8)


def _veil(heat: Any, largest: float) -> Any:
    """How much of the heat map lies over the image: more where it says more."""
    return 0.85 * (abs(heat) / largest) ** 0.5


def plot_layers(explanation: "Explanation", path: str | os.PathLike[str] | None, sample: int) -> "Figure":
    """See :meth:`~lrp_prune.Explanation.plot_layers`."""
    one = explanation[sample]
    if not one.layers:
        raise ValueError("no layers were explained: pass latent=[...] to explain, such as latent=['model.layers.*']")
    rows = {name: values[0] for name, values in one.layers.items()}
    width = max(len(values) for values in rows.values())
    other = [name for name, values in rows.items() if len(values) != width]
    rows = {name: values for name, values in rows.items() if name not in other}
    table = [(values / values.abs().sum().clamp(min=1e-30)).tolist() for values in rows.values()]
    largest = max(abs(value) for row in table for value in row) or 1.0
    labels = next(
        (
            part.labels[0]
            for part in one.inputs.values()
            if isinstance(part, Tokens) and part.relevance.shape[1] == width and len(part.labels[0]) == width
        ),
        None,
    )
    figure = new_figure(max(6.5, min(2.5 + 0.26 * width, 16.0)), 1.6 + 0.26 * len(rows))
    axes = figure.add_subplot()
    shown = axes.imshow(table, cmap=colour_map(), vmin=-largest, vmax=largest, aspect="auto", interpolation="nearest")
    axes.set_yticks(range(len(rows)), list(rows), fontsize="x-small")
    if labels is not None and width <= 80:
        axes.set_xticks(
            range(width), [shortened(label.strip(), _UNDER) or "·" for label in labels], rotation=90, fontsize="x-small"
        )
    left_out = textwrap.wrap(f"(left out, of other lengths: {', '.join(other)})", 80, max_lines=2) if other else []
    title = "\n".join(["Relevance of each position, as a share of its layer's", *left_out])
    figure.suptitle(title, fontsize="medium")
    figure.colorbar(shown, ax=axes, shrink=0.8)
    return saved(figure, path)
