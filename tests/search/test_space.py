"""What there is to choose from follows from the model, and each choice is the composite that it says."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lrp_prune import Composite
from lrp_prune.attribution import COMPOSITES, Flat, Gamma, Where
from lrp_prune.search import SearchSpace, depth_groups
from lrp_prune.search.space import ATTENTION


def convolutions(number: int) -> nn.Module:
    layers = [nn.Conv1d(1, 1, 1) for _ in range(number)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(4, 4), nn.Linear(4, 2))


IMAGE = [torch.ones(1, 1, 4)]


@pytest.mark.parametrize(
    "number, expected",
    [(3, [(0, 1), (1, 2), (2, 3)]), (8, [(0, 2), (2, 6), (6, 8)]), (13, [(0, 3), (3, 10), (10, 13)])],
)
def test_convolutions_are_grouped_by_quarters_and_the_rest_is_dense(number: int, expected: Any) -> None:
    groups = depth_groups(convolutions(number), IMAGE)
    ranges = [Where("convolution", depth=range(*bounds)) for bounds in expected]
    assert groups == {**dict(zip(("low", "middle", "high"), ranges, strict=True)), "dense": Where("linear")}


@pytest.mark.parametrize("number", [1, 2, 3, 4, 9])
def test_each_layer_of_other_models_is_in_one_group(number: int) -> None:
    groups = depth_groups(nn.Sequential(*(nn.Linear(4, 4) for _ in range(number))), IMAGE)
    places = [place for where in groups.values() for place in where.depth]
    assert sorted(places) == list(range(number)) and groups["head"].depth == range(number - 1, number)


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.last(torch.softmax(x @ x.mT, -1) @ x)


def test_softmax_variants_are_tried_where_there_is_one_and_looking_leaves_no_trace() -> None:
    model = Attending().train()
    assert SearchSpace().settled(model, IMAGE).attention == tuple(ATTENTION)
    assert SearchSpace().settled(convolutions(1), IMAGE).attention == ("gradient",)
    assert SearchSpace(attention=["stop"]).settled(model, IMAGE).attention == ["stop"]
    assert model.training and all(parameter.grad is None for parameter in model.parameters())
    with pytest.raises(ValueError, match="has no layer with a weight"):
        depth_groups(Nothing(), IMAGE)
    with pytest.raises(ValueError, match="ReLU has no layer with a weight"):
        depth_groups(nn.ReLU(), IMAGE)


class Nothing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Linear(1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * 2


def test_a_choice_is_the_composite_that_it_says() -> None:
    groups = {"first": Where("layer", depth=range(1)), "others": Where("layer")}
    space = SearchSpace(("gradient", Gamma(0.5)), groups, ["gradient", "stop"])
    assert space.axes == {
        "rule of first": ("gradient", "gamma(gamma=0.5, stabilizer=0.0)"),
        "rule of others": ("gradient", "gamma(gamma=0.5, stabilizer=0.0)"),
        "attention": ("gradient", "stop"),
        "order": ("absolute", "signed"),
    }
    assert space.size == 16
    chosen = {
        "rule of first": "gamma(gamma=0.5, stabilizer=0.0)",
        "rule of others": "gradient",
        "attention": "stop",
        "order": "signed",
    }
    rules = {groups["first"]: Gamma(0.5), groups["others"]: "gradient", **ATTENTION["stop"]}
    assert space.composite(chosen, "mine") == Composite("mine", rules, base="epsilon")
    assert space.order(chosen) == "signed"
    starts = list(space.starts())
    plain, uniform = starts[0], starts[-1]
    # The first is the base itself, by what it does to each kind of operation.
    made = space.composite(plain)
    assert all(made.rule(kind) == COMPOSITES["epsilon"].rule(kind) for kind in ("linear", "activation", "softmax"))
    assert len(starts) == 3 and set(uniform.values()) == {"gamma(gamma=0.5, stabilizer=0.0)", "gradient", "absolute"}


def test_axes_with_one_choice_are_none_and_groups_can_have_rules_of_their_own() -> None:
    groups = {"first": Where("layer", depth=range(1)), "others": Where("layer")}
    space = SearchSpace({"first": ["flat", "w_square"], "others": [Gamma()]}, groups, ["gradient"], ["absolute"])
    assert space.axes == {"rule of first": ("flat", "w_square")}
    assert space.composite({"rule of first": "flat"}).entries[:2] == (
        (groups["first"], Flat()),
        (groups["others"], Gamma()),
    )


@dataclass(frozen=True)
class Unnamed(Gamma):
    pass


@pytest.mark.parametrize(
    "options, message",
    [
        ({"orders": ["absolut"]}, "orders must be some of .*'signed'.*got"),
        ({"orders": []}, "orders must be some of"),
        ({"attention": "stop"}, "attention must be some of .*'uniform'"),
        ({"rules": ["gama"]}, "unknown rule 'gama', expected one of"),
        ({"rules": ["identity"]}, "identity is a rule for .*not for 'layer'"),
        ({"rules": [lambda call: call.run()]}, "what relevance weights have"),
        ({"rules": "gamma"}, "rules must be several, for layers"),
        (
            {"rules": {"low": ["gamma"]}, "groups": {"high": Where("layer")}},
            r"rules are for the groups \['low'\], and there are \['high'\]",
        ),
        ({"base": "epsilo"}, "composite must be one of"),
    ],
)
def test_what_there_is_not_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SearchSpace(**options)


def test_rules_for_groups_that_a_model_has_not_are_refused() -> None:
    with pytest.raises(ValueError, match=r"rules are for the groups .*, and there are \['dense'"):
        SearchSpace({"low": ["gamma"], "middle": ["gamma"], "high": ["gamma"]}).settled(convolutions(4), IMAGE)
