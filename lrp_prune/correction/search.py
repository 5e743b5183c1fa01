"""How much to remove: the smallest patch that does enough at a price that is allowed, and the curve around it."""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

from torch import nn

from lrp_prune.arguments import check_integer, check_number
from lrp_prune.correction.contrast import NoEntryError
from lrp_prune.correction.entries import check_strength
from lrp_prune.correction.patch import Patch
from lrp_prune.correction.trials import Search, Trial, worst_of
from lrp_prune.effects import Suite
from lrp_prune.effects.limits import checked_limits, limit_of

_logger = logging.getLogger("lrp_prune")
AMOUNTS: tuple[float, ...] = (0.00003, 0.0001, 0.0003, 0.001, 0.003, 0.01)
"""Fractions tried by default, half a decade apart."""

Measure = Callable[[nn.Module], float]
_LOSS = 0.01
GENERAL = "general"
"""What a single measure of the general behaviour is called."""


@dataclass(frozen=True)
class Automatic:
    """An amount that is found by trying some.

    Args:
        reduction: the wanted reduction of the undesired metric, as a share of it, in (0, 1].
        allowed: the allowed loss of what is to stay, as a share of it: 0.01 for 1 %. With several measures the limit of each of
            them, or limits by name or pattern, of which the most exact one counts: ``{"*": 0.02, "copying": 0.05}``. None: a
            suite's own limits, and 0.01 for other measures.
        amounts: fractions or counts to try; see :data:`AMOUNTS`. Fractions that are less than one entry are left out.
        strengths: to try each amount at; None for the one that the patch is to have.
        refine: further trials between the smallest accepted amount and the one before it, halving the distance (on a
            logarithmic scale) each time.
        general_mode: ``"min"`` if the general metric should be small (perplexity), ``"max"`` if large (accuracy).

    Raises:
        ValueError: for an argument that is not possible.
    """

    reduction: float = 0.5
    allowed: float | Mapping[str, float] | None = None
    amounts: Sequence[float | int] = AMOUNTS
    strengths: Sequence[float] | None = None
    refine: int = 0
    general_mode: Literal["min", "max"] = "min"

    def __post_init__(self) -> None:
        check_number("reduction", self.reduction, "(0, 1]")
        if self.allowed is not None:
            checked_limits(self.allowed, ())
        if self.strengths is not None and not len(self.strengths):
            raise ValueError("strengths must be at least one number in (0, 1], or None for that of the patch, got none")
        for strength in self.strengths or ():
            check_strength(strength)
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

    def limits(self, general: Any) -> Mapping[str, float] | float:
        """What is allowed of measures: what is said here, else by a suite."""
        if self.allowed is not None:
            return self.allowed
        return general.only(general.measures()).allowed if isinstance(general, Suite) else _LOSS


_USUAL = Automatic()


def search_amount(
    model: nn.Module,
    make_patch: Callable[[float | int], Patch],
    undesired: Measure,
    general: Measure | Mapping[str, Measure] | Suite,
    *,
    automatic: Automatic = _USUAL,
    stop_early: bool = False,
    strength: float = 1.0,
    strict: bool = True,
) -> Search:
    r"""Try amounts and strengths, smallest first, and choose the smallest that does enough and costs little, whatever is asked.

    With the metrics :math:`u` and :math:`g_i` before and :math:`u', g_i'` with a patch applied, the reduction is
    :math:`(u - u') / |u|` and each loss :math:`(g_i' - g_i) / |g_i|` (for metrics that should be large:
    :math:`(g_i - g_i') / |g_i|`). A trial is accepted if the reduction is reached and *every* loss is within its limit; of those
    the one with the smallest product of entries and strength is chosen. The model is measured with each patch in turn and is as
    before in the end, also after an exception.

    Args:
        model: the model to correct.
        make_patch: from an amount to a patch of it, as :meth:`Patch.from_contrast` with everything else fixed.
        undesired: measures the model's undesired behaviour; lower is better, and it must not be 0 before.
        general: measures what is to stay, the perplexity of general text say; several by name, each with a limit of its own; or a
            suite, whose entries are measures (the half to select by, so that the other one can test the choice).
        automatic: what is tried, and what is accepted.
        stop_early: end at the first accepted amount, instead of measuring the whole curve.
        strength: at which the patches are tried, if ``automatic`` names no strengths.
        strict: see :meth:`Patch.apply_`.

    Returns:
        The patch, with its strength in its description, all trials and their frontier.

    Raises:
        ValueError: for an undesired metric that is 0 before, one that is not finite before, a limit that is of no measure, or if
            no amount is an entry.

    Example:
        >>> import torch
        >>> model = nn.Linear(4, 1, bias=False)
        >>> _ = model.weight.data.copy_(torch.tensor([[4.0, 3.0, 2.0, 1.0]]))
        >>> make = lambda k: Patch.from_positions(model, {"weight": torch.arange(k)})
        >>> found = search_amount(model, make, lambda m: m.weight[0, :2].sum().item(),
        ...                       {"sum": lambda m: m.weight[0, 2:].sum().item(), "last": lambda m: m.weight[0, 3].item()},
        ...                       automatic=Automatic(general_mode="max", amounts=[1, 2, 3]))
        >>> found.patch.num_entries, [trial.accepted for trial in found.curve], found.curve[2].worst
        (1, [True, True, False], 'sum')
    """
    measures = _measures(general)
    limits = checked_limits(automatic.limits(general), list(measures))
    allowed = {name: limit for name in measures if (limit := limit_of(name, limits)) is not None}
    before = float(undesired(model))
    if before == 0 or not abs(before) < float("inf"):
        raise ValueError(f"the undesired metric is {before} before any correction: there is nothing to reduce")
    intact = {name: float(measure(model)) for name, measure in measures.items()}
    for name, value in intact.items():
        if not math.isfinite(value):
            raise ValueError(f"the measure {name!r} is {value} before any correction: nothing can be held to it")
    sign = 1 if automatic.general_mode == "min" else -1
    patches: dict[float | int, Patch] = {}

    def attempt(amount: float | int, at: float) -> Trial:
        patch = patches[amount] if amount in patches else patches.setdefault(amount, make_patch(amount))
        patch.apply_(model, at, strict=strict)
        try:
            after = float(undesired(model))
            kept = {name: float(measure(model)) for name, measure in measures.items()}
        finally:
            patch.revert_(model, strict=False)
        gained = (before - after) / abs(before)
        lost = {name: sign * (kept[name] - old) / (abs(old) or 1.0) for name, old in intact.items()}
        # What is no number is accepted by neither comparison.
        within = all(lost[name] <= limit for name, limit in allowed.items())
        worst = worst_of(lost, allowed)
        accepted = within and gained >= automatic.reduction
        return Trial(amount, at, patch.num_entries, after, kept, gained, lost, worst, within, accepted)

    trials: list[Trial] = []
    none: NoEntryError | None = None
    strengths = sorted(set(automatic.strengths or (strength,)))
    for amount, at in sorted(
        ((amount, at) for amount in set(automatic.amounts) for at in strengths),
        key=lambda pair: (pair[0] * pair[1], pair[0]),
    ):
        try:
            trials.append(attempt(amount, at))
        except NoEntryError as error:  # a small model has no 0.003 %
            none = error
            _logger.info("not tried: %s", error)
            continue
        if stop_early and trials[-1].accepted:
            break
    if none is not None and not trials:
        raise none
    for _ in range(automatic.refine):
        between = _between(trials)
        if between is None:
            break
        trials.append(attempt(*between))
    curve = sorted(trials, key=lambda trial: (trial.amount, trial.strength))
    chosen = _smallest(curve)
    patch = None
    if chosen is not None:
        patch = patches[chosen.amount]
        patch.provenance["strength"] = chosen.strength
    return Search(patch, before, intact, curve, chosen, automatic.reduction, allowed)


def _measures(general: Measure | Mapping[str, Measure] | Suite) -> dict[str, Measure]:
    if isinstance(general, Suite):
        general = general.measures()
    if callable(general):
        return {GENERAL: general}
    if not isinstance(general, Mapping) or not general or not all(callable(measure) for measure in general.values()):
        raise ValueError(
            "general must be a function of the model that returns a number, several by name, or a Suite with an entry that has a "
            f"direction, got {general!r}"
        )
    return dict(cast(Mapping[str, Measure], general))


def _smallest(trials: Sequence[Trial]) -> Trial | None:
    """The accepted one that changes the model least."""
    return min(
        (trial for trial in trials if trial.accepted),
        key=lambda trial: (trial.amount * trial.strength, trial.amount),
        default=None,
    )


def _between(trials: Sequence[Trial]) -> tuple[float | int, float] | None:
    """An amount between the chosen one and the one tried before it at the same strength, if there is any."""
    chosen = _smallest(trials)
    if chosen is None:
        return None
    smaller = [trial.amount for trial in trials if trial.strength == chosen.strength and trial.amount < chosen.amount]
    if not smaller:
        return None
    low, high = max(smaller), chosen.amount
    middle = math.sqrt(low * high)
    if isinstance(high, float):
        return middle, chosen.strength
    return (round(middle), chosen.strength) if low < round(middle) < high else None
