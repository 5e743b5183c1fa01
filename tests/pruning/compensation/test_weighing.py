"""Tokens weighed by relevance: as if each were there as often."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lrp_prune
from lrp_prune.pruning import LeastSquares
from lrp_prune.pruning.compensation import compensate_
from lrp_prune.pruning.compensation.systems import Systems
from lrp_prune.pruning.compensation.weighing import weights_of_rows, weights_of_tokens
from lrp_prune.pruning.processes import Processes
from tests.support.compensation import half, mlp
from tests.support.small_models import batch_for, build

WAY = LeastSquares(dense=0.5, damping=0.05, steps=500, tolerance=1e-12, weights="relevance")


def weights_of(model: nn.Sequential, x: Tensor, layer: int) -> Tensor:
    """Of a network of linear layers and ReLUs relevance is the gradient times the value; by the predicted class."""
    value = model[: layer + 1](x)
    (gradient,) = torch.autograd.grad(model[layer + 1 :](value).max(1).values.sum(), value)
    return (value * gradient).detach().abs().sum(1).sqrt()


def test_each_layer_is_the_weighted_ridge_regression() -> None:
    model, batches = mlp()
    x = batches[0][0]
    masks = half(model, ["0.weight", "2.weight", "4.weight"])
    dense = copy.deepcopy(model)
    found = compensate_(model, masks, [x], WAY)
    assert not found.unweighed
    ours = theirs = torch.cat([x, torch.ones(len(x), 1).double()], 1)
    for index in (0, 2, 4):
        before = torch.cat([dense[index].weight, dense[index].bias[:, None]], 1).detach()
        after = torch.cat([model[index].weight, model[index].bias[:, None]], 1).detach()
        root = weights_of(dense, x, index).sqrt()[:, None]
        gram, crossed = (root * ours).T @ (root * ours), (root * (ours + theirs) / 2).T @ (root * ours)
        delta = 0.05 * gram.diagonal()[:-1].mean()
        for row, start, kept in zip(after, before, masks[f"{index}.weight"], strict=True):
            support = torch.cat([kept, torch.tensor([True])])
            system = (gram + delta * torch.eye(len(gram)).double())[support][:, support]
            expected = torch.linalg.solve(system, (start @ crossed + delta * start)[support])
            torch.testing.assert_close(row[support], expected, rtol=1e-6, atol=1e-8)
        ours, theirs = (
            torch.cat([(entry @ values.T).relu(), torch.ones(len(x), 1).double()], 1)
            for entry, values in ((ours, after), (theirs, before))
        )


def test_a_weight_is_how_often_a_row_is_there() -> None:
    torch.manual_seed(0)
    for rows_each, groups in ((1, 1), (3, 2)):
        often = torch.tensor([1, 4, 0, 2])
        rows = torch.randn(groups, 4 * rows_each, 5)
        pieces = list(rows.split(2 * rows_each, dim=1))
        weighed, repeated = Systems(), Systems()
        weighed.add(pieces, [piece + 1 for piece in pieces], often.float())
        many = rows.repeat_interleave(often.repeat_interleave(rows_each), dim=1)
        repeated.add([many], [many + 1])
        for systems in (weighed, repeated):
            systems.over(Processes(None), torch.device("cpu"))
        assert weighed.weighed and not repeated.weighed
        torch.testing.assert_close(weighed.gram, repeated.gram)
        torch.testing.assert_close(weighed.crossed, repeated.crossed)


def test_tokens_have_their_own_and_what_has_none_its_samples() -> None:
    weights, counted = torch.rand(2, 3), torch.tensor([[True, True, False], [True, False, False]])
    found = weights_of_rows(weights, torch.zeros(2, 3, 5), counted)
    assert found is not None and torch.equal(found, weights[counted])
    for shape in ((2, 5), (2, 7, 5), (2, 4, 8, 8)):
        found = weights_of_rows(weights, torch.zeros(shape), counted)
        assert found is not None and torch.equal(found, weights.mean(1))
    assert weights_of_rows(weights, torch.zeros(6, 5), counted) is None
    found = weights_of_rows(weights, torch.zeros(2, 3, 5), None, by_place=True)
    assert found is not None and torch.equal(found, weights.mean(1))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "t5", "resnet", "mixtral"])
def test_every_kind_of_model_comes_closer_and_says_where_tokens_count_alike(name: str) -> None:
    torch.manual_seed(0)
    model = build(name)
    batches: list[Any] = [batch_for(name, 8, 12) for _ in range(2)]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3 if parameter.dim() > 1 else 1)
    exclude = ["*.mlp.gate"] if name == "mixtral" else None
    masks = lrp_prune.prune(
        copy.deepcopy(model), batches, 0.5, "magnitude", scope="row", exclude=exclude, recalibrate=False
    )
    masked, other = copy.deepcopy(model), copy.deepcopy(model)
    masks.apply_(masked)
    other_way = compensate_(other, masks, batches, LeastSquares())
    found = compensate_(copy.deepcopy(model), masks, batches, LeastSquares(weights="relevance"))
    assert set(found.errors) == set(other_way.errors)
    assert all(after <= before for before, after in found.errors.values())
    assert ("experts" in str(found.unweighed)) == (name == "mixtral")
    assert ("tokens count alike for" in str(found)) == bool(found.unweighed)


def test_nothing_of_the_model_changes_and_padding_is_left_out() -> None:
    torch.manual_seed(0)
    model = build("llama")
    batch = {"input_ids": torch.randint(2, 50, (2, 6)), "attention_mask": torch.tensor([[1] * 6, [1] * 4 + [0] * 2])}
    before = copy.deepcopy(model.state_dict())
    weights = weights_of_tokens(model, batch, "next_token", ["model.layers.0", "model.layers.1"])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    for entry in weights.values():
        assert entry.shape == (2, 6) and bool(torch.isfinite(entry).all())
        assert not entry[1, 4:].any() and entry[0, 0] > 0


def test_weights_by_something_else_are_refused() -> None:
    with pytest.raises(ValueError, match="weights must be 'relevance' or None, got 'loss'"):
        LeastSquares(weights="loss")  # type: ignore[arg-type]
