"""``audit``: what is wrong with the relevance of a model, and what to do about it."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lrp_prune.attribution.inputs import check_samples, given_by_name, names_of_lookups, on_device_of, target_for
from lrp_prune.auditing.passages import Passage, Passing
from lrp_prune.auditing.report import CAUSES, AuditReport, Remark
from lrp_prune.auditing.without import dead_units, unscored_weights
from lrp_prune.engine.audit import Finding
from lrp_prune.engine.composites import Composite, composite_of
from lrp_prune.engine.propagation import propagating
from lrp_prune.engine.roots import Root
from lrp_prune.engine.unaltered import unaltered
from lrp_prune.engine.uses import WeightUses
from lrp_prune.models.padding import counted_tokens
from lrp_prune.models.profile import profile_of
from lrp_prune.models.subject import subject_of
from lrp_prune.names import is_called_bias, named_modules
from lrp_prune.relevance.unscored import patterns_of
from lrp_prune.targets.tokens import labelled

CONSERVING = "cp_lrp"
"""The preset under which nothing but biases and operations without a rule loses relevance."""
_NOTICED, _LARGE = 1e-3, 0.02
"""Shares of the model's relevance from which a loss is looked into, and told."""
_SINK = 0.5
"""The share of relevance at the first token from which the others are hardly seen."""
_SHOWN = 5


class _Pass(NamedTuple):
    passages: list[Passage]
    unruled: list[Finding]
    first_token: float | None
    biased: set[str]
    """The modules that add a constant to activations which absorbs relevance."""


def audit(
    model: nn.Module,
    batch: Any,
    target: Any = None,
    *,
    composite: str | Composite = "attnlrp",
) -> AuditReport:
    """Whether relevance of a model can be trusted, in words: what is wrong, and what to do.

    On one batch it looks at: operations without a rule; conservation, that is at each module what arrives at its outputs and what
    it hands on to its inputs; how much of the relevance is at the first token, a sink of attention; weights that cannot be
    scored; units that have no relevance at all. A few forward and backward passes; the model is as it was. Nothing is raised of
    what is wrong with the model: it is in the report.

    Args:
        model: any module, or a ``LightningModule``.
        batch: as :func:`lrp_prune.attribute` takes it; more samples say more about dead units.
        target: what is explained, as in :func:`lrp_prune.explain`.
        composite: the rules.

    Raises:
        ValueError: for an unknown composite.

    Example:
        >>> import torch, lrp_prune
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8, bias=False), torch.nn.ReLU(), torch.nn.Linear(8, 2, bias=False))
        >>> report = lrp_prune.audit(model, torch.randn(64, 4))
        >>> report.problems, report.lost < 1e-5
        ((), True)
    """
    rules = composite_of(composite)
    remarks: list[Remark] = []
    try:
        found = _passed(model, batch, target, rules)
    except Exception as error:  # whatever is wrong with the model is what the report is about
        what = f"nothing could be explained ({type(error).__name__}): {error}"
        remark = Remark(True, "batch", what, "mend this first, the rest follows from it")
        return AuditReport((remark,), rules.name)
    remarks += _of_operations(found.unruled)
    lost, causes, untold = _losses(model, batch, target, rules, found)
    remarks += [*_of_conservation(lost, causes, found, rules), *untold]
    if found.first_token is not None:
        remarks.append(_of_first_token(found.first_token))
    unscored, about_weights = unscored_weights(model, batch, target)
    dead, about_units = dead_units(model, batch, target, rules)
    remarks += [*about_weights, *about_units]
    remarks.sort(key=lambda remark: not remark.problem)
    return AuditReport(
        tuple(remarks), rules.name, tuple(found.passages), causes, lost, found.first_token, unscored, dead
    )


def _passed(model: nn.Module, batch: Any, target: Any, rules: Composite) -> _Pass:
    """One pass through the model, with what went through each module."""
    subject = subject_of(model)
    module, passing = subject.module, Passing()
    check_samples(batch)
    with unaltered(module), labelled():
        batch = on_device_of(module, batch)
        explained = target_for(module, batch, target, subject.own_target)
        with propagating(module, rules, None, "warn", WeightUses(), constants=True) as propagation:
            added = propagation.noting_biases()
            with passing.noting(module):
                value = explained(module, batch)
            unruled = propagation.unruled(value) if value.requires_grad else []
            propagation.check_target(value)
            roots = propagation.roots()
            passages, ended = passing.passages(module, propagation, value, roots)
    biased = {name for name, values in added.items() if any(bool(value.any()) for value in values)}
    return _Pass(passages, unruled, _first_token(module, batch, ended), biased)


def _first_token(module: nn.Module, batch: Any, ended: Sequence[tuple[Root, Tensor]]) -> float | None:
    """The mean share of relevance, whatever its sign, that each sample's first token has."""
    if not profile_of(module).left_to_right:
        return None
    lookups = [root.ids if root.parameter else None for root, _ in ended]
    names = names_of_lookups(lookups, given_by_name(module, batch))
    tokens = next((value for (_, value), name in zip(ended, names, strict=True) if name is not None), None)
    if tokens is None or tokens.dim() != 3 or tokens.shape[1] < 2:
        return None
    relevance = tokens.sum(-1).abs()
    counted = counted_tokens(module, batch, 0)
    counted = torch.ones_like(relevance, dtype=torch.bool) if counted is None else counted.to(relevance.device)
    relevance = relevance * counted
    first = relevance.gather(1, counted.long().argmax(1, keepdim=True))[:, 0]
    return float((first / relevance.sum(1).clamp(min=1e-30)).mean())


def _losses(
    model: nn.Module, batch: Any, target: Any, rules: Composite, found: _Pass
) -> tuple[float | None, dict[str, str], list[Remark]]:
    """The share that is lost, why it is in each module that loses some, and what could not be told of that."""
    whole = next((passage for passage in found.passages if not passage.name), None)
    if whole is None:
        return None, {}, []
    size = max(abs(whole.arrived), abs(whole.passed), 1e-30)
    losing = [passage for passage in found.passages if abs(passage.own) > _NOTICED * size]
    if not losing:
        return abs(whole.lost) / size, {}, []
    conserved, untold = set[str](), list[Remark]()
    if rules.name != CONSERVING:
        try:
            other = _passed(model, batch, target, composite_of(CONSERVING))
        except Exception as error:  # as above: it is of the model, or of rules that let nothing through
            what = f"whether that is by design is not known: under {CONSERVING!r} nothing can be followed: {error}"
            untold.append(Remark(True, "conservation", what, "see what it says"))
        else:
            total = max((abs(passage.arrived) for passage in other.passages if not passage.name), default=size)
            conserved = {passage.name for passage in other.passages if abs(passage.own) <= _NOTICED * total}
    modules = named_modules(subject_of(model).module)
    causes = {passage.name: _cause(passage, modules.get(passage.name), found, conserved) for passage in losing}
    return abs(whole.lost) / size, causes, untold


def _cause(passage: Passage, module: nn.Module | None, found: _Pass, conserved: set[str]) -> str:
    if passage.name in {_module_of(finding) for finding in found.unruled}:
        return "unruled"
    if passage.name in conserved:
        return "rule"
    if passage.name in found.biased:
        return "bias"
    if module is None:
        return "unknown"
    own = module.named_parameters(recurse=False)
    return "bias" if any(is_called_bias(name, module) and bool(value.any()) for name, value in own) else "unknown"


def _module_of(finding: Finding) -> str:
    name = finding.place.partition(" (")[0]
    return "" if name.startswith("<") else name


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %" if share >= 0.095 else f"{100 * share:.2g} %"


def _of_operations(unruled: Sequence[Finding]) -> list[Remark]:
    if not unruled:
        return [Remark(False, "operations", "each has a rule, or is linear")]
    advice = {
        "function": "give it a rule: lrp_prune.register_rule(function, 'activation') if it is elementwise, else one of your own",
        "hidden": "it is hidden from the rules: give the class of the module that runs it a rule by lrp_prune.register_rule",
        "between": "compute it in the forward of a module: between forwards no rules act",
        "no gradient": "relevance ends there: load the model in a floating-point type",
    }
    remarks = []
    for kind, operation in dict.fromkeys((finding.kind, finding.operation) for finding in unruled):
        places = [finding.place for finding in unruled if (finding.kind, finding.operation) == (kind, operation)]
        where = _few(patterns_of(dict.fromkeys(places)))
        what = f"{operation} in {where} has no rule, and relevance through it is not LRP"
        remarks.append(Remark(True, "operations", what, advice[kind]))
    return remarks


def _of_conservation(lost: float | None, causes: Mapping[str, str], found: _Pass, rules: Composite) -> list[Remark]:
    if lost is None:
        return [
            Remark(False, "conservation", "not known: what the model returns is no activation that could be followed")
        ]
    sizes: dict[str, float] = {}
    size = max(abs(found.passages[0].arrived), abs(found.passages[0].passed), 1e-30)
    own = {passage.name: passage.own for passage in found.passages}
    for name, cause in causes.items():
        sizes[cause] = sizes.get(cause, 0.0) + abs(own[name]) / size
    if not sizes:
        return [Remark(False, "conservation", f"relevance is conserved ({_percent(lost)} is lost)")]
    remarks = [
        Remark(False, "conservation", f"{_percent(lost)} of the relevance is lost from the output to the inputs")
    ]
    for cause, share in sizes.items():
        if share < _LARGE and cause in ("bias", "rule"):
            continue
        names = sorted((name for name in causes if causes[name] == cause), key=lambda name: -abs(own[name]))
        where = _few([name or "the model itself" for name in patterns_of(names)])
        what = f"{_percent(share)} come or go in {where}: {CAUSES[cause]}"
        remarks.append(Remark(cause in ("unruled", "unknown"), "conservation", what, _advice(cause, rules)))
    return remarks


def _advice(cause: str, rules: Composite) -> str:
    return {
        "rule": f"composite={CONSERVING!r} conserves there, if that is wanted",
        "bias": "",
        "unruled": "see operations",
        "unknown": "look at the module's forward: something that rules do not see, or a tensor that comes in past its arguments",
    }[cause]


def _of_first_token(share: float) -> Remark:
    what = f"it has {_percent(share)} of the tokens' relevance, whatever its sign"
    if share < _SINK:
        return Remark(False, "first token", what)
    return Remark(
        True,
        "first token",
        f"{what}: it is a sink of attention, and dwarfs the others",
        "leave it out by skip_first=1 (attribute, prune, perturbation_curve), explain a difference of two logits, or "
        f"use composite={CONSERVING!r}",
    )


def _few(names: Iterable[str]) -> str:
    shown = list(names)
    more = f" and {len(shown) - _SHOWN} more" if len(shown) > _SHOWN else ""
    return f"{', '.join(shown[:_SHOWN])}{more}"
