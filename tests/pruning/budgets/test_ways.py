"""Where budgets come from: outliers, spectra, and what pruning each block alone does."""

import math
import warnings

import numpy
import pytest
import torch
from torch import nn

import lrp_prune
from lrp_prune.pruning import budgets
from lrp_prune.pruning.budgets.sensitivity import cheapest
from lrp_prune.relevance import Relevance
from lrp_prune.relevance.unscored import UnscoredWeightsWarning
from tests.support.small_models import batch_for, build


def stack() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 5))


def batches(number: int = 2) -> list[tuple[torch.Tensor, torch.Tensor]]:
    torch.manual_seed(1)
    return [(torch.randn(16, 20), torch.randint(5, (16,))) for _ in range(number)]


def test_more_outliers_keep_more() -> None:
    torch.manual_seed(0)
    values = {name: torch.rand(10, 100) for name in ("0.weight", "2.weight", "4.weight")}
    values["2.weight"][:, :10] = 50.0  # a tenth are outliers
    values["4.weight"][:, :2] = 50.0
    model = nn.Sequential(*(nn.Linear(100, 10) if index % 2 == 0 else nn.Identity() for index in range(5)))
    found = budgets.outlier_weighted(model, (), 0.6, spread=0.08, relevance=Relevance(values, statistic="signed"))
    # Shares of outliers 0, 0.1 (50 is 9 times the mean) and 0.02: linear between, and 0.6 in the mean.
    middle = 0.6 - (0.16 + 0.0 + 0.16 * 0.8) / 3
    assert list(found.values()) == pytest.approx([middle + 0.16, middle, middle + 0.16 * 0.8], abs=1e-3)


def test_an_outlier_is_so_many_times_the_mean_of_its_block() -> None:
    values = torch.ones(4, 25)
    values[0, :5] = 4.0
    other = torch.ones(4, 25)
    model = nn.Sequential(nn.Linear(25, 4), nn.Linear(25, 4))
    relevance = Relevance({"0.weight": values, "1.weight": other}, statistic="signed")
    below = budgets.outlier_weighted(model, (), 0.5, threshold=3.4, spread=0.1, relevance=relevance)  # 3.48 times
    beyond = budgets.outlier_weighted(model, (), 0.5, threshold=3.5, spread=0.1, relevance=relevance)
    assert below["0.weight"] == pytest.approx(0.4) and below["1.weight"] == pytest.approx(0.6)
    assert beyond["0.weight"] == pytest.approx(0.5) == beyond["1.weight"]


@pytest.mark.parametrize("method", ["wanda", "lrp", "magnitude"])
def test_scores_are_collected_by_any_method_and_the_model_is_as_it_was(method: str) -> None:
    model = stack()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = budgets.outlier_weighted(model, batches(), 0.5, method=method, threshold=2.0, progress=False)
    assert found.sparsity == pytest.approx(0.5, abs=1e-6) and len(set(found.values())) > 1
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_exponent_is_hills() -> None:
    torch.manual_seed(0)
    weight = torch.randn(12, 30)
    values = numpy.sort(numpy.linalg.eigvalsh((weight @ weight.T).double().numpy()))
    half = len(values) // 2
    expected = 1 + half / sum(math.log(values[-index] / values[-half - 1]) for index in range(1, half + 1))
    assert budgets.tail_exponent(weight) == pytest.approx(expected, rel=1e-4)
    assert budgets.tail_exponent(weight.T) == pytest.approx(expected, rel=1e-4)
    assert budgets.tail_exponent(torch.stack([weight, 3 * weight])) == pytest.approx(expected, rel=1e-4)
    assert budgets.tail_exponent(weight.reshape(12, 10, 3, 1)) == pytest.approx(expected, rel=1e-4)


def test_heavier_tails_keep_more() -> None:
    model = nn.Sequential(nn.Linear(16, 16, bias=False), nn.Linear(16, 16, bias=False))
    for layer, power in zip(model, (0.5, 3.0), strict=True):
        assert isinstance(layer, nn.Linear)
        layer.weight.data = torch.diag(torch.arange(1.0, 17.0) ** power)
    found = budgets.heavy_tailed(model, 0.5, spread=0.1)
    assert found["0.weight"] == pytest.approx(0.6, abs=0.01) and found["1.weight"] == pytest.approx(0.4, abs=0.01)


def test_a_layer_of_one_output_is_taken_for_the_mean_and_told(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 1))
    for layer, power in zip(model, (0.5, 3.0), strict=False):
        assert isinstance(layer, nn.Linear)
        layer.weight.data = torch.diag(torch.arange(1.0, 17.0) ** power)
    with caplog.at_level("INFO", "lrp_prune"):
        found = budgets.heavy_tailed(model, 0.5, spread=0.1)
    assert found["1.weight"] < found["2.weight"] < found["0.weight"]
    assert "2.weight" in caplog.text
    with pytest.raises(ValueError, match="no weight has a spectrum"):
        budgets.heavy_tailed(model[2:], 0.5)


def test_weights_without_a_tail_are_named() -> None:
    with pytest.raises(ValueError, match="no spectrum"):
        budgets.tail_exponent(torch.ones(1, 5))
    with pytest.raises(ValueError, match="no tail"):
        budgets.tail_exponent(torch.zeros(4, 4))
    model = stack()
    model[2].weight.data.fill_diagonal_(float("nan"))  # type: ignore[union-attr, operator]
    with pytest.raises(ValueError, match=r"2.weight: .*not finite; leave it out by exclude=\['2.weight'\]"):
        budgets.heavy_tailed(model)
    model[2].weight.data = torch.eye(40)  # type: ignore[union-attr]
    with pytest.raises(ValueError, match=r"2.weight: .*no tail"):
        budgets.heavy_tailed(model)
    assert budgets.heavy_tailed(model, exclude=["2.weight"]).sparsity == pytest.approx(0.5)
    with pytest.raises(ValueError, match=r"0.weight is on the meta device"):
        budgets.heavy_tailed(model.to("meta"))


def test_a_convolution_over_time_is_no_stack_of_experts() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(6, 20, 3), nn.Flatten(), nn.Linear(20, 20))
    weight = model[0].weight
    assert budgets.tail_exponent(weight, "convolution") == budgets.tail_exponent(weight.flatten(1))  # type: ignore
    assert budgets.tail_exponent(weight, "convolution") != budgets.tail_exponent(weight)  # type: ignore[arg-type]
    found = budgets.heavy_tailed(model, 0.5)
    wider = budgets.tail_exponent(weight.flatten(1)) > budgets.tail_exponent(model[2].weight)  # type: ignore
    assert (found["0.weight"] > found["2.weight"]) == wider
    pointwise = nn.Sequential(nn.Conv1d(6, 20, 1), nn.Conv1d(20, 20, 1))
    assert budgets.heavy_tailed(pointwise, 0.5).sparsity == pytest.approx(0.5, abs=1e-2)


def test_what_costs_least_is_pruned_next() -> None:
    """Against trying all: shares in steps of 1 %, three groups of different size."""
    levels = [0.2, 0.5, 0.8]
    curves, sizes = [[0.1, 0.5, 2.0], [0.0, 0.1, 0.7], [0.2, 0.3, 5.0]], [100, 300, 50]
    found = cheapest(levels, curves, sizes, 0.5)
    assert sum(share * size for share, size in zip(found, sizes, strict=True)) == pytest.approx(0.5 * 450)

    def cost(shares: list[float]) -> float:
        return sum(float(numpy.interp(share, levels, curve)) for share, curve in zip(shares, curves, strict=True))

    best = math.inf
    for first in numpy.arange(0.2, 0.8001, 0.01):
        for third in numpy.arange(0.2, 0.8001, 0.01):
            second = (225 - 100 * first - 50 * third) / 300
            if 0.2 <= second <= 0.8:
                best = min(best, cost([first, second, third]))
    assert cost(found) <= best + 1e-9


def test_costs_that_are_not_convex_or_fall_are_made_so() -> None:
    # Of the first group the middle level is on no hull: its way goes from 0 to 4 evenly, 4 for 0.5 of 10.
    assert cheapest([0.25, 0.5, 0.75], [[0.0, 3.0, 4.0], [0.0, 1.0, 9.0]], [10, 10], 0.5) == pytest.approx([0.5, 0.5])
    assert cheapest([0.0, 0.5], [[5.0, 1.0], [0.0, 1.0]], [10, 10], 0.25) == pytest.approx([0.5, 0.0])


def test_what_costs_alike_goes_alike() -> None:
    assert cheapest([0.2, 0.8], [[0.0, 0.0], [0.0, 0.0], [0.0, 1.0]], [10, 30, 10], 0.5) == pytest.approx(
        [0.575, 0.575, 0.2]
    )
    # The same for each entry: of the second three times as much, and it is three times as large.
    assert cheapest([0.2, 0.8], [[0.0, 1.0], [0.0, 3.0]], [10, 30], 0.5) == pytest.approx([0.5, 0.5])


class Branches(nn.Module):
    """One branch says nearly everything."""

    def __init__(self) -> None:
        super().__init__()
        self.loud, self.quiet = nn.Linear(20, 5), nn.Linear(20, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.loud(x) + 1e-3 * self.quiet(x)
        return result


@pytest.mark.parametrize("levels", [2, 3, 5])
def test_a_block_that_matters_keeps_more_and_the_model_is_as_it_was(levels: int) -> None:
    torch.manual_seed(0)
    model = Branches()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = budgets.measured(model, batches(), 0.5, method="magnitude", levels=levels, progress=False)
    assert dict(found) == pytest.approx({"loud.weight": 0.3, "quiet.weight": 0.7})
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_language_models_are_pruned_by_each_budget_exactly(name: str) -> None:
    batch = batch_for(build(name))
    for make in (
        lambda model: budgets.outlier_weighted(model, [batch], 0.5, threshold=2.5, progress=False),
        lambda model: budgets.heavy_tailed(model, 0.5),
        lambda model: budgets.measured(model, [batch], 0.5, by="tensor", progress=False),
    ):
        model = build(name)
        budget = make(model)
        assert budget.sparsity == pytest.approx(0.5, abs=1e-5) and len(set(budget.values())) > 1
        masks = lrp_prune.prune(model, [batch], budget, progress=False, recalibrate=False)
        assert {name: masks.pruned_in(name) for name in budget} == {
            name: round(share * budget.sizes[name]) for name, share in budget.items()
        }


class Unused(Branches):
    """Has a layer that does not run."""

    def __init__(self) -> None:
        super().__init__()
        self.idle = nn.Linear(20, 5)


def test_what_is_not_scored_is_named_and_not_in_the_budget() -> None:
    torch.manual_seed(0)
    for make in (budgets.outlier_weighted, budgets.measured):
        model = Unused()
        with pytest.warns(UnscoredWeightsWarning, match=r"100 of 300 weights.*not in the budget.*idle.weight"):
            found = make(model, batches(), 0.5, progress=False)  # type: ignore[operator]
        assert set(found) == {"loud.weight", "quiet.weight"} and found.sparsity == pytest.approx(0.5)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            make(model, batches(), 0.5, exclude=["idle.weight"], progress=False)  # type: ignore[operator]


def test_weights_whose_zeros_would_be_none_are_refused() -> None:
    model = stack()
    nn.utils.parametrizations.weight_norm(model[2])
    for make in (budgets.outlier_weighted, budgets.measured):
        with pytest.raises(ValueError, match=r"cannot prune 2\."):
            make(model, batches(), 0.5, progress=False)  # type: ignore[operator]


class WithTarget(Branches):
    """Its forward takes what no batch gives, and its own target does."""

    def forward(self, x: torch.Tensor, scale: float) -> torch.Tensor:  # type: ignore[override]
        return super().forward(x) * scale

    def relevance_target(self, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        return self(batch[0], 2.0).gather(1, batch[1][:, None])[:, 0]


def test_a_target_of_the_models_own_is_compared() -> None:
    torch.manual_seed(0)
    found = budgets.measured(WithTarget(), iter(batches()), 0.5, method="magnitude", progress=False)
    assert dict(found) == pytest.approx({"loud.weight": 0.3, "quiet.weight": 0.7})


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_models_in_half_precision(kind: torch.dtype) -> None:
    torch.manual_seed(0)
    model, given = Branches().to(kind), [(inputs.to(kind), labels) for inputs, labels in batches()]
    assert budgets.measured(model, given, 0.5, progress=False)["loud.weight"] == pytest.approx(0.3)
    for found in (
        budgets.heavy_tailed(model, 0.5),
        budgets.outlier_weighted(model, given, 0.5, threshold=2.0, progress=False),
    ):
        assert found.sparsity == pytest.approx(0.5)


def test_an_error_in_the_middle_leaves_the_model_as_it_was() -> None:
    model, calls = stack(), [0]
    before = {name: value.clone() for name, value in model.state_dict().items()}

    def failing(*_: object) -> None:
        calls[0] += 1
        if not bool(model[2].weight.all()):  # type: ignore[union-attr, operator]
            raise KeyError("not today")

    model.register_forward_pre_hook(failing)
    with pytest.raises(KeyError, match="not today"):
        budgets.measured(model, batches(), 0.5, progress=False)
    assert calls[0] > 5 and all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_outputs_that_are_not_finite_are_refused() -> None:
    model = stack()
    model.append(nn.Threshold(-1e9, 0.0)).register_forward_hook(lambda *given: given[-1] / 0)
    with pytest.raises(ValueError, match="not finite"):
        budgets.measured(model, batches(), 0.5, method="magnitude", progress=False)


def test_a_budget_of_nothing_prunes_nothing() -> None:
    for make in (budgets.outlier_weighted, budgets.measured):
        found = make(stack(), batches(), 0.0, spread=0.1, progress=False)  # type: ignore[operator]
        assert set(found.values()) == {0.0}


def test_wrong_arguments_are_refused() -> None:
    model = stack()
    with pytest.raises(ValueError, match="threshold"):
        budgets.outlier_weighted(model, batches(), 0.5, threshold=1)
    with pytest.raises(ValueError, match="spread"):
        budgets.measured(model, batches(), 0.5, spread=0)
    with pytest.raises(ValueError, match="levels"):
        budgets.measured(model, batches(), 0.5, levels=1)
    with pytest.raises(ValueError, match="needs batches"):
        budgets.measured(model, [], 0.5)
    with pytest.raises(ValueError, match="more than it can be"):
        budgets.measured(model, batches(), 0.995)
    with pytest.raises(ValueError, match=r"no shares between.*in_steps"):
        budgets.measured(model, batches(), 0.5, scope="N:8")
    relevance = lrp_prune.attribute(model, batches(), granularity="neuron", target="class")
    for make in (budgets.outlier_weighted, budgets.measured):
        with pytest.raises(ValueError, match="about neurons"):
            make(model, batches(), 0.5, relevance=relevance)  # type: ignore[operator]
