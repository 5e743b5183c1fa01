"""Norms, roots, reciprocals, signs, distances and products as features: relevance goes through, or it is said where not."""

import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lrp_prune
from lrp_prune.attribution import UnruledOperationError, UnruledOperationWarning
from tests.support.explained import explained
from tests.support.small_models import Single, batch_for, build, forward

PROTOTYPES = torch.randn(3, 6, generator=torch.Generator().manual_seed(2))


_PLACES = torch.tensor([0, 2, 2, 0, 2])[None, :, None].expand(2, 5, 6)


def _matrix(x: Tensor) -> Tensor:
    """A matrix with a good condition."""
    return x[:, :5, :5] + 6 * torch.eye(5)


CONSERVED: dict[str, Callable[[Tensor], Tensor]] = {
    "length": lambda x: x.norm(dim=-1),
    "length by hand": lambda x: x.pow(2).sum(-1).sqrt(),
    "length by a power": lambda x: (x**2).sum(-1) ** 0.5,
    "norm of order one": lambda x: torch.linalg.vector_norm(x, 1, dim=-1),
    "norm of a matrix": lambda x: torch.linalg.matrix_norm(x, "fro"),
    "largest norm": lambda x: torch.linalg.vector_norm(x, float("inf"), dim=-1),
    "square root": lambda x: x.abs().sqrt(),
    "root in place": lambda x: x.abs().sqrt_(),
    "cube root": lambda x: x.abs() ** (1 / 3),
    "signed square root": lambda x: x.sign() * x.abs().sqrt(),
    "reciprocal": lambda x: 1 / x,
    "reciprocal of a root": lambda x: torch.rsqrt(x.abs()),
    "constant over an activation": lambda x: torch.arange(6.0) / x,
    "negative power": lambda x: x**-2,
    "deviation": lambda x: x.std(-1),
    "variance": lambda x: x.var(1),
    "variance and mean": lambda x: sum(torch.var_mean(x, -1)),  # type: ignore[arg-type,return-value]
    "deviation and mean": lambda x: sum(torch.std_mean(x, -1)),  # type: ignore[arg-type,return-value]
    "power of a number": lambda x: 2**x,
    "power of a power": lambda x: x.abs() ** x.flip(1),
    "normalised": lambda x: F.normalize(x, dim=-1),
    "normalised by its largest": lambda x: x / x.abs().amax(-1, keepdim=True),
    "globally normalised response": lambda x: (
        x * (x.norm(dim=1, keepdim=True) / x.norm(dim=1, keepdim=True).mean(-1, True))
    ),
    "squashed": lambda x: x * x.norm(dim=-1, keepdim=True) / (1e-9 + x.pow(2).sum(-1, keepdim=True)),
    "cosine": lambda x: F.cosine_similarity(x, x.flip(1), dim=-1),
    "cosine to a constant": lambda x: F.cosine_similarity(x, PROTOTYPES[0], dim=-1),
    "distance of pairs": lambda x: F.pairwise_distance(x, x.flip(1) * 2, eps=0.0),
    "distance": lambda x: torch.cdist(x, PROTOTYPES.expand(2, -1, -1)),
    "distance among all": lambda x: F.pdist(x[0]),
    "hypotenuse": lambda x: torch.hypot(x, x.flip(1)),
    "product of all": lambda x: x.prod(-1),
    "product of everything": lambda x: (3 * x[:, :2]).prod(),
    "running product": lambda x: x.cumprod(1),
    "product of what meets": lambda x: torch.ones(2, 2, 6).scatter_reduce(1, _PLACES // 2, x, "prod"),
    "product of what meets, and of what was there": lambda x: x[:, :3].scatter_reduce(1, _PLACES, x.flip(1), "prod"),
    "product of what meets in place of what was there": lambda x: (
        x[:, :3].clone().scatter_reduce_(1, _PLACES, x.flip(1), "prod", include_self=False)
    ),
    "product of rows": lambda x: x[:, :3].index_reduce(1, _PLACES[0, :, 0], x, "prod"),
    "mean of rows": lambda x: torch.zeros(2, 3, 6).index_reduce(1, _PLACES[0, :, 0], x, "mean", include_self=False),
    "largest of what meets": lambda x: torch.zeros(2, 3, 6).scatter_reduce(1, _PLACES, x, "amax", include_self=False),
    "sparse product": lambda x: torch.sparse.mm(PROTOTYPES.T[:, :2].to_sparse(), x[:, 0]),
    "sparse layout": lambda x: PROTOTYPES.T[:, :2].to_sparse_csr() @ x[:, 0],
    "sparse product and sum": lambda x: torch.sparse.addmm(x[0, :, :2], torch.eye(5).to_sparse(), x[1, :, :2]),
    "gated linear unit": lambda x: F.glu(x, 1) if x.shape[1] % 2 == 0 else F.glu(x, -1),
    "parametric relu": lambda x: F.prelu(x, torch.tensor([0.3])),
    "softsign": F.softsign,
    "rounded": torch.round,
    "rounded down": lambda x: torch.floor(x) + torch.ceil(x) + torch.trunc(x) + torch.frac(x),
    "sign": torch.sign,
    "clipped": lambda x: x.clamp(-0.5, 0.5),
    "clipped on one side": lambda x: x.clamp_min(0.2) + torch.clamp(x, max=-0.1),
    "pooled by a norm": lambda x: F.lp_pool1d(x, 2, 2),
    "pooled by a cubic norm": lambda x: F.lp_pool1d(x.abs(), 3, 2, stride=1),
    "pooled by a norm in two dimensions": lambda x: F.lp_pool2d(x, 2, (2, 3), stride=1),
    "pooled by a norm in three dimensions": lambda x: F.lp_pool3d(x[None], 2, 2),
    "pooled and put back": lambda x: F.max_unpool2d(*F.max_pool2d(x[None], 2, return_indices=True), 2),
    "Fourier transform": lambda x: torch.fft.fft2(x).real,
    "back and forth": lambda x: torch.fft.irfft(torch.fft.rfft(x)),
    "running maximum": lambda x: x.cummax(1).values,
    "quantile": lambda x: x.quantile(0.3, dim=-1),
    "vectors' product": lambda x: torch.linalg.vecdot(x, x.flip(1)),
    "contraction": lambda x: torch.tensordot(x, PROTOTYPES, dims=([2], [1])),
    "inverse": lambda x: torch.linalg.inv(_matrix(x)),
    "inverse by another name": lambda x: torch.inverse(_matrix(x)),
    "inverse with what else is told": lambda x: torch.linalg.inv_ex(_matrix(x)).inverse,
    "pseudoinverse": lambda x: torch.linalg.pinv(x),
    "solution": lambda x: torch.linalg.solve(_matrix(x), x[..., 5:]),
    "solution of a constant": lambda x: torch.linalg.solve(_matrix(x), PROTOTYPES[:1, :5].T),
    "triangular solution": lambda x: torch.linalg.solve_triangular(_matrix(x), x[..., 5:], upper=True),
    "triangular solution with ones": lambda x: torch.linalg.solve_triangular(
        _matrix(x), x[..., 5:], upper=False, unitriangular=True
    ),
    "roots of a matrix": lambda x: torch.linalg.cholesky(x @ x.mT),
    "solution by roots": lambda x: torch.cholesky_solve(x[..., 5:], torch.linalg.cholesky(x @ x.mT)),
    "solution of a constant by roots": lambda x: torch.cholesky_solve(torch.ones(5, 1), _matrix(x).tril()),
    "scaled by an inverse": lambda x: torch.linalg.inv(_matrix(x)) @ x,
    "divided and added": lambda x: torch.addcdiv(x, x, x.abs() + x.flip(1).abs()),
}


@pytest.mark.parametrize("composite", ["attnlrp", "cp_lrp"])
@pytest.mark.parametrize("name", CONSERVED)
def test_features_conserve_under_the_rules(name: str, composite: str) -> None:
    x = torch.randn(2, 5, 6)
    value, relevance = explained(CONSERVED[name], x, composite)
    torch.testing.assert_close(sum(tensor.sum() for tensor in relevance.values()), value, rtol=1e-4, atol=1e-5)
    assert float(relevance["x"].abs().sum()) > 1e-3


HOMOGENEOUS: dict[str, Callable[[Tensor], Tensor]] = {
    name: CONSERVED[name]
    for name in CONSERVED
    if name.startswith(("pooled", "length", "norm of", "distance", "deviation", "parametric", "hypotenuse"))
    and name not in ("length by hand", "length by a power", "distance")
}


@pytest.mark.parametrize("composite", ["epsilon", "gradient"])
@pytest.mark.parametrize("name", HOMOGENEOUS)
def test_what_is_homogeneous_of_degree_one_conserves_by_its_plain_gradient(name: str, composite: str) -> None:
    value, relevance = explained(HOMOGENEOUS[name], torch.randn(2, 5, 6), composite)
    torch.testing.assert_close(relevance["x"].sum(), value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("composite", lrp_prune.attribution.COMPOSITES)
@pytest.mark.parametrize("module", [nn.LPPool1d(2, 2), nn.LPPool2d(2, 2), nn.LPPool3d(2, 2)])
def test_norm_pooling_gives_each_entry_its_share_and_nothing_where_there_is_nothing(
    module: nn.Module, composite: str
) -> None:
    """R_i = x_i^2 / y of each window, also beside a window of zeros, whose root has an infinite slope."""
    dimensions = int(type(module).__name__[-2])
    x = torch.randn(1, 2, *(4,) * dimensions)
    x[..., :2] = 0
    value, relevance = explained(module.forward, x, composite)
    y = module(x)
    for dim in range(2, 2 + dimensions):
        y = y.repeat_interleave(2, dim)
    torch.testing.assert_close(relevance["x"], torch.where(y > 0, x.square() / y, 0))
    torch.testing.assert_close(relevance["x"].sum(), value)


@pytest.mark.parametrize("composite", lrp_prune.attribution.COMPOSITES)
@pytest.mark.parametrize("function", [torch.sqrt, lambda x: x**0.5, lambda x: x.norm(dim=-1), lambda x: x.std(-1)])
def test_the_infinite_slope_of_a_root_at_zero_is_no_nan(function: Callable[[Tensor], Tensor], composite: str) -> None:
    x = torch.tensor([[0.0, 4.0], [0.0, 0.0]])
    _, relevance = explained(function, x, composite)
    assert bool(torch.isfinite(relevance["x"]).all()) and not relevance["x"][1].any()


def test_a_random_slope_is_the_one_that_was_drawn() -> None:
    """The identity rule computes its function again, which must not draw again."""
    model = Single(lambda x: F.rrelu(x, 0.1, 0.9, training=True))
    for composite in ("attnlrp", "epsilon"):
        with lrp_prune.attributing(model, composite, unruled="error") as propagation:
            output = model(-torch.ones(4, 6))
            relevance = propagation.relevance(output.sum())
        assert len(output.unique()) > 12
        torch.testing.assert_close(relevance["x"], output.detach())


@pytest.mark.parametrize("function", [lambda x: F.log_softmax(x, -1), lambda x: torch.special.log_softmax(x, -1)])
def test_the_logarithm_of_a_softmax_is_what_it_is_of_less_a_sum_that_has_the_rule_of_softmax(
    function: Callable[[Tensor], Tensor],
) -> None:
    x, chosen = torch.randn(4, 6), torch.tensor([0, 1, 2, 3])
    for composite in ("attnlrp", "cp_lrp"):
        with lrp_prune.attributing(model := Single(function), composite, unruled="error") as propagation:
            output = model(x)
            assert torch.equal(output, function(x))
            relevance = propagation.relevance(output[torch.arange(4), chosen].sum())
        constant = composite == "cp_lrp"
        expected = x * (F.one_hot(chosen, 6) - (0 if constant else x.softmax(-1)))
        torch.testing.assert_close(relevance["x"], expected)
        if constant:
            torch.testing.assert_close(relevance["model.detached"], -x.logsumexp(-1, keepdim=True))


@pytest.mark.parametrize(
    ("function", "operation"),
    [
        (lambda x: torch.logaddexp(x, x.flip(1)), "logaddexp"),
        (lambda x: torch.atan2(x, x.flip(1)), "atan2"),
        (lambda x: x % 2, "remainder"),
        (lambda x: torch.linalg.det(x[:, :5, :5]), "linalg_det"),
        (lambda x: torch.linalg.matrix_exp(x[:, :5, :5]), "linalg_matrix_exp"),
    ],
)
def test_what_does_not_conserve_is_reported_by_name(function: Callable[[Tensor], Tensor], operation: str) -> None:
    with pytest.raises(UnruledOperationError, match=rf"no rule for: {operation} in <model> \(Single\)"):
        explained(function, torch.randn(2, 5, 6), "attnlrp")
    model = Single(function)
    with lrp_prune.attributing(model) as propagation:
        value = model(torch.randn(2, 5, 6)).sum()
        with pytest.warns(UnruledOperationWarning, match=operation):
            propagation.relevance(value)


@pytest.mark.parametrize("composite", ["attnlrp", "cp_lrp"])
def test_a_random_choice_among_experts_is_seen(composite: str) -> None:
    """Noise is a constant that enters as data; what a hard choice cuts off is named."""

    class Choice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.router, self.experts = nn.Linear(4, 3, bias=False), nn.Linear(4, 6, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            weights = F.gumbel_softmax(self.router(x), hard=True)
            return (weights[..., None] * self.experts(x).unflatten(-1, (3, 2))).sum(-2)

    model = Choice()
    with lrp_prune.attributing(model, composite, unruled="error") as propagation:
        value = model(torch.randn(2, 4)).sum()
        relevance = propagation.relevance(value)
    # The softmax itself conserves under CP-LRP alone.
    if composite == "cp_lrp":
        torch.testing.assert_close(sum(tensor.sum() for tensor in relevance.values()), value)
    else:
        assert any(name.startswith("model.") for name in relevance)


def test_relevance_that_is_not_finite_is_an_error_that_names_the_root() -> None:
    class Pole(nn.Module):
        def forward(self, x: Tensor, other: Tensor) -> Tensor:
            return (x.exp() - 1).log() + other

    model = Pole()
    with (
        lrp_prune.attributing(model, "gradient") as propagation,
        pytest.raises(FloatingPointError, match="the relevance of 'x' is not finite"),
    ):
        output = model(torch.tensor([1.0, 1e-30]), torch.ones(2))
        propagation.relevance(torch.where(torch.isfinite(output), output, 0).sum() + 0 * output[1].exp())


def test_relevance_that_overflows_when_summed_is_finite() -> None:
    model = nn.Identity()
    with lrp_prune.attributing(model) as propagation:
        relevance = propagation.relevance(model(torch.full((8,), 6e4, dtype=torch.float16))[:1].sum() * 1.0)
    assert float(relevance["input"].sum()) == pytest.approx(6e4, rel=1e-3)

    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bias = nn.Parameter(torch.full((4,), -5e4, dtype=torch.float16))

        def forward(self, x: Tensor) -> Tensor:
            return x + self.bias

    with lrp_prune.attributing(model := Shifted()) as propagation:
        relevance = propagation.relevance(model(torch.full((4,), 6e4, dtype=torch.float16)).sum())
    assert torch.isinf(relevance["x"].sum()) and torch.equal(relevance["x"], torch.full_like(relevance["x"], 6e4))


@pytest.mark.parametrize("name", ["llama", "resnet"])
def test_models_without_such_features_are_reported_nothing(name: str) -> None:
    model, batch = build(name), batch_for(name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with lrp_prune.attributing(model) as propagation:
            propagation.relevance(forward(model, batch).sum())
