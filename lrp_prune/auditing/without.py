"""What has no relevance: weights that cannot be scored, units that are dead."""

import warnings
from collections.abc import Mapping
from typing import Any

from torch import nn

from lrp_prune.attribution.collect import RelevanceAccumulator
from lrp_prune.attribution.inputs import collected_target
from lrp_prune.auditing.report import Remark
from lrp_prune.engine.composites import Composite
from lrp_prune.models.batches import samples_in
from lrp_prune.relevance import Relevance
from lrp_prune.relevance.unscored import (
    CONSTANTS,
    DATA,
    GATES,
    TOLERABLE,
    UNREACHED,
    UNUSED,
    described,
    entries_of,
    patterns_of,
    share,
)

_ADVICE = {
    UNUSED: "use more, and other, reference samples",
    CONSTANTS: "it stays as it is when the rest is pruned: nothing to do",
    DATA: "it stays as it is when the rest is pruned: nothing to do",
    GATES: "score it under composite='epsilon', which goes through gates",
    UNREACHED: "explain something that depends on it (target=), or leave it out (exclude=)",
}
_MANY = 0.5
"""The share of dead units in a group from which it is a problem, and not what a ReLU does."""


def unscored_weights(model: nn.Module, batch: Any, target: Any) -> tuple[dict[str, str], list[Remark]]:
    """Weights that :func:`lrp_prune.attribute` cannot score by its default rules, with the reason."""
    collected = _collected(model, batch, target, {"granularity": "weight"})
    if isinstance(collected, str):
        return {}, [Remark(True, "weights", f"none could be scored: {collected}", "see what it says")]
    relevance, left_alone = collected
    unscored = dict(relevance.unscored)
    remarks = []
    if left_alone:
        what = f"left alone, as no weights: {described(left_alone)}"
        remarks.append(Remark(False, "weights", what, "include= takes them"))
    if not unscored:
        what = f"all {len(relevance)} that are scored by default have relevance"
        return {}, [Remark(False, "weights", what), *remarks]
    whole = sum(parameter.numel() for parameter in model.parameters())
    for reason in dict.fromkeys(unscored.values()):
        names = [name for name in unscored if unscored[name] == reason]
        lacking = share(entries_of(names, relevance.parameter_shapes), whole)
        what = f"{', '.join(patterns_of(names)[:5])} cannot be scored: {reason} ({lacking})"
        advice = _ADVICE.get(reason, "make it a parameter that is used as it is, or leave it out (exclude=)")
        remarks.append(Remark(reason not in (CONSTANTS, DATA) or reason not in TOLERABLE, "weights", what, advice))
    return unscored, remarks


def dead_units(
    model: nn.Module, batch: Any, target: Any, composite: Composite
) -> tuple[Mapping[str, tuple[int, int]], list[Remark]]:
    """Units that have no relevance in any sample of the batch, by group."""
    collected = _collected(model, batch, target, {"granularity": "neuron", "composite": composite})
    if isinstance(collected, str):
        return {}, [Remark(False, "units", f"none were looked at: {collected}")]
    relevance, _ = collected
    counts = {name: (int((values == 0).sum()), values.numel()) for name, values in relevance.items()}
    none, total = (sum(column) for column in zip(*counts.values(), strict=True))
    samples = samples_in(batch)
    if not none:
        return counts, [Remark(False, "units", f"each of {total:,} has relevance in {samples} samples")]
    many = [name for name, (dead, number) in counts.items() if dead > _MANY * number]
    what = f"{none:,} of {total:,} have no relevance in {samples} samples: never active, or read by nothing"
    if not many:
        return counts, [Remark(False, "units", what)]
    what += f"; most of {', '.join(patterns_of(many)[:5])}"
    advice = (
        "with more samples some may come to life; if not, they can go for nothing: "
        "lrp_prune.prune(..., granularity='neuron'); many dead units of one layer come from a learning rate or biases gone wrong"
    )
    return counts, [Remark(True, "units", what, advice)]


def _collected(
    model: nn.Module, batch: Any, target: Any, options: Mapping[str, Any]
) -> tuple[Relevance, Mapping[str, str]] | str:  # fmt: skip
    """Relevance of one batch, and what was left alone as no weight; or why there is none."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what they say is in the report
        try:
            accumulator = RelevanceAccumulator(
                model, target=collected_target(model, target), matmul_dtype=None, **options
            )
            accumulator.update(batch)
            return accumulator.compute(), accumulator.table.beside.told
        except (ValueError, FloatingPointError, RuntimeError, KeyError) as error:
            return str(error)
