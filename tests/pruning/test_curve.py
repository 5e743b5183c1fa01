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
        assert curve.reached[name][0.5] == pytest.approx(lrp_prune.select(relevance, 0.5, scope).sparsity)
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
