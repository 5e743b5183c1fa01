"""Filters, neurons and heads of models of torchvision, timm and transformers, of which the library knows none by name."""

import warnings
from collections.abc import Callable
from contextlib import ExitStack
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lrp_prune
from lrp_prune.relevance import Relevance
from lrp_prune.training.keeping import MaskKeeper
from tests.support.units import makers, randomized, silenced, without
from tests.support.vision_models import VISION_MODELS, Vision

GROUPS = 8
"""As many groups of a model, evenly spread, are taken apart."""


def built(name: str) -> tuple[nn.Module, Tensor, Vision]:
    torch.manual_seed(0)
    vision = VISION_MODELS[name]
    return randomized(vision.make()), torch.randn(2, 3, vision.side, vision.side, dtype=torch.float64), vision


def logits_of(model: nn.Module, x: Tensor) -> Tensor:
    result = model(x)
    return result if isinstance(result, Tensor) else result.logits


@cache
def units_of(name: str, granularity: str) -> tuple[Relevance, tuple[str, ...]]:
    """The units of a model as it is :func:`built`, and what was said of what has none."""
    model, x, _ = built(name)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        relevance = lrp_prune.attribute(
            model, [(x, torch.tensor([0, 1]))], target="class", granularity=granularity, matmul_dtype=None
        )
    return relevance, tuple(str(warning.message) for warning in told)


def spread(relevance: Relevance) -> list[str]:
    names = list(relevance)
    return names[:: -(-len(names) // GROUPS)]


def alive(relevance: Relevance, masks: lrp_prune.Masks, group: str) -> Tensor:
    """Which units of a group own anything that is kept."""
    units = relevance[group].numel()
    kept = torch.zeros(units, dtype=torch.bool)
    for member in relevance.members[group]:
        kept |= member.any_kept(masks[member.parameter], units)
    return kept


@pytest.mark.slow
@pytest.mark.parametrize("name", VISION_MODELS)
def test_filters_and_neurons_go_with_all_that_is_theirs(name: str) -> None:
    model, x, vision = built(name)
    relevance, told = units_of(name, "neuron")
    assert len(relevance) == vision.neurons
    dense, changed = logits_of(model, x), 0
    for group in spread(relevance):
        unit = relevance[group].numel() // 2
        with ExitStack() as stack:
            for module, channels in makers(relevance, group, unit, model):
                stack.enter_context(silenced(model, [module], channels))
            wanted = logits_of(model, x)
        with without(relevance, group, unit, model):
            torch.testing.assert_close(logits_of(model, x), wanted, rtol=1e-7, atol=1e-7)
        changed += not torch.equal(wanted, dense)
    assert changed
    assert len(told) == (vision.left is not None), told
    if vision.left is not None:
        assert f"{vision.left[0]} (its channels go into {vision.left[1]}" in told[0]


def _reading_zeros(weight: Tensor, channels: Tensor) -> Callable[..., Tensor]:
    """``F.linear``, which reads zeros in place of some channels by one weight."""
    linear = F.linear

    def zeroed(inputs: Tensor, by: Tensor, bias: Tensor | None = None) -> Tensor:
        return linear(inputs.index_fill(-1, channels, 0.0) if by is weight else inputs, by, bias)

    return zeroed


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, vision in VISION_MODELS.items() if vision.heads])
def test_heads_go_with_what_reads_them(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, vision = built(name)
    relevance, _ = units_of(name, "head")
    assert len(relevance) == vision.heads
    dense = logits_of(model, x)
    for group in spread(relevance):
        (member,) = relevance.members[group]
        channels = (member.owners.view(-1) == 1).nonzero().view(-1)
        with monkeypatch.context() as patched:  # not all of them call the module that has the weight
            patched.setattr(F, "linear", _reading_zeros(model.get_parameter(member.parameter), channels))
            wanted = logits_of(model, x)
        assert not torch.equal(wanted, dense)
        with without(relevance, group, 1, model):
            torch.testing.assert_close(logits_of(model, x), wanted, rtol=1e-7, atol=1e-7)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::lrp_prune.pruning.emptied.EmptiedWeightsWarning")
@pytest.mark.parametrize("name", VISION_MODELS)
def test_as_many_units_go_as_were_asked_for_and_stay_gone_in_training(name: str) -> None:
    model, x, vision = built(name)
    for granularity in ["neuron", "head"] if vision.heads else ["neuron"]:
        relevance, _ = units_of(name, granularity)
        sizes = {group: values.numel() for group, values in relevance.items()}
        by_layer = lrp_prune.select(relevance, 0.5, scope="layer")
        for group, units in sizes.items():
            assert units - int(alive(relevance, by_layer, group).sum()) == round(0.5 * units), group
        masks = lrp_prune.select(relevance, 0.3, scope="global")
        gone = sum(units - int(alive(relevance, masks, group).sum()) for group, units in sizes.items())
        assert gone == round(0.3 * sum(sizes.values()))

    masks.apply_(model)
    weights = dict(model.named_parameters())
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    keeper = MaskKeeper(model, masks, [optimizer])
    before = {parameter: weights[parameter].detach().clone() for parameter in masks}
    for _ in range(2):
        optimizer.zero_grad()
        nn.functional.cross_entropy(logits_of(model.train(), x), torch.tensor([0, 1])).backward()
        optimizer.step()
    keeper.remove()
    for parameter, kept in masks.items():
        assert not weights[parameter][~kept].any()
    assert any(not torch.equal(weights[parameter], before[parameter]) for parameter in masks)


SHRUNK = {
    "torchvision resnext": (1.0, None),  # groups of a convolution, of which few are dead alike
    "torchvision densenet": (1.0, None),
    "torchvision efficientnet": (1.0, None),
    "torchvision vit": (1.0, 0.0),  # nn.MultiheadAttention needs as many rows as its width
    "timm resnet": (1.0, None),
    "timm convnext": (1.0, None),
    "timm regnet": (0.6, None),
    "timm vit": (1.0, 1.0),
    "timm swin": (1.0, 1.0),
    "transformers vit": (1.0, 1.0),
    "transformers deit": (1.0, 1.0),
}
"""The share of pruned filters and neurons, and of heads, that can be taken out, at least; all but a hundredth."""


@pytest.mark.slow
@pytest.mark.parametrize("name", SHRUNK)
def test_what_is_pruned_is_taken_out_and_the_outputs_stay(name: str) -> None:
    for granularity, share in zip(("neuron", "head"), SHRUNK[name], strict=True):
        if share is None:
            continue
        model, x, _ = built(name)
        masks = lrp_prune.select(units_of(name, granularity)[0], 0.5, scope="layer")
        if not share:
            with pytest.raises(ValueError, match="the model does not run without them"):
                lrp_prune.shrink(model, masks, [x])
            continue
        pruned = built(name)[0]
        masks.apply_(pruned)
        shrunk = lrp_prune.shrink(model, masks, [x])
        torch.testing.assert_close(logits_of(model, x), logits_of(pruned, x), rtol=1e-10, atol=1e-10)
        assert shrunk.taken >= (share - 0.01) * sum(layer.pruned for layer in shrunk.layers)
        assert all("is in groups" in why for why in shrunk.left.values())
        assert shrunk.after.parameters == sum(each.numel() for each in model.parameters()) < shrunk.before.parameters
