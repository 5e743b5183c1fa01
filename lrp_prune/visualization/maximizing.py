"""The samples of a data set that a unit is most relevant for: what it stands for."""

import heapq
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lrp_prune.attribution.collect import RelevanceAccumulator
from lrp_prune.attribution.inputs import collected_target
from lrp_prune.engine.composites import Composite
from lrp_prune.figures import new_figure, saved
from lrp_prune.models.batches import check_batches, of_samples, samples_in, tensors
from lrp_prune.progress import Counted, bar, no_bar, number_of
from lrp_prune.relevance import Relevance
from lrp_prune.visualization.colours import hexadecimal
from lrp_prune.visualization.parts import Pixels

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_UNITS = 5
"""Of a relevance, how many of its units are looked at: those with the largest."""


@dataclass(frozen=True)
class TopSample:
    """A sample that a unit is relevant for.

    Args:
        relevance: of the unit, for this sample.
        number: of the sample, counted over all batches from 0.
        batch: the sample, as a batch of one, for :func:`lrp_prune.explain`.
    """

    relevance: float
    number: int
    batch: Any


@dataclass(frozen=True)
class TopSamples(Mapping[tuple[str, int], list[TopSample]]):
    """Unit (its group and its place in it) -> its samples, the largest relevance first."""

    found: dict[tuple[str, int], list[TopSample]]

    def __getitem__(self, unit: tuple[str, int]) -> list[TopSample]:
        return self.found[unit]

    def __iter__(self) -> Any:
        return iter(self.found)

    def __len__(self) -> int:
        return len(self.found)

    def __str__(self) -> str:
        lines = []
        for (group, index), samples in self.found.items():
            values = ", ".join(f"{sample.number} ({sample.relevance:+.3g})" for sample in samples)
            lines.append(f"{group}[{index}]: samples {values}")
        return "\n".join(lines)

    def plot(self, path: str | os.PathLike[str] | None = None) -> "Figure":
        """A figure of the samples' images, a row for each unit; of other samples of their relevance.

        Args:
            path: a file to write it to; None writes none.

        Raises:
            ImportError: without matplotlib (the extra ``plots``).
        """
        columns = max(len(samples) for samples in self.found.values())
        images = all(_image(sample.batch) is not None for samples in self.found.values() for sample in samples)
        figure = new_figure(1.5 + 1.1 * columns, 0.6 + (1.35 if images else 1.6) * len(self.found))
        if not images:
            panels: Any = figure.subplots(len(self.found), 1, squeeze=False)
            for (axes,), ((group, index), samples) in zip(panels, self.found.items(), strict=True):
                axes.bar(range(len(samples)), [sample.relevance for sample in samples], color=hexadecimal(1.0))
                axes.set_xticks(range(len(samples)), [str(sample.number) for sample in samples], fontsize="x-small")
                axes.set_title(f"{group}[{index}]", loc="left", fontsize="small")
                axes.set_xlabel("sample", fontsize="small")
                axes.grid(axis="y", alpha=0.25)
            return saved(figure, path)
        grid: Any = figure.subplots(len(self.found), columns, squeeze=False)
        for row, ((group, index), samples) in zip(grid, self.found.items(), strict=True):
            for axes in row:
                axes.axis("off")
            for axes, sample in zip(row, samples, strict=False):
                image = _image(sample.batch)
                axes.imshow(Pixels(image, image).images()[0].numpy())
                axes.set_title(f"{sample.number}: {sample.relevance:+.2g}", fontsize="x-small")
            row[0].text(
                -0.1, 0.5, f"{group}\n[{index}]", transform=row[0].transAxes, ha="right", va="center", fontsize=7
            )
        return saved(figure, path)


def _image(batch: Any) -> Any:
    return next((tensor for tensor in tensors(batch) if tensor.is_floating_point() and tensor.dim() == 4), None)


def top_samples(
    model: nn.Module,
    batches: Iterable[Any],
    units: Relevance | Mapping[str, Sequence[int]],
    number: int = 8,
    target: Any = None,
    *,
    granularity: str = "neuron",
    composite: str | Composite = "attnlrp",
    progress: bool = True,
) -> TopSamples:
    """The samples for whose predictions units are most relevant (relevance maximisation, Achtibat et al. 2023, CRP).

    A unit that is active for much may be used for little: these are the samples in which it speaks for the prediction. One
    forward and one backward pass for each sample; only the samples that are returned are kept.

    Args:
        model: any module.
        batches: the data set, in batches that can be divided into samples.
        units: group -> places of units in it, both as in ``attribute(model, ..., granularity=granularity)``; or that relevance
            itself, of which the five units with the largest are looked at.
        number: of samples for each unit.
        target: what is explained, as in :func:`lrp_prune.explain`.
        granularity: ``"neuron"``, ``"head"`` or ``"block"``.
        composite: the rules.
        progress: show a progress bar.

    Raises:
        KeyError: for a group or a unit that the model does not have.
        ValueError: for no batches, or one that cannot be divided into samples.

    Example:
        >>> import torch, lrp_prune
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> found = lrp_prune.top_samples(model, [torch.randn(16, 4)], {"2": [5]}, number=3, progress=False)
        >>> [sample.relevance for sample in found["2", 5]] == sorted((s.relevance for s in found["2", 5]), reverse=True)
        True
    """
    check_batches(batches)
    if number < 1:
        raise ValueError(f"number must be 1 or more, got {number}")
    if isinstance(units, Relevance):
        granularity = units.granularity
    wanted = _largest(units) if isinstance(units, Relevance) else units
    accumulator = RelevanceAccumulator(
        model,
        target=collected_target(model, target),
        composite=composite,
        statistic="signed",
        granularity=granularity,
        matmul_dtype=None,
    )
    heaps: dict[tuple[str, int], list[tuple[float, int, Any]]] = {
        (group, int(place)): [] for group, places in wanted.items() for place in places
    }
    seen = 0
    with (bar if progress else no_bar)("looking at samples", number_of(batches)) as advance:
        for batch in Counted(batches, advance):
            for sample in range(samples_in(batch)):
                one = of_samples(batch, [sample])
                if one is None:
                    raise ValueError(
                        "a batch cannot be divided into samples: not every tensor in it has a row for each"
                    )
                accumulator.update(one)
                found = accumulator.compute()
                for (group, place), heap in heaps.items():
                    entry = (_value(found, group, place), -seen, one)  # of equal ones the first
                    (heapq.heappush if len(heap) < number else heapq.heappushpop)(heap, entry)
                seen += 1
    if not heaps:
        raise ValueError("units names no unit: pass {group: [places]}, or a relevance of units")
    if not seen:
        raise ValueError("there are no batches to look for samples in")
    return TopSamples(
        {
            unit: [
                TopSample(value, -order, one) for value, order, one in sorted(heap, key=lambda entry: entry[:2])[::-1]
            ]
            for unit, heap in heaps.items()
        }
    )


def _value(found: Relevance, group: str, place: int) -> float:
    if group not in found:
        raise KeyError(f"there is no group of units {group!r}, there are {', '.join(list(found)[:6])}, ...")
    values: Tensor = found[group]
    if not 0 <= place < len(values):
        raise KeyError(f"{group!r} has {len(values)} units, got {place}")
    return float(values[place])


def _largest(relevance: Relevance) -> dict[str, list[int]]:
    """The units with the largest relevance."""
    if relevance.granularity == "weight":
        raise ValueError("units must be of neurons, heads or blocks, got relevance of weights")
    names = [(name, place) for name, values in relevance.items() for place in range(len(values))]
    values = torch.cat([values.double().flatten() for values in relevance.values()])
    found: dict[str, list[int]] = {}
    for index in values.topk(min(_UNITS, len(values))).indices.tolist():
        name, place = names[index]
        found.setdefault(name, []).append(place)
    return found
