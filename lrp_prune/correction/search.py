"""How much to remove: the smallest patch that does enough at a price that is allowed, and the curve around it."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from torch import nn

from lrp_prune.arguments import check_integer, check_number
from lrp_prune.correction.patch import Patch

AMOUNTS: tuple[float, ...] = (0.00003, 0.0001, 0.0003, 0.001, 0.003, 0.01)
"""Fractions tried by default, half a decade apart."""

Measure = Callable[[nn.Module], float]


@dataclass(frozen=True)
class Automatic:
    """An amount that is found by trying some.

    Args:
        reduction: the wanted reduction of the undesired metric, as a share of it, in (0, 1].
        allowed_loss: the allowed loss of the general metric, as a share of it: 0.01 for 1 %.
        amounts: fractions or counts to try; see :data:`AMOUNTS`.
        refine: further trials between the smallest accepted amount and the one before it, halving the distance (on a
            logarithmic scale) each time.
        general_mode: ``"min"`` if the general metric should be small (perplexity), ``"max"`` if large (accuracy).

    Raises:
        ValueError: for an argument that is not possible.
    """

    reduction: float = 0.5
    allowed_loss: float = 0.01
    amounts: Sequence[float | int] = AMOUNTS
    refine: int = 0
    general_mode: Literal["min", "max"] = "min"

    def __post_init__(self) -> None:
        check_number("reduction", self.reduction, "(0, 1]")
        check_number("allowed_loss", self.allowed_loss, "[0, inf]")
        if self.general_mode not in ("min", "max"):
            raise ValueError(f"general_mode must be 'min' or 'max', got {self.general_mode!r}")
        check_integer("refine", self.refine, 0)
        given: Any = self.amounts
        if isinstance(given, str) or not isinstance(given, Sequence) or not given:
            raise ValueError(f"amounts must be a list of fractions or counts, got {self.amounts!r}")
        fractions = any(isinstance(amount, float) for amount in self.amounts)
        for amount in self.amounts:
            if fractions and not isinstance(amount, float):
                raise ValueError(f"amounts must be all fractions or all counts, got {list(self.amounts)!r}")
            if fractions:
                check_number("a fraction in amounts", amount, "(0, 1)")
            else:
                check_integer("a count in amounts", amount, 1)


_USUAL = Automatic()


class Trial(NamedTuple):
    """One amount and what it did.

    Attributes:
        amount: as it was asked for.
        entries: how many entries the patch has.
        undesired: the undesired metric with the patch.
        general: the metric of the general behaviour with the patch.
        reduction: of the undesired metric, as a share of what it was: 1 if nothing is left.
        loss: of the metric of the general behaviour, as a share of what it was; negative if it became better.
        accepted: whether the reduction is reached and the loss allowed.
    """

    amount: float | int
    entries: int
    undesired: float
    general: float
    reduction: float
    loss: float
    accepted: bool


class Search(NamedTuple):
    """What a search found.

    Attributes:
        patch: the smallest accepted one; None if there was none.
        undesired: the undesired metric before.
        general: the metric of the general behaviour before.
        curve: all trials, by growing amount.
    """

    patch: Patch | None
    undesired: float
    general: float
    curve: list[Trial]


def search_amount(
    model: nn.Module,
    make_patch: Callable[[float | int], Patch],
    undesired: Measure,
    general: Measure,
    *,
    automatic: Automatic = _USUAL,
    stop_early: bool = False,
    strength: float = 1.0,
    strict: bool = True,
) -> Search:
    r"""Try amounts, smallest first, and choose the smallest that does enough and costs little.

    With the metrics :math:`u` and :math:`g` before and :math:`u', g'` with a patch applied, the reduction is
    :math:`(u - u') / |u|` and the loss :math:`(g' - g) / |g|` (for a metric that should be large: :math:`(g - g') / |g|`).
    The model is measured with each patch in turn and is as before in the end, also after an exception.

    Args:
        model: the model to correct.
        make_patch: from an amount to a patch of it, as :meth:`Patch.from_contrast` with everything else fixed.
        undesired: measures the model's undesired behaviour; lower is better, and it must not be 0 before.
        general: measures what is to stay, the perplexity of general text say.
        automatic: what is tried, and what is accepted.
        stop_early: end at the first accepted amount, instead of measuring the whole curve.
        strength: at which the patches are tried.
        strict: see :meth:`Patch.apply_`.

    Returns:
        The patch and the curve.

    Raises:
        ValueError: for an undesired metric that is 0 or not finite before.

    Example:
        >>> import torch
        >>> model = nn.Linear(4, 1, bias=False)
        >>> _ = model.weight.data.copy_(torch.tensor([[4.0, 3.0, 2.0, 1.0]]))
        >>> make = lambda k: Patch.from_positions(model, {"weight": torch.arange(k)})
        >>> found = search_amount(model, make, lambda m: m.weight[0, :2].sum().item(),
        ...                       lambda m: m.weight[0, 2:].sum().item(),
        ...                       automatic=Automatic(general_mode="max", amounts=[1, 2, 3]))
        >>> found.patch.num_entries, [trial.accepted for trial in found.curve]
        (1, [True, True, False])
    """
    before, intact = float(undesired(model)), float(general(model))
    if before == 0 or not abs(before) < float("inf"):
        raise ValueError(f"the undesired metric is {before} before any correction: there is nothing to reduce")
    sign = 1 if automatic.general_mode == "min" else -1
    patches: dict[float | int, Patch] = {}

    def attempt(amount: float | int) -> Trial:
        patch = patches[amount] = make_patch(amount)
        patch.apply_(model, strength, strict=strict)
        try:
            after, kept = float(undesired(model)), float(general(model))
        finally:
            patch.revert_(model, strict=False)
        gained = (before - after) / abs(before)
        lost = sign * (kept - intact) / abs(intact) if intact else sign * (kept - intact)
        # What is no number is accepted by neither comparison.
        accepted = gained >= automatic.reduction and lost <= automatic.allowed_loss
        return Trial(amount, patch.num_entries, after, kept, gained, lost, accepted)

    trials: dict[float | int, Trial] = {}
    for amount in sorted(set(automatic.amounts)):
        trials[amount] = attempt(amount)
        if stop_early and trials[amount].accepted:
            break
    for _ in range(automatic.refine):
        between = _between(trials)
        if between is None:
            break
        trials[between] = attempt(between)
    curve = [trials[amount] for amount in sorted(trials)]
    best = next((trial.amount for trial in curve if trial.accepted), None)
    return Search(None if best is None else patches[best], before, intact, curve)


def _between(trials: dict[float | int, Trial]) -> float | int | None:
    """An amount between the smallest accepted one and the one tried before it, if there is any."""
    tried = sorted(trials)
    first = next((index for index, amount in enumerate(tried) if trials[amount].accepted), 0)
    if first == 0:
        return None
    low, high = tried[first - 1], tried[first]
    middle = math.sqrt(low * high)
    if isinstance(high, float):
        return middle
    return round(middle) if low < round(middle) < high else None
