"""Schedules: forms, exact ends, refusals."""

import math
from itertools import pairwise

import pytest

from lrp_prune.pruning import SCHEDULES, sparsity_schedule
from lrp_prune.pruning.schedules import rounds_of


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("rounds", [1, 2, 3, 7, 50])
@pytest.mark.parametrize(("initial", "final"), [(0.0, 0.7), (0.1, 0.9), (0.3, 0.3), (0.0, 0.0), (0.2, 0.999)])
def test_named_schedules_rise_to_exactly_the_final_sparsity(schedule, rounds, initial, final):
    totals = sparsity_schedule(schedule, final, rounds, initial)
    assert len(totals) == rounds
    assert totals[-1] == final
    assert all(earlier <= later for earlier, later in pairwise([initial, *totals]))


def test_forms():
    assert sparsity_schedule("one_shot", 0.5, 3) == [0.5, 0.5, 0.5]
    assert sparsity_schedule("linear", 0.8, 4, 0.4) == pytest.approx([0.5, 0.6, 0.7, 0.8])
    # Zhu & Gupta, eq. 1, with t_0 = 0 and n * dt = rounds.
    assert sparsity_schedule("cubic", 0.8, 4) == pytest.approx([0.8 - 0.8 * (1 - t / 4) ** 3 for t in (1, 2, 3, 4)])
    totals = [0.1, *sparsity_schedule("exponential", 0.9, 5, 0.1)]
    shares = [(later - earlier) / (1 - earlier) for earlier, later in pairwise(totals)]
    assert shares == pytest.approx([shares[0]] * 5)


def test_lists_and_callables_are_total_sparsities():
    assert sparsity_schedule([0.1, 0.1, 0.6], 0.6, 3) == [0.1, 0.1, 0.6]
    assert sparsity_schedule(lambda number: number / 10, 0.3, 3) == [0.1, 0.2, 0.3]  # 3 / 10 is not quite 0.3
    assert sparsity_schedule([0], 0.0, 1) == [0.0]


def test_a_list_says_how_many_rounds_there_are():
    assert rounds_of([0.3, 0.5], None) == 2 == rounds_of("linear", 2)
    assert rounds_of("linear", None) is None
    with pytest.raises(ValueError, match="pass rounds="):
        rounds_of(lambda number: 0.5, None)


def test_each_pattern_reaches_its_own_final_sparsity():
    final = {"*.mlp": 0.8, "*.self_attn": 0.4}
    for schedule in SCHEDULES:
        rounds = sparsity_schedule(schedule, final, 4, 0.1)
        for pattern, rate in final.items():
            assert [entry[pattern] for entry in rounds] == sparsity_schedule(schedule, rate, 4, 0.1)
    rounds = sparsity_schedule([0.5, 1], final, 2)
    assert rounds == [{"*.mlp": 0.4, "*.self_attn": 0.2}, final]
    assert sparsity_schedule(lambda number: number / 2, final, 2) == rounds


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("quadratic", 0.5, 3), "schedule must be one of"),
        (("linear", 1.0, 3), r"sparsity must be a number in \[0, 1\), got 1.0"),
        (("linear", -0.1, 3), "got -0.1"),
        (("linear", math.nan, 3), "got nan"),
        (("linear", {"*": 1.5}, 3), r"sparsity\['\*'\] must be"),
        (("linear", {}, 3), "no pattern"),
        (("linear", 0.5, 0), "rounds must be a positive integer, got 0"),
        (("linear", 0.5, 2.0), "rounds must be a positive integer"),
        (("linear", 0.5, 3, 0.6), "initial sparsity 0.6 is above the final one"),
        (("linear", {"a": 0.5, "b": 0.2}, 3, 0.3), "initial sparsity 0.3 is above the final one, 0.2"),
        (([0.1, 0.2], 0.5, 3), "2 entries for rounds=3"),
        (([0.1, 0.2], 0.5, 1), "2 entries for rounds=1"),
        (([0.1, 0.3], 0.5, 2), "ends at 0.3, and the sparsity to reach is 0.5"),
        (([0.1, 0.7], 0.5, 2), "ends at 0.7, and the sparsity to reach is 0.5"),
        ((lambda number: 0.1 * number, 0.5, 2), "ends at 0.2"),
        (([0.1, 0.3], {"a": 0.3}, 2), "ends at 0.3, and the share of each sparsity to reach is 1"),
        (([], 0.5, 1), "the schedule is empty"),
        ((0.5, 0.5, 1), "schedule must be one of"),
        (({"linear": 1}, 0.5, 1), "schedule must be one of"),
        (([0.1, 0.3, 0.2], 0.5, 3), "falls from 0.3 to 0.2 in round 3"),
        (([0.1, 0.3, 1.0], 0.5, 3), r"round 3 of the schedule must be in \[0, 1\), got 1.0"),
        (([0.5, 1.1], {"a": 0.5}, 2), r"must be in \[0, 1\], got 1.1"),
        ((lambda number: math.nan, 0.5, 2), "round 1 .* got nan"),
        ((lambda number: "0.5", 0.5, 2), "round 1 .* got '0.5'"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        sparsity_schedule(*arguments)
