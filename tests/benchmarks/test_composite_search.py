"""The measurement of searched composites measures what it says."""

import pytest
import torch

from tests.benchmarks import composite_search as benchmark


@pytest.mark.slow
@pytest.mark.parametrize("data", benchmark.SETS)
@pytest.mark.parametrize("network", benchmark.NETWORKS)
def test_networks_take_the_sets_and_these_follow_from_the_seed(network: str, data: str) -> None:
    images, labels = benchmark.SETS[data](0)
    assert benchmark.NETWORKS[network](images.shape[-1])(images[:3]).shape == (3, 10)
    assert torch.equal(images, benchmark.SETS[data](0)[0]) and not torch.equal(labels, benchmark.SETS[data](1)[1])


@pytest.mark.slow
def test_what_is_measured_is_of_the_test_part(monkeypatch) -> None:
    monkeypatch.setitem(benchmark.EPOCHS, "ViT", 1)
    monkeypatch.setattr(benchmark, "RATES", (0.0, 0.5))
    row = benchmark.measured("ViT", "digits", 0, trials=1)
    assert row["searched"] == row["epsilon"] and 0 < row["dense"] < 1  # the first trial is plain epsilon


def test_the_table_has_means_and_intervals_over_seeds() -> None:
    rows = [{"dense": 0.9, "epsilon": 0.5 + 0.01 * seed, "searched": 0.6 + 0.03 * seed} for seed in range(3)]
    found = benchmark.table({f"ViT, digits, {seed}": row for seed, row in enumerate(rows)})
    # The gains are 0.10, 0.12 and 0.14: half an interval is 4.30 * 0.02 / sqrt(3).
    expected = "| ViT | digits | 3 | 0.900 ± 0.000 | 0.510 ± 0.025 | 0.630 ± 0.074 | 0.120 ± 0.050 |"
    assert found.splitlines()[2:] == [expected]
