"""Weights that are used by views, under dropout, or over other dimensions than a layer's own."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils import prune as torch_prune

import lrp_prune
from lrp_prune.pruning import scorer
from lrp_prune.pruning.checking import check_uses
from lrp_prune.relevance.unscored import CONSTANTS, UnscoredWeightsWarning
from tests.support.used_weights import Masked, Using, small_model, sum_of_outputs


@pytest.mark.parametrize("change", ["prune", "spectral_norm", "parametrize"])
def test_a_model_that_is_itself_parametrized(change: str) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(8, 6)
    if change == "prune":
        torch_prune.l1_unstructured(layer, "weight", 0.3)
    elif change == "spectral_norm":
        nn.utils.spectral_norm(layer)
    else:
        parametrize.register_parametrization(layer, "weight", Masked())
    x = torch.randn(5, 8)
    options = {"statistic": "signed", "composite": "gradient", "matmul_dtype": None}
    relevance = lrp_prune.attribute(layer.eval(), [x], target=sum_of_outputs, **options)
    (name,) = relevance
    weight = layer.weight.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(F.linear(x, weight, layer.bias).square().sum(), weight)
    torch.testing.assert_close(relevance[name] * 5, (weight * gradient).detach())


def test_a_weight_repeated_by_a_view_gets_the_relevance_of_all_its_places() -> None:
    class Repeated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(1, 8, dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.weight.expand(6, 8))

    model, x = small_model(Repeated()), torch.randn(5, 8, dtype=torch.float64)
    relevance = lrp_prune.attribute(model, [x], target=sum_of_outputs, statistic="signed", composite="gradient")
    weight = model[0].weight
    (gradient,) = torch.autograd.grad(sum_of_outputs(model, x), weight)
    torch.testing.assert_close(relevance["0.weight"].double() * 5, (weight * gradient).detach())


def test_views_of_copies_lie_where_they_lie_in_the_parameter() -> None:
    """A copy has other strides than what it was made of, and a view of it must not be taken for one of the parameter."""
    for function in (
        lambda weight: weight.t().contiguous().t(),
        lambda weight: weight.t().contiguous()[:4].t().contiguous(),
        lambda weight: weight.t().contiguous().chunk(2)[1].t(),
        lambda weight: weight.reshape(2, 3, 8).transpose(0, 1).contiguous()[1],
    ):
        shape = function(torch.zeros(6, 8)).shape
        offset = 4 if shape == (6, 4) and function(torch.arange(48.0).reshape(6, 8))[0, 0] == 4 else 0
        layer = Using(function)
        torch.manual_seed(0)
        model, x = nn.Sequential(layer).double(), torch.randn(5, 8, dtype=torch.float64)
        layer.bias = None
        given = x[:, offset : offset + shape[1]]
        options = {"target": sum_of_outputs, "statistic": "signed", "composite": "gradient"}
        relevance = lrp_prune.attribute(model, [given], **options)
        (gradient,) = torch.autograd.grad(sum_of_outputs(model, given), layer.weight)
        torch.testing.assert_close(relevance["0.weight"].double() * 5, (layer.weight * gradient).detach())


def test_dropped_weights_are_whole_while_relevance_is_collected() -> None:
    """Dropout is off, also of weights."""
    model, x = (
        small_model(Using(lambda weight: F.dropout(weight, 0.5, training=True))),
        torch.randn(5, 8, dtype=torch.float64),
    )
    plain = small_model()
    plain.load_state_dict(model.state_dict())
    found, expected = (lrp_prune.attribute(entry, [x], target=sum_of_outputs) for entry in (model, plain))
    torch.testing.assert_close(found["0.weight"], expected["0.weight"])


class Positions(nn.Module):
    """Attention of queries to positions that a layer of their own, or that of the keys, goes over first."""

    def __init__(self, shared: bool) -> None:
        super().__init__()
        self.query, self.key = nn.Linear(8, 8), nn.Linear(8, 8)
        self.position_table = nn.Parameter(torch.randn(5, 8))
        self.of_positions = self.key if shared else nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        q, k = self.query(x), self.key(x)
        positions = self.of_positions(self.position_table).expand(len(x), -1, -1)
        return torch.bmm(q, k.transpose(1, 2)) + torch.bmm(q, positions.transpose(1, 2))


def _sum_of_squares(model: nn.Module, batch: Tensor) -> Tensor:
    value: Tensor = model(batch).square().sum()
    return value


def test_a_layer_over_positions_is_told_of_and_not_refused() -> None:
    torch.manual_seed(0)
    model, x = Positions(shared=False).double(), torch.randn(3, 5, 8, dtype=torch.float64)
    relevance = lrp_prune.attribute(model, [x], target=_sum_of_squares)
    assert set(relevance) == {"query.weight", "key.weight"}
    assert relevance.unscored == {"of_positions.weight": CONSTANTS}
    assert check_uses(model, x) == {}
    with pytest.warns(UnscoredWeightsWarning, match="of_positions"):
        masks = lrp_prune.prune(copy.deepcopy(model), [x], sparsity=0.5, method=lrp_prune.LRP(target=_sum_of_squares))
    assert (masks.num_pruned, masks.num_entries) == (96, 192)
    scores = scorer("wanda", model)
    scores.update(x)
    norms = scores.compute()
    expected = model.of_positions.weight.abs() * model.position_table.norm(dim=0) / 3**0.5
    torch.testing.assert_close(norms["of_positions.weight"].double(), expected.detach(), rtol=1e-5, atol=1e-8)
    assert not norms.unscored


def test_a_layer_that_goes_over_both_is_scored_by_what_relevance_goes_through() -> None:
    torch.manual_seed(0)
    model, x = Positions(shared=True).double(), torch.randn(3, 5, 8, dtype=torch.float64)
    options = {"target": _sum_of_squares, "statistic": "signed", "composite": "gradient"}
    relevance = lrp_prune.attribute(model, [x], **options)
    assert set(relevance) == {"query.weight", "key.weight"} and not relevance.unscored
    held = copy.deepcopy(model)
    held.of_positions = copy.deepcopy(model.key)  # the same values, and no use of the key's weight
    expected = lrp_prune.attribute(held, [x], **options)["key.weight"]
    torch.testing.assert_close(relevance["key.weight"], expected)
