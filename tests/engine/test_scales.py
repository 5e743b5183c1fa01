"""What divides, or multiplies as a norm does, is a constant: statistics, matrices, positions that are sampled."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lrp_prune
from tests.support.explained import explained
from tests.support.small_models import Single


def test_a_statistic_is_a_constant_where_it_divides_or_multiplies_and_a_feature_elsewhere() -> None:
    x = torch.randn(4, 6)
    rms = x.pow(2).mean(-1, keepdim=True).add(1e-6).sqrt()
    by_hand: list[Callable[[Tensor], Tensor]] = [
        lambda x: x / x.pow(2).mean(-1, keepdim=True).add(1e-6).sqrt(),
        lambda x: x * x.pow(2).mean(-1, keepdim=True).add(1e-6).rsqrt(),
        lambda x: x * x.pow(2).mean(-1, keepdim=True).add(1e-6).pow(-0.5),
        lambda x: x * (1 / x.pow(2).mean(-1, keepdim=True).add(1e-6).sqrt()),
        lambda x: x * x.pow(2).mean(-1, keepdim=True).add(1e-6).sqrt().reciprocal().unsqueeze(-1)[..., 0],
        lambda x: F.rms_norm(x, (6,), eps=1e-6),
    ]
    for composite in ("attnlrp", "cp_lrp"):
        for function in by_hand:
            _, relevance = explained(lambda x, f=function: f(x) * torch.arange(6.0), x, composite)
            torch.testing.assert_close(relevance["x"], x / rms * torch.arange(6.0))
        total = x.abs().sum(-1, keepdim=True)
        divided: list[Callable[[Tensor], Tensor]] = [
            lambda x: x / x.abs().sum(-1, keepdim=True),
            lambda x: x * (1 / x.abs().sum(-1, keepdim=True)),
            lambda x: x * torch.div(torch.ones(1), x.abs().sum(-1, keepdim=True)),
            lambda x: x * x.abs().sum(-1, keepdim=True).reciprocal(),
            lambda x: x * x.abs().sum(-1, keepdim=True) ** -1,
        ]
        for function in divided:
            _, relevance = explained(lambda x, f=function: f(x) * torch.arange(6.0), x, composite)
            torch.testing.assert_close(relevance["x"], x / total * torch.arange(6.0))
    # The same root as a feature: all of its relevance goes on.
    _, relevance = explained(lambda x: torch.cat([x, x.pow(2).mean(-1, keepdim=True).sqrt()], -1)[:, 6:], x, "attnlrp")
    torch.testing.assert_close(relevance["x"].sum(-1, keepdim=True), x.pow(2).mean(-1, keepdim=True).sqrt())


def test_a_statistic_or_a_decay_that_is_chosen_where_it_is_finite_stays_one() -> None:
    x, below = torch.randn(4, 6), torch.ones(6, 6).tril().bool()

    def rms(x: Tensor) -> Tensor:
        return x.pow(2).mean(-1, keepdim=True).add(1e-6).rsqrt()

    def decayed(x: Tensor, guarded: Callable[[Tensor], Tensor]) -> Tensor:
        total = -F.softplus(x).cumsum(-1)
        return guarded(torch.exp(total[:, :, None] - total[:, None])) * (x[:, :, None] * x[:, None])

    for composite in ("attnlrp", "cp_lrp"):
        pairs: list[tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = [
            (lambda x: x * rms(x), lambda x: x * torch.where((s := rms(x)).isfinite(), s, 1.0)),
            (
                lambda x: decayed(x, lambda e: e.masked_fill(~below, 0.0)),
                lambda x: decayed(x, lambda e: torch.where(below, e, torch.zeros(()))),
            ),
        ]
        for plain, guarded in pairs:
            one, two = (explained(lambda x, f=f: f(x), x, composite)[1]["x"] for f in (plain, guarded))
            torch.testing.assert_close(one, two)
            assert not torch.allclose(one, explained(guarded, x, "gradient")[1]["x"], atol=1e-3)


def test_the_mean_that_is_computed_with_a_variance_is_no_constant() -> None:
    """A layer norm by hand from ``var_mean`` is a layer norm."""

    def by_hand(x: Tensor) -> Tensor:
        variance, mean = torch.var_mean(x, -1, keepdim=True, unbiased=False)
        return (x - mean) * torch.rsqrt(variance + 1e-5) * torch.arange(6.0)

    x = torch.randn(4, 6)
    with lrp_prune.attributing(model := Single(by_hand)) as propagation:
        one = propagation.relevance(model(x).square().sum())["x"]
    with lrp_prune.attributing(model := nn.LayerNorm(6, bias=False)) as propagation:
        model.weight.data = torch.arange(6.0)
        two = propagation.relevance(model(x).square().sum())["input"]
    torch.testing.assert_close(one, two)
    # As a factor it is no statistic either.
    for pair in (torch.var_mean, torch.std_mean):
        factors = (
            lambda x, pair=pair: x * torch.arange(6.0) * pair(x, -1, keepdim=True)[1],
            lambda x: x * torch.arange(6.0) * x.mean(-1, keepdim=True),
        )
        one, two = (explained(function, x, "attnlrp")[1]["x"] for function in factors)
        torch.testing.assert_close(one, two)


def test_a_matrix_that_divides_is_a_constant_beside_what_it_divides() -> None:
    """``A X = B``: B has all relevance, its own entries times what comes back by the transposed matrix."""

    class Solved(nn.Module):
        def forward(self, matrix: Tensor, right: Tensor) -> Tensor:
            return torch.linalg.solve_triangular(matrix, right, upper=False)

    matrix, right = torch.randn(2, 5, 5).tril() + 6 * torch.eye(5), torch.randn(2, 5, 3)
    for composite in ("attnlrp", "cp_lrp"):
        with lrp_prune.attributing(model := Solved(), composite, unruled="error") as propagation:
            output = model(matrix, right)
            relevance = propagation.relevance(output.square().sum() / 2)
        expected = right * torch.linalg.solve_triangular(matrix.mT, output.detach(), upper=True)
        torch.testing.assert_close(relevance["right"], expected)
        assert not relevance["matrix"].any()


def test_positions_that_are_sampled_are_constants() -> None:
    """Bilinear interpolation by hand: of each of the four neighbours its share."""

    class Sampled(nn.Module):
        def forward(self, image: Tensor, grid: Tensor) -> Tensor:
            return F.grid_sample(image, grid, align_corners=True)

    image, grid = torch.randn(1, 1, 3, 3), torch.tensor([[[[0.5, -0.25]]]])
    for composite in ("attnlrp", "cp_lrp"):
        with lrp_prune.attributing(model := Sampled(), composite, unruled="error") as propagation:
            relevance = propagation.relevance(model(image, grid).sum())
        share = torch.zeros(3, 3)
        share[:2, 1:] = torch.outer(torch.tensor([0.25, 0.75]), torch.tensor([0.5, 0.5]))
        torch.testing.assert_close(relevance["image"][0, 0], share * image[0, 0])
        assert not relevance["grid"].any()
    with lrp_prune.attributing(model, "gradient") as propagation:
        assert propagation.relevance(model(image, grid).sum())["grid"].any()
