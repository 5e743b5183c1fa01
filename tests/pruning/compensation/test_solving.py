"""Least squares under a mask, against each row's closed form and an independent column-by-column update."""

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from lrp_prune.pruning.compensation.solving import least_squares, optimal_brain_surgeon
from tests.benchmarks.sparsegpt import sparsegpt_


def problem(rows: int = 6, width: int = 12, samples: int = 40) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gram matrix, cross products, mask and dense weights, ill-conditioned as the inputs of a trained layer are."""
    torch.manual_seed(0)
    inputs = (
        torch.randn(width, samples, dtype=torch.float64) * torch.logspace(0, 2, width, dtype=torch.float64)[:, None]
    )
    weight = torch.randn(rows, width, dtype=torch.float64)
    gram = inputs @ inputs.T
    return gram, weight @ gram, torch.rand(rows, width) > 0.5, weight


def test_each_row_has_its_closed_form() -> None:
    gram, cross, kept, weight = problem()
    found = least_squares(gram, cross, kept, weight, steps=200, tolerance=1e-12)
    for row, own, support in zip(found, cross, kept, strict=True):
        expected = torch.linalg.solve(gram[support][:, support], own[support])
        assert torch.allclose(row[support], expected, rtol=1e-8, atol=1e-10)
        assert not row[~support].any()


def test_where_the_search_starts_does_not_matter() -> None:
    gram, cross, kept, weight = problem()
    one, other = (least_squares(gram, cross, kept, start, 200, 1e-12) for start in (weight, torch.zeros_like(weight)))
    assert torch.allclose(one, other, rtol=1e-8)


def test_rows_that_keep_nothing_or_everything() -> None:
    gram, cross, kept, weight = problem()
    kept[0], kept[1] = False, True
    found = least_squares(gram, cross, kept, torch.zeros_like(weight), 300, 1e-12)
    assert not found[0].any()
    assert torch.allclose(found[1], weight[1], rtol=1e-8)


def test_a_row_that_is_done_waits_for_the_others() -> None:
    gram, cross, kept, weight = problem()
    cross[2] = 0.0
    found = least_squares(gram, cross, kept, torch.zeros_like(weight), 200, 1e-12)
    assert not found[2].any() and bool(torch.isfinite(found).all())
    assert torch.allclose(found[3:], least_squares(gram, cross[3:], kept[3:], weight[3:], 200, 1e-12), rtol=1e-8)


def test_rows_that_are_done_cost_nothing_more() -> None:
    """One row that is far from its solution keeps the others from nothing."""
    gram, cross, kept, weight = problem(rows=64, width=40, samples=80)
    done = least_squares(gram, cross, kept, weight, 500, 1e-12)
    start = done.clone()
    start[5] = 0.0
    with FlopCounterMode(display=False) as all_but_one:
        found = least_squares(gram, cross, kept, start, 500, 1e-9)
    with FlopCounterMode(display=False) as alone:
        least_squares(gram, cross[5:6], kept[5:6], start[5:6], 500, 1e-9)
    assert torch.allclose(found, done, rtol=1e-5, atol=1e-9)
    first = 2 * weight.numel() * 40  # where the rows are looked at
    assert all_but_one.get_total_flops() <= alone.get_total_flops() + first


def test_fewer_steps_are_less_exact_and_never_worse_than_the_mask() -> None:
    gram, cross, kept, weight = problem()

    def error(found: Tensor) -> float:
        return float((((found - weight) @ gram) * (found - weight)).sum())

    errors = [error(least_squares(gram, cross, kept, weight, steps, 1e-12)) for steps in (1, 2, 4, 8, 100)]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] < error(weight * kept)


@pytest.mark.parametrize("width", [12, 150])
def test_column_by_column_is_sparsegpt_with_a_given_mask(width: int) -> None:
    gram, _, kept, weight = problem(width=width, samples=4 * width)
    damping = 0.01 * gram.diagonal().mean()
    expected = weight.clone()
    sparsegpt_(expected, gram, 0.5, kept)
    found = optimal_brain_surgeon(gram + damping * torch.eye(width, dtype=torch.float64), weight, kept)
    assert torch.allclose(found, expected, rtol=1e-7, atol=1e-9)
    assert not found[~kept].any()


def test_least_squares_are_closer_than_column_by_column() -> None:
    gram, cross, kept, weight = problem()
    exact, greedy = least_squares(gram, cross, kept, weight, 200, 1e-12), optimal_brain_surgeon(gram, weight, kept)
    errors = [float((((found - weight) @ gram) * (found - weight)).sum()) for found in (exact, greedy, weight * kept)]
    assert errors[0] < errors[1] < errors[2]
