"""Sums of products: half of a symmetric matrix is computed, and what lies beside the columns adds nothing."""

import pytest
import torch

from lrp_prune.pruning.compensation.summing import mirrored_, with_ones, with_products, with_upper_products


@pytest.mark.parametrize("width", [1, 15, 16, 127, 128, 300, 2100])
def test_half_of_a_symmetric_sum_tells_the_other(width: int) -> None:
    first, second = torch.randn(2, 2, 40, width, dtype=torch.float64)
    total = with_upper_products(with_upper_products(None, first), second)
    expected = first.transpose(1, 2) @ first + second.transpose(1, 2) @ second
    assert torch.allclose(total.triu(), expected.triu(), atol=1e-10)
    assert torch.allclose(mirrored_(total), expected, atol=1e-10)


def test_of_a_wide_symmetric_sum_about_half_is_computed() -> None:
    total = with_upper_products(None, torch.ones(1, 2, 2048))
    computed = int(total.count_nonzero())
    assert computed < 0.6 * total.numel()


@pytest.mark.parametrize(("width", "padded"), [(15, 16), (16, 32), (576, 592), (1, 16)])
def test_a_one_is_beside_each_row_and_zeros_up_to_an_even_width(width: int, padded: int) -> None:
    rows, roots = torch.randn(2, 3, width).bfloat16(), torch.rand(3, 1)
    found = with_ones(rows, roots)
    assert found.shape == (2, 3, padded) and found.dtype == torch.float32
    assert torch.equal(found[:, :, :width], rows.float() * roots)
    assert torch.equal(found[:, :, width], roots.T.expand(2, 3))
    assert not found[:, :, width + 1 :].any()


def test_products_are_added_in_the_memory_of_the_total() -> None:
    left, right = torch.randn(2, 3, 40, 16, dtype=torch.float64)
    total = with_products(None, left, right)
    again = with_products(total, left, right)
    assert again is total and torch.allclose(total, 2 * left.transpose(1, 2) @ right)
