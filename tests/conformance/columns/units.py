"""Neurons, heads and blocks: found, and proven by taking one out, or refused by name.

A unit owns entries of weights that make it and of others that read it. Its activation is zero where what makes it is zero; if the
library is right about the rest, that is the same model as the one without all of its entries, which is what pruning it is: what
is read beside it would show, and so would anything that is added to it on the way. Of heads and blocks the library names one side
alone; these are compared with a model in which the activation itself is set to zero.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

import lrp_prune
from lrp_prune.relevance import Relevance
from lrp_prune.relevance.members import Member
from tests.conformance.columns.case import Case, difference
from tests.conformance.columns.silencing import reading_zeros, watching_reads, writing_zeros
from tests.conformance.columns.verdict import ABSENT, FAILED, PASSED, REFUSED, Verdict
from tests.support.architectures.explaining import explained

GROUPS = 6
"""As many groups of a type, evenly spread, are taken apart."""
_EQUAL = 1e-6
"""Some activations are not quite zero at zero."""


def neurons(case: Case) -> Verdict:
    """Hidden units and filters."""
    return _proven(case, "neuron")


def heads(case: Case) -> Verdict:
    """Heads of attention, by what reads them."""
    return _proven(case, "head")


def blocks(case: Case) -> Verdict:
    """Layers that write onto a residual stream."""
    return _proven(case, "block")


def _proven(case: Case, kind: str) -> Verdict:
    model, batch = case.biased, case.first.batch
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        try:
            relevance = lrp_prune.attribute(model, [batch], target=explained, granularity=kind, matmul_dtype=None)
        except ValueError as error:
            return Verdict(REFUSED, str(error))
    left = [str(warning.message) for warning in told if "units" in str(warning.message)]
    names = list(relevance)
    if not names:
        return Verdict(ABSENT)
    dense, changed = case.logits(model), False
    for group in names[:: -(-len(names) // GROUPS)]:
        unit = relevance[group].numel() // 2
        apart, differs = _taken_out(case, model, relevance, group, unit, dense)
        if apart > _EQUAL:
            why = f"unit {unit} of {group}: without its entries and without its activation, by a share of the largest logit"
            return Verdict(FAILED, f"{why}: {apart:.3g}", apart)
        changed |= differs
    if not changed:
        return Verdict(FAILED, f"no unit of {len(names)} groups that were looked at changes anything")
    return Verdict(PASSED, "; ".join(left), float(len(names)))


def _taken_out(
    case: Case, model: nn.Module, relevance: Relevance, group: str, unit: int, dense: list[Tensor]
) -> tuple[float, bool]:
    """How far apart the models are that should be one, and whether they differ from the dense one."""
    members = relevance.members[group]
    makers, readers = [each for each in members if not each.reads], [each for each in members if each.reads]
    with _zeroed(model, members, unit):
        without = case.logits(model)
    if makers and readers:
        ablated = _zeroed(model, makers, unit)
    else:
        ablated = (reading_zeros if readers else writing_zeros)(model, members, unit)
    with ablated:
        other = case.logits(model)
    apart = difference(without, other)
    if apart > _EQUAL and makers and readers and _leaves_one_number(case, model, makers, readers, unit):
        with reading_zeros(model, readers, unit):
            apart = difference(without, case.logits(model))
    if apart > _EQUAL and makers and readers and _leaves_the_same(case, model, makers, readers, unit):
        with _zeroed(model, makers, unit), reading_zeros(model, readers, unit):
            apart = difference(without, case.logits(model))
    return apart, difference(dense, without) > 1e-6


def _leaves_one_number(case: Case, model: nn.Module, makers: list[Member], readers: list[Member], unit: int) -> bool:
    """Whether each layer that reads a unit reads one number of it in all places once what makes it is zero."""
    read = _read_of_nothing(case, model, makers, readers, unit, case.first.batch)
    return all(bool(torch.isclose(values, values.flatten()[0], rtol=1e-9).all()) for values in read if values.numel())


def _leaves_the_same(case: Case, model: nn.Module, makers: list[Member], readers: list[Member], unit: int) -> bool:
    """Whether what is read of a unit is the same for another batch, where there is one, once what makes it is zero.

    Padding, and what is added to channels, may be in some places alone.
    """
    if case.another is None:
        return False
    read, others = (
        _read_of_nothing(case, model, makers, readers, unit, batch) for batch in (case.first.batch, case.another)
    )
    return all(torch.allclose(one, other, rtol=1e-9) for one, other in zip(read, others, strict=True))


def _read_of_nothing(
    case: Case, model: nn.Module, makers: list[Member], readers: list[Member], unit: int, batch: Any
) -> list[Tensor]:
    """What is read of a unit while what makes it is zero."""
    with _zeroed(model, makers, unit), watching_reads(model, readers, unit) as read:
        case.logits(model, batch)
    return read


@contextmanager
def _zeroed(model: nn.Module, members: list[Member] | tuple[Member, ...], unit: int) -> Iterator[None]:
    """The unit's entries are zero for a while."""
    parameters = dict(model.named_parameters())
    before = {member.parameter: parameters[member.parameter].detach().clone() for member in members}
    with torch.no_grad():
        for member in members:
            parameter = parameters[member.parameter]
            parameter.masked_fill_((member.owners == unit).expand(parameter.shape), 0.0)
        yield
        for name, value in before.items():
            parameters[name].copy_(value)
