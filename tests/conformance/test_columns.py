"""Each column sees what it is there to see."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import lrp_prune
from lrp_prune.relevance.members import Member
from tests.conformance.checking import check
from tests.conformance.columns import relevance, units, weights
from tests.conformance.columns.case import Case, Variant, difference
from tests.conformance.columns.verdict import FAILED, PASSED, Verdict, joined, within
from tests.support.architectures.building import build

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


@pytest.fixture
def case() -> Case:
    return Case("causal-lm", "gpt2")


def test_other_values_in_the_mode_are_seen(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    assert relevance.forward(case).status == PASSED
    called: list[int] = []
    honest = relevance.logits_of

    def wrong(model: nn.Module, batch: Any) -> list[torch.Tensor]:
        called.append(0)
        return [logits * (1 + 1e-15 * (len(called) % 4 == 3)) for logits in honest(model, batch)]

    monkeypatch.setattr(relevance, "logits_of", wrong)
    verdict = relevance.forward(case)
    assert verdict.status == FAILED and "other values in the mode" in verdict.why


def test_relevance_that_biases_absorb_is_seen(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    assert relevance.conserves(case).status == PASSED
    for variant in case.variants:
        variant.model.load_state_dict(build("causal-lm", "gpt2", biases=True).state_dict())
    verdict = relevance.conserves(case)
    assert verdict.status == FAILED and verdict.figure is not None and verdict.figure > 1e-3


def test_weights_that_are_neither_scored_nor_named_are_seen(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    _attribute_less(monkeypatch, lambda found: found._sums.popitem())
    verdict = weights.weights(case)
    assert verdict.status == FAILED and "neither scored nor named: transformer.h.1.mlp.c_proj.weight" in verdict.why


def _attribute_less(monkeypatch: pytest.MonkeyPatch, change: Callable[[Any], Any]) -> None:
    honest = lrp_prune.attribute

    def wrong(*args: Any, **kwargs: Any) -> Any:
        found = honest(*args, **kwargs)
        change(found)
        return found

    monkeypatch.setattr(lrp_prune, "attribute", wrong)


@pytest.mark.parametrize("kind", ["neuron", "head", "block"])
def test_entries_of_another_unit_are_seen(case: Case, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    look = {"neuron": units.neurons, "head": units.heads, "block": units.blocks}[kind]
    assert look(case).status == PASSED

    def shifted(found: Any) -> None:
        for name, members in found.members.items():
            last = members[-1]
            owners = torch.full_like(last.owners, -1) if kind == "block" else last.owners.roll(1, last.dim)
            found.members[name] = (*members[:-1], Member(last.parameter, owners, last.reads))

    if kind == "head":  # both sides follow what the library says; that nothing else reads the columns is what is proven
        monkeypatch.setattr(units, "reading_zeros", units.writing_zeros)
    else:
        _attribute_less(monkeypatch, shifted)
    assert look(case).status == FAILED


class Plain(Case):
    """Any model, and a batch."""

    def __init__(self, model: nn.Module, batch: torch.Tensor) -> None:
        self.model, self.batch, self.another = model, batch, batch.flip(0) + 1

    @property
    def first(self) -> Variant:
        return Variant("", self.model, self.batch, 1e-4)  # type: ignore[arg-type]  # a tensor, and no mapping


class Padded(nn.Module):
    """Channels that have a shift of their own and are padded before they are read, beside them as they are (HGNet, CSATv2)."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv1d(2, 4, 3), nn.Conv1d(4, 3, 2)
        self.shift = nn.Parameter(torch.rand(1) + 0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.first(x)
        return self.second(nn.functional.pad(hidden + self.shift, (0, 1))).mean(-1) + hidden.sum(dim=(1, 2))[:, None]


@pytest.mark.parametrize("right", [True, False])
def test_a_constant_may_stand_in_some_places_alone(right: bool) -> None:
    torch.manual_seed(0)
    model, batch = Padded().double(), torch.randn(5, 2, 8, dtype=torch.float64)
    case = Plain(model, batch)
    relevance = lrp_prune.attribute(
        model, [batch], target=lambda model, batch: model(batch).sum(), granularity="neuron", matmul_dtype=None
    )
    (group,) = relevance
    if not right:
        relevance.members[group] = tuple(
            member if member.reads else Member(member.parameter, member.owners.roll(1, 0))
            for member in relevance.members[group]
        )
    apart, differs = units._taken_out(case, model, relevance, group, 2, case.logits(model))
    assert differs and (apart < 1e-12) == right


@pytest.mark.parametrize("right", [True, False])
def test_a_unit_that_leaves_a_constant_is_compared_with_what_reads_zeros(right: bool) -> None:
    """A sigmoid of zero is read all the same; entries of another unit are seen by it as well."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Sigmoid(), nn.Linear(6, 3)).double()
    batch = torch.randn(5, 4, dtype=torch.float64)
    relevance = lrp_prune.attribute(
        model, [batch], target=lambda model, batch: model(batch).sum(), granularity="neuron", matmul_dtype=None
    )
    case, members = Plain(model, batch), relevance.members["2"]
    if not right:
        relevance.members["2"] = tuple(
            member if member.reads else Member(member.parameter, member.owners.roll(1, 0)) for member in members
        )
    apart, differs = units._taken_out(case, model, relevance, "2", 3, case.logits(model))
    assert differs and (apart < 1e-12) == right


def test_heads_are_silenced_where_a_kernel_does_all_of_an_attention() -> None:
    """As torch's own layers have it in evaluation, which then call no function that could be changed."""
    torch.manual_seed(0)
    model, batch = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).double().eval(), torch.randn(3, 5, 8).double()
    relevance = lrp_prune.attribute(
        model, [batch], target=lambda model, batch: model(batch).square().sum(), granularity="head", matmul_dtype=None
    )
    case, (group,) = Plain(model, batch), relevance
    apart, differs = units._taken_out(case, model, relevance, group, 1, case.logits(model))
    assert differs and apart < 1e-12 and torch.backends.mha.get_fastpath_enabled()


def test_a_module_that_is_given_the_stream_as_well_is_not_silenced_as_a_whole() -> None:
    """ZAYA scales and shifts both sides in one module, which puts out their sum."""
    assert units.blocks(Case("causal-lm", "zaya")).status == PASSED


def test_what_stands_for_logits_that_are_not_to_be_chosen_is_no_measure() -> None:
    logits = torch.tensor([[1.0, 2.0, torch.finfo(torch.float32).min], [3.0, -1e6, -torch.inf]])
    other = logits + torch.tensor([0.5, 0.0, 0.0])
    assert difference([logits], [other]) == pytest.approx(0.5 / 3)


def test_units_that_are_refused_say_why() -> None:
    verdict = units.heads(Case("image-classification", "resnet"))
    assert verdict.status == "refused" and "no head" in verdict.why


def test_another_number_of_pruned_weights_is_seen(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    assert weights.prunes(case).status == PASSED
    honest = lrp_prune.prune
    monkeypatch.setattr(
        lrp_prune,
        "prune",
        lambda model, batches, sparsity, *args, **kwargs: honest(model, batches, 0.49, *args, **kwargs),
    )
    verdict = weights.prunes(Case("causal-lm", "gpt2"))
    assert verdict.status == FAILED and "were asked for" in verdict.why


def test_zeros_that_are_lost_in_training_are_seen(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights.MaskKeeper, "attach", lambda *args: None)
    monkeypatch.setattr(weights.MaskKeeper, "_hook_parameters", lambda *args: None)
    verdict = weights.prunes(case)
    assert verdict.status == FAILED and "zeros are lost in training: " in verdict.why


def test_a_model_that_is_loaded_as_another_is_seen(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    assert weights.loads(case).status == PASSED
    honest = weights._loaded

    def wrong(case: Case, model: nn.Module) -> nn.Module:
        loaded = honest(case, model)
        if model is not case.first.model:
            loaded.transformer.h[0].mlp.c_fc.weight.data[0, 0] += 1
        return loaded

    monkeypatch.setattr(weights, "_loaded", wrong)
    verdict = weights.loads(case)
    assert verdict.status == FAILED and "the loaded model gives other values" in verdict.why


def test_what_cannot_be_built_says_why() -> None:
    entry = check("image-classification", "dinat")
    assert "columns" not in entry and "natten" in entry["built"]


def test_an_error_in_a_column_is_a_failure(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any, **kwargs: Any) -> None:
        raise IndexError("nothing there")

    monkeypatch.setattr(lrp_prune, "attributing", broken)
    entry = check("causal-lm", "gpt2", ["conserves"])
    assert entry["columns"] == {"conserves": {"status": FAILED, "why": "IndexError: nothing there"}}


def test_the_first_variant_that_failed_is_named() -> None:
    good, bad = Verdict(PASSED, figure=1e-9), within(0.5, 0.1, "lost")
    assert joined({"eager": good, "sdpa": bad}) == Verdict(FAILED, "sdpa: lost: 0.5", 0.5)
    assert joined({"eager": good, "sdpa": Verdict(PASSED, figure=1e-8)}).figure == 1e-8
    assert within(float("nan"), 0.1, "lost").status == FAILED
