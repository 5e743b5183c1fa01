"""Forward values in the mode, conservation, and operations without a rule."""

import torch

import lrp_prune
from tests.conformance.columns.case import Case, Variant
from tests.conformance.columns.verdict import ABSENT, FAILED, PASSED, Verdict, joined, within
from tests.support.architectures.explaining import explained, logits_of


def forward(case: Case) -> Verdict:
    """What the model computes is bit for bit the same in the mode: as it does with gradients, or as it does without."""
    return joined({variant.name: _same(variant) for variant in case.variants})


def _same(variant: Variant) -> Verdict:
    torch.manual_seed(0)
    outside = logits_of(variant.model, variant.batch)
    torch.manual_seed(0)
    again = logits_of(variant.model, variant.batch)
    if not all(torch.equal(one, other) for one, other in zip(outside, again, strict=True)):
        return Verdict(ABSENT, "the model by itself gives another result each time")
    torch.manual_seed(0)
    with lrp_prune.attributing(variant.model, "attnlrp", unruled="ignore"):
        inside = logits_of(variant.model, variant.batch)
    torch.manual_seed(0)
    with (
        torch.no_grad()
    ):  # torch attends in another way with learned biases if these need a gradient, which rules do not ask for
        evaluated = logits_of(variant.model, variant.batch)
    for one, other, third in zip(outside, inside, evaluated, strict=True):
        if not torch.equal(one, other) and not torch.equal(third, other):
            apart = float((one - other).abs().max() / one.abs().max().clamp(min=1e-300))
            return Verdict(FAILED, f"other values in the mode, by {apart:.2g} of the largest", apart)
    return Verdict(PASSED)


def conserves(case: Case) -> Verdict:
    """Under CP-LRP relevance of all roots sums up to the value: what is missing is a share of the value."""
    return joined({variant.name: _balance(variant) for variant in case.variants})


def _balance(variant: Variant) -> Verdict:
    with lrp_prune.attributing(variant.model, "cp_lrp", unruled="error") as propagation:
        value = explained(variant.model, variant.batch)
        relevance = propagation.relevance(value)
    total = sum(tensor.double().sum() for tensor in relevance.values())
    lost = float((total - value.detach().double()).abs() / value.detach().double().abs())
    return within(lost, variant.limit, "relevance that is missing or too much, of the value")


def attnlrp(case: Case) -> Verdict:
    """AttnLRP has a rule for every operation, and gives finite relevance that is not all zero."""
    return joined({variant.name: _ruled(variant) for variant in case.variants})


def _ruled(variant: Variant) -> Verdict:
    with lrp_prune.attributing(variant.model, "attnlrp", unruled="error") as propagation:
        relevance = propagation.relevance(explained(variant.model, variant.batch))
    if not any(bool(tensor.any()) for tensor in relevance.values()):
        return Verdict(FAILED, "all relevance is zero")
    return Verdict(PASSED)
