"""The area under a metric by pruning rate, and the highest rate that keeps most of it."""

import math

import numpy as np
import pytest
import torch

from lrp_prune.metrics import PruningArea, TopPruningRate, pruning_area, top_pruning_rate


def test_the_area_is_the_mean_over_rates_by_trapezoids_in_any_order():
    generator = np.random.default_rng(0)
    rates, values = np.sort(generator.uniform(0, 0.95, 20)), generator.uniform(size=20)
    expected = np.interp(np.linspace(rates[0], rates[-1], 200_001), rates, values).mean()
    order = generator.permutation(20)
    assert pruning_area(rates[order].tolist(), values[order].tolist()) == pytest.approx(expected, abs=1e-4)
    assert pruning_area(rates.tolist(), [0.7] * 20) == pytest.approx(0.7)


@pytest.mark.parametrize(
    "values, expected",
    [
        ([1.0, 1.0, 1.0], 0.9),
        ([1.0, 0.9, 0.9], 0.15),  # half-way to the first that keeps too little
        ([1.0, 0.5, 1.0], 0.03),  # what comes back does not count
        ([0.2, 1.0, 1.0], 0.0),
        ([1.0, math.nan, 1.0], 0.0),
    ],
)
def test_the_top_rate_is_the_first_place_that_keeps_too_little(values, expected):
    assert top_pruning_rate([0.0, 0.3, 0.9], values, dense=1.0) == pytest.approx(expected)


def test_of_a_loss_the_top_rate_is_where_it_grows_beyond_its_share():
    found = top_pruning_rate([0.2, 0.4], [10.0, 12.0], dense=10.0, share=0.9, higher_is_better=False)
    assert found == pytest.approx(0.2 + 0.2 * (10 / 0.9 - 10) / 2)


def test_metrics_add_up_batches_and_processes():
    rates = [0.5, 0.0, 0.9]
    one, other = PruningArea(rates), PruningArea(rates)
    whole = PruningArea(rates)
    for index, (rate, size) in enumerate([(0.0, 3), (0.5, 2), (0.9, 4), (0.0, 5), (0.9, 1), (0.5, 3)]):
        values = torch.rand(size)
        whole.update(values, rate)
        (one, other)[index % 2].update(values, rate)
    one.totals += other.totals  # as a reduction over processes does
    one.counts += other.counts
    assert one.compute() == whole.compute()
    assert float(whole.compute()) == pytest.approx(pruning_area(whole.rates, whole.means()))
    assert math.isnan(PruningArea(rates).compute())


def test_the_top_rate_is_of_what_the_dense_model_reached():
    top = TopPruningRate([0.0, 0.2, 0.6], share=0.5)
    for rate, share in ((0.0, 0.8), (0.2, 0.6), (0.6, 0.2)):
        top.update((torch.arange(10) < 10 * share).float(), rate)
    assert float(top.compute()) == pytest.approx(0.4)


@pytest.mark.parametrize("missing", [0.0, 0.2, 0.6])
def test_there_is_no_top_rate_where_a_rate_has_no_samples(missing):
    top = TopPruningRate([0.0, 0.2, 0.6])
    for rate in {0.0, 0.2, 0.6} - {missing}:
        top.update(torch.ones(3), rate)
    assert math.isnan(top.compute())


@pytest.mark.parametrize(
    "wrong, message",
    [
        (lambda: pruning_area([0.5], [1.0]), "between two pruning rates"),
        (lambda: pruning_area([0.5, 0.5], [1.0, 1.0]), "different rates"),
        (lambda: pruning_area([0.5, 0.6], [1.0]), "got 1 for"),
        (lambda: pruning_area([0.5, 1.0], [1.0, 0.0]), r"in \[0, 1\), got 1.0"),
        (lambda: top_pruning_rate([0.5], [1.0], dense=0.0), "must be positive"),
        (lambda: top_pruning_rate([0.5], [1.0], dense=1.0, share=1.5), "share in"),
        (lambda: PruningArea([0.1]), "between two"),
        (lambda: TopPruningRate([0.1, 0.2]), "must begin with 0"),
        (lambda: PruningArea([0.0, 0.5]).update(torch.ones(1), 0.4), "rate must be one of"),
    ],
)
def test_what_makes_no_curve_is_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        wrong()
