"""What is compared lies along the same axis by all methods, also by those that see no use of a weight."""

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import lrp_prune
from lrp_prune.pruning import scorer
from lrp_prune.pruning.layouts import layouts_of

LAYERS = {
    "linear": (lambda: nn.Linear(8, 4), (2, 8), 1),
    "stored the other way round": (lambda: Conv1D(4, 8), (2, 8), 0),
    "convolution": (lambda: nn.Conv1d(8, 4, 4), (2, 8, 6), 1),
    "transposed convolution": (lambda: nn.ConvTranspose1d(8, 4, 4), (2, 8, 6), 0),
}


def total(model: nn.Module, batch: Tensor) -> Tensor:
    result: Tensor = model(batch).square().sum()
    return result


@pytest.mark.parametrize("method", ["magnitude", "random", "wanda", "lrp"])
@pytest.mark.parametrize("case", LAYERS)
def test_two_of_four_inputs_are_kept_by_each_method(case: str, method: str) -> None:
    make, shape, inputs = LAYERS[case]
    torch.manual_seed(0)
    model, x = nn.Sequential(make()), torch.randn(shape)
    scores = scorer(method, model)
    if scores.needs_data:
        relevance = lrp_prune.attribute(model, [x], total) if method == "lrp" else None
        if relevance is None:
            scores.update(x)
            relevance = scores.compute()
    else:
        relevance = scores.compute()
    for scope, size in (("2:4", 4), ("row", None)):
        kept = lrp_prune.select(relevance, 0.5, scope)["0.weight"].movedim(inputs, -1)
        if size is None:  # of all that makes one output
            outputs = kept.flatten(1, -1)
            assert bool((outputs.sum(1) * 2 == outputs.shape[1]).all())
        else:
            assert bool((kept.unflatten(-1, (-1, size)).sum(-1) == 2).all())


def test_what_else_a_module_has_is_no_matrix() -> None:
    attention = nn.MultiheadAttention(8, 2, add_bias_kv=True)
    assert layouts_of(attention) == {"in_proj_weight": "linear", "out_proj.weight": "linear"}
