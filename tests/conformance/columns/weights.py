"""Relevance of weights; pruning, training and files."""

import logging
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache

import torch
from torch import Tensor, nn

import lrp_prune
from lrp_prune.attribution.candidates import candidates
from lrp_prune.relevance.unscored import patterns_of
from lrp_prune.selection.scopes import number_to_prune
from lrp_prune.training.keeping import MaskKeeper
from tests.conformance.columns.case import Case, difference
from tests.conformance.columns.verdict import ABSENT, FAILED, PASSED, Verdict, within
from tests.support.architectures.explaining import explained, logits_of
from tests.support.architectures.mappings import auto_class

SPARSITY, EQUAL = 0.5, 1e-6


def weights(case: Case) -> Verdict:
    """Every weight that may be pruned has relevance, or is named: why it has none, or that ids look its rows up."""
    model, batch = case.first.model, case.first.batch
    with warnings.catch_warnings(), _told() as told:
        warnings.simplefilter("ignore")
        relevance = lrp_prune.attribute(model, [batch], target=explained, matmul_dtype=None)
    asked = candidates(model)
    tables = [name for name in asked if any(name in line and "left alone" in line for line in told)]
    known = {*relevance, *(name for name, why in relevance.unscored.items() if why), *tables}
    missing = [name for name in asked if name not in known]
    if missing:
        return Verdict(FAILED, f"neither scored nor named: {', '.join(patterns_of(missing))}")
    wrong = [name for name in relevance if not bool(torch.isfinite(relevance[name]).all())]
    if wrong:
        return Verdict(FAILED, f"not finite: {', '.join(patterns_of(wrong))}")
    named = "; ".join(f"{', '.join(patterns_of([name]))} ({why})" for name, why in _few(relevance.unscored))
    return Verdict(PASSED, f"not scored: {named}" if named else "", len(relevance.unscored) / len(asked))


@contextmanager
def _told() -> Iterator[list[str]]:
    """What the library's logger says."""
    said: list[str] = []

    class Listening(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage())

    logger, handler = logging.getLogger("lrp_prune"), Listening(logging.INFO)
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield said
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def _few(unscored: dict[str, str]) -> list[tuple[str, str]]:
    """One weight for each reason."""
    return [
        (next(name for name, other in unscored.items() if other == why), why)
        for why in dict.fromkeys(unscored.values())
    ]


def prunes(case: Case) -> Verdict:
    """As many weights are zero as were asked for, exactly, and stay so in a step of training; the others move."""
    model, masks, excluded = _pruned(case)
    total = sum(mask.numel() for mask in masks.values())
    zeros = sum(int((~mask).sum()) for mask in masks.values())
    # What a forward multiplies is among them whatever it is called, and tables that ids look up are not.
    possible = {name: entry for name, entry in candidates(model, exclude=excluded or None).items() if name not in masks}
    unscored = sum(entry.numel() for name, entry in possible.items() if name in masks.unscored)
    asked = number_to_prune(SPARSITY, total + unscored)
    if zeros != asked:
        return Verdict(FAILED, f"{zeros:,} of {total:,} weights are pruned, and {asked:,} were asked for")
    wrong = _trained(case, model, masks)
    if wrong:
        return Verdict(FAILED, wrong)
    return Verdict(PASSED, f"without {', '.join(excluded)}, which have no relevance" if excluded else "")


@lru_cache(maxsize=1)
def _pruned_once(case: Case) -> tuple[dict[str, Tensor], lrp_prune.Masks, list[str]]:
    """Prune; where that is refused since weights have no relevance, without these, as the message says."""
    model, batches = case.fresh(), [case.first.batch]
    method, settings = lrp_prune.LRP(target=explained), {"progress": False, "matmul_dtype": None}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return model.state_dict(), lrp_prune.prune(model, batches, SPARSITY, method, **settings), []
        except ValueError as error:
            if "exclude=[" not in str(error):
                raise
        relevance = lrp_prune.attribute(model, batches, target=explained, matmul_dtype=None)
        excluded = patterns_of(relevance.unscored)
        masks = lrp_prune.prune(model, batches, SPARSITY, method, exclude=excluded, **settings)
    return model.state_dict(), masks, excluded


def _pruned(case: Case) -> tuple[nn.Module, lrp_prune.Masks, list[str]]:
    """A pruned model, its masks, and what was excluded."""
    state, masks, excluded = _pruned_once(case)
    model = case.fresh()
    model.load_state_dict(state)
    return model, masks, excluded


def _trained(case: Case, model: nn.Module, masks: lrp_prune.Masks) -> str:
    """What is wrong after a step of an optimizer that has momentum and decay."""
    parameters = dict(model.named_parameters())
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    keeper = MaskKeeper(model, masks, [optimizer])
    before = {name: parameters[name].detach().clone() for name in masks}
    sum(logits.square().mean() for logits in logits_of(model, case.first.batch)).backward()
    optimizer.step()
    keeper.remove()
    lost = [name for name, mask in masks.items() if bool(parameters[name][~mask].any())]
    if lost:
        return f"zeros are lost in training: {', '.join(patterns_of(lost))}"
    if all(torch.equal(parameters[name], before[name]) for name in masks):
        return "no weight moves in training"
    return ""


def loads(case: Case) -> Verdict:
    """What was pruned and saved is the same where transformers alone loads it."""
    dense = case.first.model
    try:
        apart = difference(case.logits(dense), case.logits(_loaded(case, dense)))
    except Exception as error:
        return Verdict(ABSENT, f"nor is the dense model: {type(error).__name__}: {' '.join(str(error).split())[:200]}")
    if apart > EQUAL:
        return Verdict(ABSENT, f"nor is the dense model, by {apart:.2g} of the largest value")
    model, _, _ = _pruned(case)
    apart = difference(case.logits(model), case.logits(_loaded(case, model)))
    return within(apart, EQUAL, "the loaded model gives other values, by a share of the largest")


def _loaded(case: Case, model: nn.Module) -> nn.Module:
    """Saved, and loaded by the class that users call."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(folder)
        loaded: nn.Module = auto_class(case.mapping).from_pretrained(folder, dtype=case.dtype).eval()
    if hasattr(loaded, "set_experts_implementation"):
        loaded.set_experts_implementation("eager")
    stored, computed = model.state_dict(), dict(loaded.named_buffers())
    for name, buffer in model.named_buffers():
        if name not in stored and name in computed:  # made anew, in a precision of its own
            computed[name].copy_(buffer)
    return loaded
