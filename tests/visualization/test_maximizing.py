"""The samples that units are most relevant for, against the relevance of each sample by itself."""

import pytest
import torch
from torch import Tensor, nn

import lrp_prune
from tests.support.small_models import batch_for, build


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))


def test_the_samples_are_those_of_largest_relevance() -> None:
    model, data = network(), torch.randn(11, 4, generator=torch.Generator().manual_seed(1))
    units = {"2": [1, 4]}
    found = lrp_prune.top_samples(model, list(data.split(4)), units, number=3, target=1, progress=False)
    hidden = torch.relu(model[0](data)).detach() * model[2].weight[1].detach()
    for place in (1, 4):
        best = hidden[:, place].topk(3)
        samples = found["2", place]
        assert [sample.relevance for sample in samples] == pytest.approx(best.values.tolist(), rel=1e-4)
        assert [sample.number for sample in samples] == best.indices.tolist()
        assert all(torch.equal(sample.batch, data[sample.number : sample.number + 1]) for sample in samples)
    assert "2[1]: samples" in str(found) and len(found) == 2
    assert lrp_prune.explain(model, found["2", 1][0].batch, target=1).inputs["input"].relevance.shape == (1, 4)


def test_of_a_relevance_the_largest_units_are_looked_at() -> None:
    model, data = network(), torch.randn(8, 4)
    relevance = lrp_prune.attribute(model, [data], target="last_token", granularity="neuron")
    found = lrp_prune.top_samples(model, [data], relevance, number=2, progress=False)
    assert {place for _, place in found} == set(relevance["2"].topk(5).indices.tolist())


def test_what_is_not_there_is_said() -> None:
    model, data = network(), torch.randn(8, 4)
    with pytest.raises(KeyError, match="there is no group of units '7', there are 2"):
        lrp_prune.top_samples(model, [data], {"7": [0]}, progress=False)
    with pytest.raises(KeyError, match="has 6 units, got 6"):
        lrp_prune.top_samples(model, [data], {"2": [6]}, progress=False)
    with pytest.raises(ValueError, match="no batches"):
        lrp_prune.top_samples(model, [], {"0": [0]}, progress=False)
    with pytest.raises(ValueError, match="relevance of weights"):
        lrp_prune.top_samples(model, [data], lrp_prune.attribute(model, [data], target="last_token"), progress=False)


@pytest.mark.slow
def test_they_are_drawn() -> None:
    pytest.importorskip("matplotlib")
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(3 * 36, 2))
    images = torch.rand(5, 1, 8, 8)
    found = lrp_prune.top_samples(model, [images], {"3": [0, 2]}, number=2, progress=False)
    figure = found.plot()
    assert sum(bool(axes.images) for axes in figure.axes) == 4
    rows = lrp_prune.top_samples(network(), [torch.randn(8, 4)], {"2": [0]}, number=2, progress=False)
    assert len(rows.plot().axes[0].patches) == 2


def test_they_are_of_the_models_own_target_if_it_has_one() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = network()

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)

        def relevance_target(self, batch: Tensor) -> Tensor:
            return 3 * self(batch)[:, 0].sum()

    model, data = Own(), torch.randn(8, 4)
    (samples,) = lrp_prune.top_samples(model, [data], {"net.2": [1]}, number=2, progress=False).values()
    relevance = 3 * torch.relu(model.net[0](data))[:, 1] * model.net[2].weight[0, 1]
    assert [sample.relevance for sample in samples] == pytest.approx(relevance.topk(2).values.tolist(), rel=1e-4)


def test_no_units_are_refused() -> None:
    with pytest.raises(ValueError, match="units names no unit"):
        lrp_prune.top_samples(network(), [torch.randn(8, 4)], {}, progress=False)


def test_units_of_a_relevance_are_of_its_kind() -> None:
    model, batch = build("llama"), batch_for("llama")
    heads = lrp_prune.attribute(model, [batch], target="last_token", granularity="head")
    found = lrp_prune.top_samples(model, [batch], heads, number=1, progress=False)
    assert {group for group, _ in found} <= set(heads) and len(found) == 5
