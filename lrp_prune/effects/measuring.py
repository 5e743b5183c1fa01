"""Side effects as a measurement of their own: a suite before and after a correction, on the same samples."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from lrp_prune.effects.entries import Entry, Measured, line_name, measuring
from lrp_prune.effects.intervals import Interval, intervals
from lrp_prune.effects.report import Effect, SideEffects
from lrp_prune.effects.suite import Suite
from lrp_prune.progress import is_first

State = nn.Module | Callable[[], AbstractContextManager[nn.Module]]


def side_effects(
    before: State,
    after: State,
    suite: Suite | Mapping[str, Any],
    *,
    beside: Mapping[str, Sequence[State]] | None = None,
    seed: int = 0,
    progress: bool = True,
) -> SideEffects:
    r"""What a correction did to everything that it was not to change, entry by entry.

    Of each entry the samples are the same before and after. A value is :math:`\exp(\sum_i t_i / \sum_i n_i)` of the losses
    :math:`t_i` of :math:`n_i` tokens (the mean, where an entry has no losses), the change is after over before minus 1, and the
    intervals are the 95 % of 2,000 draws of samples with replacement, paired. The divergence is the mean of
    :math:`\mathrm{KL}(p^\mathrm{before} \,\|\, p^\mathrm{after})` over the same tokens. Models come out as they went in; what is
    held at a time are the logits of one part of one entry.

    Args:
        before: the model as it was; or a function that returns a context in which a model is so, for one model in two states.
        after: the corrected one; likewise.
        suite: what is measured, see :class:`~lrp_prune.metrics.Suite`; a mapping becomes one.
        beside: more models by name, several for several seeds: what the same number of random entries does, say.
        seed: of the intervals.
        progress: show a progress bar.

    Returns:
        One line for each entry, the worst first.

    Raises:
        ValueError: if the suite is empty, and what an entry raises, with its name.

    Example:
        >>> class Biased(nn.Module):
        ...     def __init__(self, logit):
        ...         super().__init__()
        ...         self.logits = nn.Parameter(torch.tensor([logit, 0.0]))
        ...     def forward(self, input_ids):
        ...         return self.logits.expand(*input_ids.shape, 2)
        >>> ones = {"ones": torch.ones(3, 5, dtype=torch.int64)}
        >>> found = side_effects(Biased(0.0), Biased(1.0), ones, progress=False)
        >>> round(found["ones"].before.value, 2), round(found["ones"].after.value, 2), round(found["ones"].change.value, 2)
        (2.0, 3.72, 0.86)
    """
    chosen = suite if isinstance(suite, Suite) else Suite(suite)
    if not len(chosen):
        raise ValueError("the suite is empty: give it texts, tokens, a task or a function by name")
    states: list[State] = [before, after, *(state for several in (beside or {}).values() for state in several)]
    found: list[Effect] = []
    steps = sum(len(entry.parts) for entry in chosen.values()) * len(states)
    with tqdm(total=steps, desc="side effects", leave=False, disable=None if progress and is_first() else True) as bar:
        for name, entry in chosen.items():
            try:
                lines = _measured(entry, states, lambda: bar.update())
            except Exception as error:
                error.args = (f"the suite's {name!r}: {error}",)
                raise
            found += [_effect(name, line, entry, several, beside or {}, seed) for line, several in lines.items()]
    return SideEffects(found, chosen.missing, chosen.fingerprint)


def _measured(entry: Entry, states: Sequence[State], step: Callable[[], Any]) -> dict[str, list[Measured]]:
    """The values of an entry's lines in each state; part by part, so that only one part's logits are held."""
    collected: dict[str, list[list[Measured]]] = {}
    for part in entry.parts:
        kept = None
        for number, state in enumerate(states):
            with _entered(state) as model:
                # What is compared with, beside the correction, has a change but no divergence, which is half of the time.
                values, own = entry.measure(model, part, kept if number == 1 else None, keep=number == 0)
            kept = own if number == 0 else kept
            for line, measured in values.items():
                collected.setdefault(line, [[] for _ in states])[number].append(measured)
            step()
    joined = {line: [_joined(parts) for parts in several] for line, several in collected.items()}
    for several in joined.values():
        counts = [len(measured.totals) for measured in several]
        if len(set(counts)) > 1:
            raise ValueError(f"the samples must be the same each time, got {counts} of them, one number for each model")
    return joined


@contextmanager
def _entered(state: State) -> Iterator[nn.Module]:
    """A model in a state, in evaluation mode and without gradients."""
    with ExitStack() as stack:
        model = state if isinstance(state, nn.Module) else stack.enter_context(state())
        stack.enter_context(measuring(model))
        yield model


def _joined(parts: Sequence[Measured]) -> Measured:
    divergences = [part.divergence for part in parts if part.divergence is not None]
    return Measured(
        torch.cat([part.totals for part in parts]),
        torch.cat([part.counts for part in parts]),
        torch.cat(divergences) if divergences else None,
    )


def _effect(
    name: str, line: str, entry: Entry, several: Sequence[Measured], beside: Mapping[str, Sequence[State]], seed: int
) -> Effect:
    before, after, *others = several

    def change(old: Tensor, new: Tensor) -> Tensor:
        return (new - old).exp() - 1 if entry.losses else torch.where(new == old, 0.0, new / old - 1)

    def interval(function: Callable[..., Tensor], *measured: Measured) -> Interval:
        return intervals([(each.totals, each.counts) for each in measured], function, seed)

    changes = iter([float(change(before.mean, other.mean)) for other in others])
    return Effect(
        name=line_name(name, line),
        unit=entry.unit,
        directed=entry.directed,
        samples=len(before.totals),
        before=interval(entry.value, before),
        after=interval(entry.value, after),
        change=interval(change, before, after),
        divergence=_mean(after.divergence, after.counts),
        beside={label: [next(changes) for _ in states] for label, states in beside.items()},
    )


def _mean(totals: Tensor | None, counts: Tensor) -> float | None:
    if totals is None:
        return None
    return float(totals.sum() / counts.sum()) if float(counts.sum()) else math.nan
