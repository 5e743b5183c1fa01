import pytest

from tests.benchmarks import cost


@pytest.mark.parametrize("count, places", [(6, 0), (12, 2), (20, 5)])
def test_interval_of_the_median_is_made_of_the_tabulated_order_statistics(count: int, places: int) -> None:
    """Sign test table: with 6 values the extremes, with 12 the 3rd and 10th, with 20 the 6th and 15th."""
    middle, low, high = cost.median_interval([float(value) for value in range(count)][::-1])
    assert (middle, low, high) == ((count - 1) / 2, float(places), float(count - 1 - places))


def test_too_few_values_give_the_extremes() -> None:
    assert cost.median_interval([3.0, 1.0, 2.0]) == (2.0, 1.0, 3.0)
