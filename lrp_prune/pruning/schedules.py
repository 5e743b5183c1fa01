"""Schedules: the total sparsity after each round of pruning."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, get_args, overload

from lrp_prune.selection.scopes import check_sparsity

ScheduleName = Literal["one_shot", "linear", "cubic", "exponential"]
Schedule = str | Sequence[float] | Callable[[int], float]
SCHEDULES: tuple[str, ...] = get_args(ScheduleName)


@overload
def sparsity_schedule(schedule: Schedule, sparsity: float, rounds: int, initial: float = 0.0) -> list[float]: ...
@overload
def sparsity_schedule(
    schedule: Schedule, sparsity: Mapping[str, float], rounds: int, initial: float = 0.0
) -> list[dict[str, float]]: ...
def sparsity_schedule(
    schedule: Schedule, sparsity: float | Mapping[str, float], rounds: int, initial: float = 0.0
) -> list[float] | list[dict[str, float]]:
    r"""The total sparsity after each round.

    With the share :math:`x = t / T` of rounds done, from :math:`s_0` (``initial``) to :math:`s_T` (``sparsity``):

    * ``"one_shot"``: :math:`s_T` from the first round on;
    * ``"linear"``: :math:`s_0 + (s_T - s_0) x`;
    * ``"cubic"``: :math:`s_T + (s_0 - s_T) (1 - x)^3`, Zhu & Gupta 2017 (arXiv 1710.01878, eq. 1): fast while much is
      redundant, slow at the end;
    * ``"exponential"``: :math:`1 - (1 - s_0) \left(\frac{1 - s_T}{1 - s_0}\right)^x`: each round prunes the same share
      of what is left, as in iterative magnitude pruning (Frankle & Carbin 2019, arXiv 1803.03635);
    * a list of ``rounds`` numbers, or a callable from the round (1 to ``rounds``) to a number: the total sparsities, the last of
      which is :math:`s_T`.

    Args:
        schedule: the form, see above.
        sparsity: total sparsity after the last round; or one for each pattern, each of which follows the schedule on its
            own. A list or callable then gives the share of each pattern's final sparsity, in [0, 1], and ends at 1.
        rounds: number of rounds.
        initial: total sparsity before the first round (named schedules only).

    Returns:
        One number, or ``{pattern: number}``, for each round.

    Raises:
        ValueError: if an argument is out of range, a list has not ``rounds`` entries, the sparsity would fall, or what is given
            ends at another one.

    Example:
        >>> sparsity_schedule("linear", 0.5, 2), sparsity_schedule("exponential", 0.75, 2)
        ([0.25, 0.5], [0.5, 0.75])
        >>> sparsity_schedule([0.5, 1.0], {"*.mlp": 0.5, "*.self_attn": 0.25}, 2)
        [{'*.mlp': 0.25, '*.self_attn': 0.125}, {'*.mlp': 0.5, '*.self_attn': 0.25}]
    """
    if isinstance(rounds, bool) or not isinstance(rounds, int) or rounds < 1:
        raise ValueError(f"rounds must be a positive integer, got {rounds!r}")
    check_sparsity(initial, "initial")
    if not isinstance(sparsity, Mapping):
        return _totals(schedule, check_sparsity(sparsity), rounds, initial)
    if not sparsity:
        raise ValueError("sparsity has no pattern: give a number in [0, 1) or {pattern: number}")
    for pattern, rate in sparsity.items():
        check_sparsity(rate, f"sparsity[{pattern!r}]")
    if isinstance(schedule, str):
        curves = {pattern: _totals(schedule, rate, rounds, initial) for pattern, rate in sparsity.items()}
        return [{pattern: curve[number] for pattern, curve in curves.items()} for number in range(rounds)]
    shares = _given(schedule, rounds, 1.0, "share of each sparsity")
    return [{pattern: share * rate for pattern, rate in sparsity.items()} for share in shares]


def _totals(schedule: Schedule, final: float, rounds: int, initial: float) -> list[float]:
    if not isinstance(schedule, str):
        return _given(schedule, rounds, final, "sparsity")
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule must be one of {SCHEDULES}, a list or a callable, got {schedule!r}")
    if initial > final:
        raise ValueError(f"initial sparsity {initial} is above the final one, {final}: what is pruned stays pruned")
    shares = [number / rounds for number in range(1, rounds)]
    if schedule == "one_shot":
        totals = [final for _ in shares]
    elif schedule == "linear":
        totals = [initial + (final - initial) * share for share in shares]
    elif schedule == "cubic":
        totals = [final + (initial - final) * (1 - share) ** 3 for share in shares]
    else:
        totals = [1 - (1 - initial) * ((1 - final) / (1 - initial)) ** share for share in shares]
    # Rounding must neither pass the final sparsity nor miss it in the last round.
    return [min(max(total, initial), final) for total in totals] + [float(final)]


def rounds_of(schedule: Schedule, rounds: int | None) -> int | None:
    """How many rounds there are: as many as are asked for, else one for each entry of a list; None if nothing says it.

    Raises:
        ValueError: for a function of the round and no number of rounds.

    Example:
        >>> rounds_of([0.3, 0.5], None), rounds_of("linear", 3), rounds_of("linear", None)
        (2, 3, None)
    """
    if rounds is not None or isinstance(schedule, str):
        return rounds
    if callable(schedule):
        raise ValueError("schedule is a function of the round: pass rounds= with how many there are")
    return len(_listed(schedule))


def _listed(schedule: Any) -> list[Any]:
    if isinstance(schedule, Mapping) or not isinstance(schedule, Iterable):
        raise ValueError(f"schedule must be one of {SCHEDULES}, a list or a callable, got {schedule!r}")
    values = list(schedule)
    if not values:
        raise ValueError("the schedule is empty: give a number for each round")
    return values


def _given(schedule: Sequence[float] | Callable[[int], float], rounds: int, final: float, what: str) -> list[float]:
    allow_one = final == 1
    values = [schedule(number) for number in range(1, rounds + 1)] if callable(schedule) else _listed(schedule)
    if len(values) != rounds:
        raise ValueError(
            f"the schedule has {len(values)} entries for rounds={rounds}: give one for each, or leave rounds out"
        )
    before = 0.0
    for number, value in enumerate(values, start=1):
        fits = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if not fits or not (0 <= value < 1 or (allow_one and value == 1)):
            raise ValueError(
                f"round {number} of the schedule must be in [0, 1{']' if allow_one else ')'}, got {value!r}"
            )
        if value < before:
            raise ValueError(
                f"the schedule falls from {before} to {value} in round {number}: what is pruned stays pruned"
            )
        before = value
    if not math.isclose(before, final, rel_tol=1e-6, abs_tol=1e-9):
        raise ValueError(
            f"the schedule ends at {before:g}, and the {what} to reach is {final:g}: let it end there, or pass another sparsity"
        )
    return [float(min(value, final)) for value in values[:-1]] + [float(final)]
