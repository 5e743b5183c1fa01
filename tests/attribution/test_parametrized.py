"""Weights that are computed before they are used: scored as they are used, or refused by name."""

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils import prune as torch_prune

import lrp_prune
from lrp_prune.attribution.parametrized import parametrized
from lrp_prune.pruning import METHODS, scorer
from lrp_prune.pruning.checking import check_uses
from lrp_prune.relevance.statistics import OF_RELEVANCE
from tests.support.used_weights import Masked, Using, small_model, sum_of_outputs


class Symmetric(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight + weight.flip(0)


class Hidden(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, weight: Tensor) -> Tensor:
        return weight * 2

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> Tensor:
        return gradient * 2


class OutOfSight(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        result: Tensor = Hidden.apply(weight)
        return result


def _with(change: Callable[[nn.Module], object]) -> Callable[[], nn.Sequential]:
    def make() -> nn.Sequential:
        model = small_model()
        change(model[0])
        return model

    return make


def _random_mask() -> Tensor:
    return torch.rand(6, 8, generator=torch.Generator().manual_seed(1)) > 0.3


SCALED: dict[str, Callable[[], nn.Sequential]] = {
    "torch.nn.utils.prune": _with(lambda layer: torch_prune.l1_unstructured(layer, "weight", 0.3)),
    "several of torch.nn.utils.prune": _with(
        lambda layer: (
            torch_prune.l1_unstructured(layer, "weight", 0.2),
            torch_prune.ln_structured(layer, "weight", 2, 2, 1),
        )
    ),
    "spectral_norm, old": _with(lambda layer: nn.utils.spectral_norm(layer)),
    "spectral_norm": _with(lambda layer: parametrizations.spectral_norm(layer)),
    "a parametrization": _with(lambda layer: parametrize.register_parametrization(layer, "weight", Masked())),
    "two parametrizations": _with(
        lambda layer: (
            parametrizations.spectral_norm(layer),
            parametrize.register_parametrization(layer, "weight", Masked()),
        )
    ),
    "a scale": lambda: small_model(Using(lambda weight: weight * 0.3)),
    "equalized learning rates": lambda: small_model(Using(lambda weight: 2 * weight / 8**0.5)),
    "a transposed copy": lambda: small_model(Using(lambda weight: (weight.t().contiguous() * 2.0).t())),
    "a copy in place": lambda: small_model(Using(lambda weight: weight.clone().mul_(_random_mask()))),
    "filled in place": lambda: small_model(Using(lambda weight: weight.clone().masked_fill_(_random_mask(), 0.0))),
    "filled": lambda: small_model(Using(lambda weight: weight.masked_fill(_random_mask(), 0.0))),
    "chosen": lambda: small_model(Using(lambda weight: torch.where(_random_mask(), weight, torch.zeros_like(weight)))),
    "a part that is zeroed": lambda: small_model(Using(_zeroed)),
    "absolute values": lambda: small_model(Using(lambda weight: weight.abs())),
    "a function of zero at zero": lambda: small_model(Using(lambda weight: torch.tanh(weight))),
    "clamped around zero": lambda: small_model(Using(lambda weight: weight.clamp(-0.1, 0.1))),
    "a learned mask": lambda: small_model(Gated()),
}
"""Zeros in the parameter are zeros in what is used."""


def _zeroed(weight: Tensor) -> Tensor:
    weight = weight.clone()
    weight[0] = 0
    return weight


class Gated(nn.Linear):
    """A weight with a learned soft mask."""

    def __init__(self) -> None:
        super().__init__(8, 6)
        self.scores = nn.Parameter(torch.randn(6, 8))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, torch.sigmoid(self.scores) * self.weight, self.bias)


class LowRank(nn.Module):
    def __init__(self, added: bool) -> None:
        super().__init__()
        self.down, self.up, self.added = nn.Parameter(torch.randn(2, 8)), nn.Parameter(torch.randn(6, 2)), added
        if added:
            self.weight = nn.Parameter(torch.randn(6, 8))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight + 0.5 * self.up @ self.down if self.added else self.up @ self.down)


class Twice(nn.Linear):
    """One weight, used with two values."""

    def __init__(self) -> None:
        super().__init__(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * 2.0, self.bias) + F.linear(x, self.weight * _random_mask().double())


COMPUTED: dict[str, tuple[Callable[[], nn.Sequential], set[str]]] = {
    "orthogonal": (_with(lambda layer: parametrizations.orthogonal(layer)), {"parametrizations.weight.original"}),
    "weight_norm, old": (_with(lambda layer: nn.utils.weight_norm(layer)), {"weight_v"}),
    "weight_norm": (_with(lambda layer: parametrizations.weight_norm(layer)), {"parametrizations.weight.original1"}),
    "a sum": (_with(lambda layer: parametrize.register_parametrization(layer, "weight", Symmetric())), {"parametrizations.weight.original"}),  # noqa: E501
    "out of sight": (_with(lambda layer: parametrize.register_parametrization(layer, "weight", OutOfSight())), {"parametrizations.weight.original"}),  # noqa: E501
    "standardized": (
        lambda: small_model(Using(lambda w: (w - w.mean(1, keepdim=True)) / (w.std(1, keepdim=True) + 1e-5))),
        {"weight"},
    ),
    "normalized rows": (lambda: small_model(Using(lambda weight: F.normalize(weight))), {"weight"}),
    "a weight norm by hand": (lambda: small_model(Using(lambda w: 2 * w / w.norm(dim=1, keepdim=True))), {"weight"}),
    "a product": (lambda: small_model(LowRank(added=False)), {"up", "down"}),
    "a sum with a product": (lambda: small_model(LowRank(added=True)), {"weight", "up", "down"}),
    "a function of one at zero": (lambda: small_model(Using(lambda weight: torch.exp(weight))), {"weight"}),
    "clamped from above zero": (lambda: small_model(Using(lambda weight: weight.clamp(min=0.01))), {"weight"}),
    "filled with something else": (lambda: small_model(Using(lambda w: w.masked_fill(_random_mask(), 0.5))), {"weight"}),
    "several values": (lambda: small_model(Twice()), {"weight"}),
}  # fmt: skip
"""They are not; or pruning some entries changes the others."""


def _used(model: nn.Sequential) -> Tensor:
    """The first layer's weight as it is used, from what it does to the unit vectors."""
    zero = torch.zeros(1, 8, dtype=torch.float64)
    with torch.no_grad():
        result: Tensor = (model[0](torch.eye(8, dtype=torch.float64)) - model[0](zero)).T
    return result


def _name(model: nn.Sequential) -> str:
    names = [name for name, entry in model.named_parameters() if name.startswith("0.") and entry.shape == (6, 8)]
    return next(name for name in names if "scores" not in name)


@pytest.mark.parametrize("kind", SCALED)
@pytest.mark.parametrize("statistic", [*OF_RELEVANCE, "wanda", "magnitude"])
def test_scores_are_those_of_the_weight_that_is_used(kind: str, statistic: str) -> None:
    """The same model with that weight as a plain parameter has the same scores."""
    model, x = SCALED[kind](), torch.randn(5, 8, dtype=torch.float64)
    plain = small_model()
    plain.load_state_dict(
        {name.removesuffix("_orig"): value for name, value in model.state_dict().items()}, strict=False
    )
    plain[0].weight.data.copy_(_used(model))
    torch.testing.assert_close(plain(x), model(x))
    if statistic in OF_RELEVANCE:
        options = {
            "target": sum_of_outputs,
            "statistic": statistic,
            "include": [_name(model), "2.weight"],
            "composite": "epsilon",
        }
        found = lrp_prune.attribute(model, [x], **options)
        expected = lrp_prune.attribute(plain, [x], **{**options, "include": None})
    elif statistic == "magnitude" and isinstance(model[0], Using | Gated):
        pytest.skip("what a module computes in its forward shows only there, and magnitude looks at no data")
    else:
        found, expected = _scores(model, statistic, x), _scores(plain, statistic, x)
    torch.testing.assert_close(found[_name(model)], expected["0.weight"])
    torch.testing.assert_close(found["2.weight"], expected["2.weight"])


def _scores(model: nn.Module, method: str, x: Tensor) -> lrp_prune.Relevance:
    scores = scorer(method, model, include=[_name(model), "2.weight"])
    scores.update(x)
    return scores.compute()


@pytest.mark.parametrize("kind", SCALED)
@pytest.mark.parametrize("method", ["lrp", "magnitude"])
def test_pruned_entries_are_zero_in_what_is_used(kind: str, method: str) -> None:
    model, x = SCALED[kind](), torch.randn(5, 8, dtype=torch.float64)
    explaining = METHODS[method](target=sum_of_outputs)
    masks = lrp_prune.prune(model, [x], sparsity=0.5, method=explaining, include=[_name(model)], scope="layer")
    assert masks.num_pruned == 24
    used = _used(model)
    assert not used[~masks[_name(model)]].any() and used.any()


@pytest.mark.parametrize("kind", COMPUTED)
def test_what_cannot_be_is_named_with_the_reason(kind: str) -> None:
    make, names = COMPUTED[kind]
    x = torch.randn(5, 8, dtype=torch.float64)
    model = make()
    relevance = lrp_prune.attribute(model, [x], target=sum_of_outputs, include=["*"])
    assert set(relevance.unscored) & {f"0.{name}" for name in names} == {f"0.{name}" for name in names}
    assert "2.weight" in relevance
    reason = relevance.unscored[f"0.{next(iter(names))}"]
    if "norm" in kind:
        assert "divided by a norm of it" in reason and "divided by zero" in reason
    elif kind == "several values":
        assert "several values" in reason
    else:
        assert "computed from it (by " in reason


@pytest.mark.parametrize("kind", COMPUTED)
@pytest.mark.parametrize("method", METHODS)
def test_what_cannot_be_is_refused_before_anything_changes(kind: str, method: str) -> None:
    make, names = COMPUTED[kind]
    model, x = make(), torch.randn(5, 8, dtype=torch.float64)
    before = copy.deepcopy(model.state_dict())
    explaining = METHODS[method](target=sum_of_outputs)
    if kind == "several values" and method in ("magnitude", "random"):
        pytest.skip("two values of one weight show only where both are scored")
    with pytest.raises(ValueError, match=r"cannot prune 0\..*exclude=\['0\."):
        lrp_prune.prune(model, [x], method=explaining)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    excluded = [f"0.{name}" for name in names]
    masks = lrp_prune.prune(model, [x], method=explaining, exclude=excluded, scope="layer")
    assert list(masks) == ["2.weight"] and masks.sparsity == 0.5


@pytest.mark.parametrize("kind", COMPUTED)
def test_it_is_known_early(kind: str) -> None:
    make, names = COMPUTED[kind]
    model = make()
    expected = {f"0.{name}" for name in names}
    if kind != "several values":
        with_a_batch = check_uses(model, torch.randn(5, 8, dtype=torch.float64))
        assert set(with_a_batch) == expected
    in_its_forward = isinstance(model[0], Using | LowRank | Twice)
    assert set(check_uses(model)) == (set() if in_its_forward else expected)


def test_looking_changes_nothing() -> None:
    """Neither the power iteration of a spectral norm nor modes nor gradients; also in training mode."""
    for old in (True, False):
        model = _with(nn.utils.spectral_norm if old else parametrizations.spectral_norm)().train()
        before = copy.deepcopy(model.state_dict())
        check_uses(model, torch.randn(5, 8, dtype=torch.float64))
        assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
        assert all(module.training for module in model.modules())
        assert all(parameter.grad is None for parameter in model.parameters())
        assert check_uses(model) == {} and list(parametrized(model).used)
