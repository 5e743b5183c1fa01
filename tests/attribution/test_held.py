"""Weights, or outputs of weights, that make what a rule holds constant are named: they have no relevance, and may matter."""

import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lrp_prune
from lrp_prune.attribution import collect
from lrp_prune.relevance.unscored import UNREACHED, UnscoredWeightsWarning
from tests.support.architectures.batches import batch_for
from tests.support.architectures.building import build
from tests.support.architectures.explaining import explained


class Scan(nn.Module):
    """A state that decays (Mamba-2, gated delta rule); one layer makes what is added to it and by how much it decays.

    Args:
        turns: how many outputs are for one and then for the other.
        transposed: whether the layer has its weight the other way round.
    """

    def __init__(self, turns: int, transposed: bool = False) -> None:
        super().__init__()
        self.turns, self.transposed = turns, transposed
        self.inner = nn.Linear(5, 6, bias=False)
        self.both = nn.Parameter(torch.randn(6, 8) if transposed else torch.randn(8, 6))
        self.out = nn.Linear(4, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.inner(x))
        both = x @ self.both if self.transposed else F.linear(x, self.both)
        both = both.unflatten(-1, (-1, 2, self.turns))
        added, rate = both[..., 0, :].flatten(-2), both[..., 1, :].flatten(-2)
        decay, state = (-F.softplus(rate)).exp(), torch.zeros_like(added[:, 0])
        for step in range(x.shape[1]):
            state = state * decay[:, step] + added[:, step]
        result: Tensor = self.out(state)
        return result


def _attribute(model: nn.Module, composite: str, statistic: str = "abs_token") -> tuple[lrp_prune.Relevance, list[str]]:
    torch.manual_seed(1)
    batches = [torch.randn(2, 4, 5), torch.randn(2, 4, 5)]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        relevance = lrp_prune.attribute(
            model, batches, lambda model, batch: model(batch).sum(), composite, statistic, matmul_dtype=None
        )
    return relevance, [str(entry.message) for entry in caught if issubclass(entry.category, UnscoredWeightsWarning)]


@pytest.mark.parametrize("composite", ["attnlrp", "cp_lrp"])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("turns", [1, 2, 4])
def test_outputs_that_make_decays_are_told_of_wherever_they_lie(turns: int, transposed: bool, composite: str) -> None:
    torch.manual_seed(0)
    model = Scan(turns, transposed)
    relevance, told = _attribute(model, composite)
    rows = relevance["both"].T if transposed else relevance["both"]
    decays = torch.arange(8).unflatten(0, (-1, 2, turns))[:, 1].flatten()
    silent = (~rows.any(dim=1)).nonzero().view(-1)
    assert torch.equal(silent, decays)
    (message,) = told
    assert message.startswith(
        f"no relevance at all at 4 of 8 outputs of both: what '{composite}' holds constant (how a state"
    )
    assert "exclude=['both']" in message


@pytest.mark.parametrize("composite", ["epsilon", "gradient"])
def test_nothing_is_told_where_nothing_is_held_constant(composite: str) -> None:
    torch.manual_seed(0)
    relevance, told = _attribute(Scan(1), composite)
    assert not told and bool(relevance["both"].any(dim=1).all())


@pytest.mark.parametrize("statistic", ["signed", "abs_token", "geometric"])
def test_looking_for_what_is_constant_changes_no_relevance(statistic: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = Scan(2)
    with_it, _ = _attribute(model, "attnlrp", statistic)
    monkeypatch.setattr(collect, "Held", lambda: None)
    without_it, told = _attribute(model, "attnlrp", statistic)
    assert not told and list(with_it) == list(without_it)
    assert all(torch.equal(with_it[name], without_it[name]) for name in with_it)


class Dead(Scan):
    """Outputs that make nothing at all are irrelevant, beside some that make decays."""

    def forward(self, x: Tensor) -> Tensor:
        both = F.linear(F.silu(self.inner(x)), self.both)
        state = both[:, 0, :2] * (-F.softplus(both[:, 1, 2:4])).exp()
        return self.out(torch.cat([state, state], dim=-1))


def test_outputs_that_make_nothing_are_irrelevant() -> None:
    torch.manual_seed(0)
    relevance, (message,) = _attribute(Dead(1), "attnlrp")
    assert int((~relevance["both"].any(dim=1)).sum()) == 6
    assert message.startswith("no relevance at all at 2 of 8 outputs of both")


class Apart(nn.Module):
    """A layer makes decays alone; its output goes the way of another's, which is more (xLSTM, RWKV)."""

    def __init__(self) -> None:
        super().__init__()
        self.rate, self.added = nn.Linear(5, 4, bias=False), nn.Linear(5, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        rate, added = torch.cat([self.rate(x), self.added(x)], dim=-1).chunk(2, dim=-1)
        return added * rate.exp()


def test_a_weight_that_makes_decays_alone_is_unscored_and_not_irrelevant() -> None:
    torch.manual_seed(0)
    relevance, told = _attribute(Apart(), "attnlrp")
    assert not told and list(relevance) == ["added.weight"]
    assert relevance.unscored == {"rate.weight": UNREACHED}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_decays_of_a_gated_delta_rule_are_told_of() -> None:
    model = build("causal-lm", "qwen3_next", "eager")
    batch: Any = batch_for("causal-lm", model)
    with pytest.warns(UnscoredWeightsWarning, match=r"at 4 of 8 outputs of .*in_proj_ba\.weight: what 'attnlrp' holds"):
        lrp_prune.attribute(model, [batch], explained, "attnlrp", matmul_dtype=None)
