"""What rules are for: kinds, classes of layers, patterns of names and groups of depth; the first that matches."""

import copy
import pickle
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lrp_prune
from lrp_prune import Composite
from lrp_prune.attribution import Gamma, Where
from lrp_prune.engine import rules
from lrp_prune.engine.rules import Call


class Net(nn.Module):
    """Convolutions in two parts, the first of which runs last, and a head whose layer runs twice."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.late = nn.Conv1d(4, 4, 3, padding=1, bias=False)
        self.early = nn.Sequential(
            nn.Conv1d(2, 4, 3, padding=1, bias=False), nn.Tanh(), nn.Conv1d(4, 4, 3, padding=1, bias=False), nn.Tanh()
        )
        self.head = nn.Linear(6, 6, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.late(self.early(x)).relu()
        return self.head(self.head(x))


X = torch.randn(2, 2, 6, generator=torch.Generator().manual_seed(1))


def asked(mapping: dict[Any, str], base: Composite | str | None = None) -> dict[str, list[str]]:
    """Label -> names of the modules whose calls have the rule with that label."""
    seen: dict[str, list[str]] = {label: [] for label in mapping.values()}

    def rule(label: str) -> Any:
        def labelled(call: Call) -> Any:
            seen[label].append(call.name)
            return call.run()

        return labelled

    model = Net()
    composite = Composite("mine", {where: rule(label) for where, label in mapping.items()}, base=base)
    with lrp_prune.attributing(model, composite, unruled="ignore") as propagation:
        propagation.relevance(model(X).sum())
    return seen


CONVOLUTIONS = ["early.0", "early.2", "late"]


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ("convolution", CONVOLUTIONS),
        (Where("convolution"), CONVOLUTIONS),
        (Where("convolution", depth=range(2)), CONVOLUTIONS[:2]),
        (Where("convolution", depth=range(1, 3)), CONVOLUTIONS[1:]),
        (Where("linear", depth=range(1)), ["head", "head"]),
        (Where("linear", depth=range(1, 9)), []),
        (Where("activation", depth=range(2)), ["early.1", "early.3"]),
        (Where("convolution", name="early.*"), CONVOLUTIONS[:2]),
        (Where(name="late"), ["late"]),
        (nn.Conv1d, CONVOLUTIONS),
        (Where(layer=nn.modules.conv._ConvNd, name="*.0"), ["early.0"]),
        (Where("activation", layer=Net), [""]),
        (Where("convolution", name="early.*", depth=range(1, 3)), ["early.2"]),
    ],
    ids=str,
)
def test_a_rule_is_for_what_meets_all_that_is_asked(where: Any, expected: list[str]) -> None:
    assert asked({where: "here"}) == {"here": expected}


def test_the_first_that_matches_is_the_rule() -> None:
    first, rest = Where("convolution", depth=range(1)), "convolution"
    assert asked({first: "first", rest: "rest"}) == {"first": CONVOLUTIONS[:1], "rest": CONVOLUTIONS[1:]}
    assert asked({rest: "rest", first: "first"}) == {"rest": CONVOLUTIONS, "first": []}
    base = Composite("base", {"linear": rules.gradient, "convolution": rules.gradient})
    assert asked({first: "first", "linear": "linear"}, base) == {"first": CONVOLUTIONS[:1], "linear": ["head", "head"]}


def test_what_no_rule_matches_has_the_rule_of_the_base() -> None:
    """Found by its relevance: the same as with the base alone where the composite has no say."""
    model = Net()

    def relevance(composite: str | Composite) -> Tensor:
        with lrp_prune.attributing(model, composite) as propagation:
            return propagation.relevance(model(X).sum())["x"]

    epsilon, plain = relevance("epsilon"), relevance("gradient")
    assert not torch.allclose(epsilon, plain, rtol=1e-3)
    torch.testing.assert_close(relevance(Composite("same", {}, base="epsilon")), epsilon)
    torch.testing.assert_close(
        relevance(Composite("none", {Where("linear", name="late"): Gamma(9.0)}, "epsilon")), epsilon
    )
    torch.testing.assert_close(relevance(Composite("bare", {Where("linear", name="late"): Gamma(9.0)})), plain)
    gamma = relevance(Composite("one", {Where("convolution", depth=range(1)): Gamma(9.0)}, base="epsilon"))
    assert not torch.allclose(gamma, epsilon, rtol=1e-3)
    by_name = relevance(Composite("one", {Where("convolution", name="early.0"): Gamma(9.0)}, base="epsilon"))
    assert torch.equal(gamma, by_name)


def test_relevance_of_weights_is_by_the_rule_of_each_layer() -> None:
    """In a second batch too, in which modules are followed for rules only."""
    model, options = Net(), {"statistic": "signed", "matmul_dtype": None}

    def weights(composite: Composite) -> lrp_prune.Relevance:
        return lrp_prune.attribute(model, [X, X], lambda m, b: m(b).sum(), composite, **options)

    by_name = Composite("one", {Where("convolution", name="early.0"): Gamma(9.0)}, base="epsilon")
    one = weights(by_name)
    by_depth = weights(Composite("one", {Where("convolution", depth=range(1)): Gamma(9.0)}, base="epsilon"))
    first_batch = lrp_prune.attribute(model, [X], lambda m, b: m(b).sum(), by_name, **options)
    for name in one:
        assert torch.equal(one[name], by_depth[name])
        torch.testing.assert_close(one[name], first_batch[name])
    none, every = (
        weights(Composite("none", {}, "epsilon")),
        weights(Composite("all", {"convolution": Gamma(9.0)}, "epsilon")),
    )
    for name in ("early.2.weight", "late.weight", "head.weight"):
        torch.testing.assert_close(one[name], none[name])
    assert not torch.allclose(one["early.0.weight"], none["early.0.weight"], rtol=1e-2)
    assert not torch.allclose(every["late.weight"], none["late.weight"], rtol=1e-2)


def test_a_call_knows_its_module_its_depth_and_its_weight() -> None:
    seen: list[Any] = []

    def rule(call: Call) -> Any:
        weight = None if call.weight is None else call.weight.shape
        seen.append((call.name, type(call.module), call.depth, call.parameter, weight))
        return call.run()

    model = Net()
    composite = Composite("mine", {kind: rule for kind in ("convolution", "linear", "activation")})
    with lrp_prune.attributing(model, composite) as propagation:
        propagation.relevance(model(X).sum())
    assert seen == [
        ("early.0", nn.Conv1d, 0, "early.0.weight", (4, 2, 3)),
        ("early.1", nn.Tanh, 0, None, None),
        ("early.2", nn.Conv1d, 1, "early.2.weight", (4, 4, 3)),
        ("early.3", nn.Tanh, 1, None, None),
        ("late", nn.Conv1d, 2, "late.weight", (4, 4, 3)),
        ("", Net, 2, None, None),
        ("head", nn.Linear, 0, "head.weight", (6, 6)),
        ("head", nn.Linear, 0, "head.weight", (6, 6)),
    ]


def test_an_activation_module_of_several_operations_has_the_composites_rule() -> None:
    class QuickGELU(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * torch.sigmoid(1.7 * x)

    model, x = nn.Sequential(nn.Sequential(QuickGELU()), nn.Sequential(QuickGELU())), torch.randn(3, 4)

    def relevance(mapping: Any) -> Tensor:
        with lrp_prune.attributing(model, Composite("mine", mapping)) as propagation:
            return propagation.relevance(model(x).sum())["input"]

    torch.testing.assert_close(relevance({"activation": "identity"}).sum(), model(x).sum())
    asked: list[tuple[str, Any]] = []

    def doubled(call: Call) -> Any:
        asked.append((call.name, call.depth))
        return 2 * rules.identity(call) - rules.identity(call).detach()

    torch.testing.assert_close(relevance({"activation": doubled}).sum(), 4 * model(x).sum())
    assert asked == [("0.0", 0), ("1.0", 1)]
    half = relevance({Where("activation", name="1.*"): "identity"})
    leaf = x.clone().requires_grad_()
    inner = model[0](leaf)
    (gradient,) = torch.autograd.grad(inner, leaf, (model[1](inner) / inner).detach())
    torch.testing.assert_close(half, x * gradient)


def test_what_matches_nothing_in_the_model_is_refused() -> None:
    for where, message in (
        (
            Where(name="features.*"),
            r"composite 'mine': the pattern 'features\.\*' matches no module; there are late, early",
        ),
        (nn.Conv2d, r"composite 'mine': the model has no Conv2d"),
    ):
        with (
            pytest.raises(ValueError, match=message),
            lrp_prune.attributing(Net(), Composite("mine", {where: "gamma"})),
        ):
            pass
    with pytest.raises(ValueError, match=r"unknown kind of operation 'conv', expected one of \('activation'"):
        Where("conv")


def _two_layers() -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 3))
    return model, [(torch.randn(8, 4), torch.randint(3, (8,)))]


@pytest.mark.parametrize("where", [nn.GELU, Where(name="1"), Where(layer=nn.GELU, name="1")], ids=str)
def test_a_rule_for_a_layer_without_weights_leaves_those_of_others_scored(where: Any) -> None:
    model, batches = _two_layers()
    expected = lrp_prune.attribute(model, batches, composite=Composite("kind", {"activation": "identity"}))
    found = lrp_prune.attribute(model, batches, composite=Composite("place", {where: "identity"}))
    for name in expected:
        torch.testing.assert_close(found[name], expected[name])
    own = Composite("own", {where: lambda call: call.run()})
    plain = lrp_prune.attribute(model, batches, composite="gradient")
    found = lrp_prune.attribute(model, batches, composite=own)
    for name in plain:
        torch.testing.assert_close(found[name], plain[name])


def test_a_rule_of_ones_own_for_a_layer_with_weights_is_refused_where_they_are_scored() -> None:
    model, batches = _two_layers()
    composite = Composite("own", {Where(name="2"): lambda call: call.run()})
    with pytest.raises(ValueError, match=r"2\.weight has a rule of its own .* declare its terms"):
        lrp_prune.attribute(model, batches, composite=composite)
    lrp_prune.attribute(model, batches, composite=composite, include=["0.weight"])


def test_composites_are_copied_pickled_and_told_apart() -> None:
    composite = Composite("mine", {Where("linear", depth=range(2)): Gamma(0.5), nn.GELU: "identity"}, base="epsilon")
    for other in (copy.deepcopy(composite), pickle.loads(pickle.dumps(composite))):
        assert other == composite and other.entries == composite.entries and hash(other) == hash(composite)
    assert copy.deepcopy(lrp_prune.LRP(composite=composite)).composite == composite
    given = {"linear": Gamma()}
    Composite("mine", given).rules["activation"] = "identity"  # type: ignore[index]
    assert given == {"linear": Gamma()}
    with pytest.raises(ValueError, match="'epsilon' is the name of a preset with other rules"):
        Composite("epsilon", {"linear": Gamma(0.5)})


def test_what_asks_for_no_place_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"depth must be a range of places counted from 0, such as range\(3\) .* got 2"
    ):
        Where("linear", depth=2)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="name must be a pattern"):
        Where(name=["a", "b"])  # type: ignore[arg-type]
    for depth in (range(-1, 2), range(2, -2, -1), range(0)):
        with pytest.raises(ValueError, match="depth must be a range of places counted from 0"):
            Where("linear", depth=depth)


def test_all_places_from_one_on_are_a_range_without_end() -> None:
    from_third_on = Where("linear", depth=range(2, sys.maxsize))  # of which not every place is looked at
    assert from_third_on.matches("linear", "", None, 10**9) and not from_third_on.matches("linear", "", None, 1)


@pytest.mark.parametrize("rule", [None, Gamma, 0.5])
def test_what_is_no_rule_is_refused(rule: Any) -> None:
    with pytest.raises(
        ValueError, match=r"composite 'mine': a rule is an object, such as Gamma\(0.25\), the name .* got"
    ):
        Composite("mine", {"linear": rule})
