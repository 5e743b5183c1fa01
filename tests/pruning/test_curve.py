"""A metric by pruning rate: each point is what pruning to that rate gives, and the model comes back."""

import pytest
import torch
from torch import nn

import lrp_prune
from lrp_prune import Scope
from lrp_prune.metrics import pruning_area, top_pruning_rate

RATES = (0.0, 0.25, 0.5, 0.75)


@pytest.fixture
def trained():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.BatchNorm1d(16), nn.Linear(16, 3))
    inputs = torch.randn(200, 6)
    labels = (inputs[:, :3]).argmax(1)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(80):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs), labels).backward()
        optimizer.step()

    def accuracy(model: nn.Module) -> float:
        with torch.no_grad():
            return float((model(inputs).argmax(1) == labels).float().mean())

    return model, [(inputs, labels)], accuracy


@pytest.mark.parametrize("granularity, scope", [("weight", Scope("layer")), ("neuron", "global")])
def test_each_point_is_the_model_pruned_to_that_rate(trained, granularity, scope):
    model, batches, accuracy = trained
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = {
        name: lrp_prune.attribute(model, batches, target="class", granularity=granularity, composite=name)
        for name in ("epsilon", "gradient")
    }
    curve = lrp_prune.pruning_curve(model, found, accuracy, RATES, scope, progress=False)
    assert model.training and all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    model.eval()
    for name, relevance in found.items():
        for rate in RATES[1:]:
            lrp_prune.select(relevance, rate, scope).apply_(model)
            assert curve.scores[name][rate] == accuracy(model)
            model.load_state_dict(before)
        row = list(curve.scores[name].values())
        assert row[0] == curve.dense == accuracy(model)
        assert curve.area(name) == pruning_area(RATES, row)
        assert curve.top_rate(name, 0.9) == top_pruning_rate(RATES, row, curve.dense, 0.9)
        of_weights = lrp_prune.select(relevance, 0.5, scope).sparsity
        assert curve.reached[name][0.5] == pytest.approx(of_weights if granularity == "weight" else 0.5)
    assert "where" not in str(curve)  # as much as was asked for, also of units, which own more weights than that
    assert curve.area("epsilon") > 0.4


def test_the_model_comes_back_from_an_error(trained):
    model, batches, _ = trained
    relevance = lrp_prune.attribute(model, batches, target="class")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    calls = []

    def fails(model: nn.Module) -> float:
        calls.append(None)
        if len(calls) == 2:
            raise RuntimeError("not today")
        return 1.0

    with pytest.raises(RuntimeError, match="not today"):
        lrp_prune.pruning_curve(model, relevance, fails, (0.5,), progress=False)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("wrong", [{}, {"a": 1}, [1]])
def test_what_is_no_relevance_is_refused(trained, wrong):
    model, _, accuracy = trained
    with pytest.raises(ValueError, match="relevance must be a Relevance, or several by name"):
        lrp_prune.pruning_curve(model, wrong, accuracy)


@pytest.mark.parametrize(
    "scope, rates, message",
    [
        ("2:4", (0.5, 0.3), "sparsity 0.3 is unreachable"),
        ("nearby", (0.5,), "scope must be"),
        ("global", (0.2, 1.0), "each of rates must be a number"),
        ("global", (), "rates must be different numbers"),
    ],
)
def test_what_cannot_be_selected_is_refused_before_anything_is_evaluated(trained, scope, rates, message):
    model, batches, _ = trained
    weights, neurons = (
        lrp_prune.attribute(
            model, batches, target="class", granularity=kind, exclude=["0"] if kind == "weight" else None
        )
        for kind in ("weight", "neuron")
    )

    def never(model: nn.Module) -> float:
        raise AssertionError("was evaluated")

    with pytest.raises(ValueError, match=message):
        lrp_prune.pruning_curve(model, {"a": weights, "b": weights}, never, rates, scope, progress=False)
    with pytest.raises(ValueError, match="compares single weights"):
        lrp_prune.pruning_curve(model, {"a": weights, "b": neurons}, never, (0.5,), "row", progress=False)
    for relevance in (weights, neurons):
        with pytest.raises(KeyError, match="was it made for another model"):
            lrp_prune.pruning_curve(nn.Sequential(nn.Linear(6, 3)), relevance, never, (0.5,), progress=False)
    other = nn.Sequential(nn.Linear(6, 20), nn.ReLU(), nn.BatchNorm1d(20), nn.Linear(20, 3))
    with pytest.raises(ValueError, match="was it made for another model"):
        lrp_prune.pruning_curve(other, weights, never, (0.5,), progress=False)


def test_a_rate_that_only_scored_weights_cannot_make_up_for_is_refused_before_anything_is_evaluated(trained):
    model, batches, _ = trained
    relevance = lrp_prune.attribute(
        nn.Sequential(*model, nn.Linear(3, 40)), batches, target=lambda m, b: m[:4](b[0]).sum()
    )
    calls = []
    with pytest.raises(ValueError, match=r"sparsity 0.9 of .* only .* of them are scored"):
        lrp_prune.pruning_curve(
            nn.Sequential(*model, nn.Linear(3, 40)),
            relevance,
            lambda m: calls.append(1) or 1.0,
            (0.1, 0.9),
            progress=False,
        )
    assert not calls
