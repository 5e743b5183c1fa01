"""Parts of weights that no relevance arrived at: unknown, and yet the first to be pruned where the rest of the weight is scored.

A weight that gets none at all is unscored, and kept. Queries and keys that share one weight with the values (GPT-2), gates that
share one with what they gate (Phi-3), and experts in one stack, are parts of a weight that is scored otherwise.
"""

import warnings
from collections.abc import Collection, Mapping

from torch import Tensor

from lrp_prune.engine.composites import Composite
from lrp_prune.relevance import Relevance
from lrp_prune.relevance.unscored import UnscoredWeightsWarning, patterns_of

_UNREACHED = "no token went to them"
_RUN = 8
"""Outputs next to each other without relevance, on average: parts of a weight are blocks; dead units lie scattered."""


def silent_outputs(values: Tensor, layout: str) -> Tensor:
    """Which outputs of a weight have nothing but zeros: bool ``[matrices, outputs]``.

    Example:
        >>> import torch
        >>> silent_outputs(torch.tensor([[0.0, 1.0], [0.0, 0.0]]), "linear")
        tensor([[False,  True]])
    """
    stack = values if layout.startswith("stacked") else values.unsqueeze(0)
    outputs = 2 if layout.endswith("transposed") else 1
    return ~stack.movedim(outputs, 1).flatten(2).any(dim=2)


def in_blocks(silent: Tensor) -> bool:
    """Whether what is silent are parts of a weight: many neighbours each."""
    starts = silent[:, :1].sum() + (silent[:, 1:] & ~silent[:, :-1]).sum()
    return bool(silent.any()) and int(silent.sum()) >= _RUN * int(starts)


def stops_within(composite: Composite) -> bool:
    """Whether a composite keeps relevance from queries and keys, or from gates."""
    return any(rule.stops for kind in ("product", "attention", "softmax") for rule in composite.rules_of(kind))


def tell_silent(
    relevance: Relevance, composite: Composite, held: Mapping[str, Tensor], stacked: Collection[str] = ()
) -> None:
    """Warn of outputs without relevance where rules stop it, and of experts without any.

    Args:
        relevance: of weights; of neurons, experts alone are told of.
        composite: the rules.
        held: of weights that made something that a rule held constant, which outputs did ``[matrices, outputs]``.
        stacked: where units are scored, weights of which each entry of the first dimension is a layer of its own.
    """
    if relevance.shardings:
        return
    if relevance.granularity != "weight":
        if relevance.statistic == "structure":  # of methods that look at no data: nothing is summed
            return
        _tell("experts", silent_experts(relevance, stacked), _UNREACHED, "samples")
        return
    stopped: dict[str, tuple[int, int]] = {}
    experts: dict[str, tuple[int, int]] = {}
    constant: dict[str, tuple[int, int]] = {}
    stops = stops_within(composite)
    for name, sums in ((name, tensor) for name, tensor in relevance.sums.items() if name in relevance):
        layout = relevance.layouts.get(name) or ("stacked" if sums.dim() == 3 else None)
        if layout is None or sums.dim() < 2 or not (layout.startswith("stacked") or stops or name in held):
            continue
        silent = silent_outputs(sums, layout)
        alone = silent.all(dim=1)
        if len(silent) > 1 and bool(alone.any()):
            experts[name] = (int(alone.sum()), len(silent))
        constants = silent & held[name].to(silent.device) if name in held else None
        silent = silent[~alone]
        if constants is not None and bool(constants.any()):
            constant[name] = (int(constants.sum()), constants.numel())
        elif stops and in_blocks(silent):
            stopped[name] = (int(silent.sum()), silent.numel())
    unknown = "is not known to be irrelevant"
    _tell("outputs", stopped, f"what {composite.name!r} stops (queries and keys, gates) {unknown}")
    _tell("outputs", constant, f"what {composite.name!r} holds constant (how a state decays) {unknown}")
    _tell("experts", experts, _UNREACHED, "samples")


def silent_experts(relevance: Relevance, stacked: Collection[str]) -> dict[str, tuple[int, int]]:
    """Of how many experts no neuron has any relevance, and how many there are, by what makes the neurons."""
    found = {}
    for name, members in relevance.members.items():
        stacks = [member for member in members if member.parameter in stacked and len(member.owners) > 1]
        if not stacks:
            continue
        made_by = next((member for member in stacks if not member.reads), stacks[0])
        known = relevance.sums[name].cpu() != 0
        silent = sum(
            bool((owners >= 0).any()) and not bool(known[owners[owners >= 0].long()].any()) for owners in made_by.owners
        )
        if silent:
            found[made_by.parameter] = (silent, len(made_by.owners))
    return found


def _tell(what: str, found: Mapping[str, tuple[int, int]], why: str, more: str = "") -> None:
    if not found:
        return
    silent, number = (sum(counts) for counts in zip(*found.values(), strict=True))
    warnings.warn(
        f"no relevance at all at {silent:,} of {number:,} {what} of {', '.join(patterns_of(found))}: {why}, and yet they "
        f"are the first to be pruned. For pruning, leave these weights out by exclude={patterns_of(found)!r}, or take "
        f"{f'more {more}' if more else 'another composite'}",
        UnscoredWeightsWarning,
        stacklevel=5,
    )
