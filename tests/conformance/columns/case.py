"""A type for a task: its models, one for each implementation of attention, and its batch."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from tests.support.architectures.batches import NoBatchError, batch_for
from tests.support.architectures.building import attentions, build
from tests.support.architectures.explaining import logits_of

_UNUSUAL = 1e4
"""Times the median, from which on a logit is one that is put in the place of another."""


@dataclass(frozen=True)
class Variant:
    """One way to build a type.

    Args:
        name: of the implementation, empty where there is no choice.
        model: in evaluation mode, without biases.
        batch: that it accepts.
        limit: how much of the value may be lost in its precision.
        attention: its implementation; None for the model's own.
    """

    name: str
    model: nn.Module
    batch: dict[str, Any]
    limit: float
    attention: str | None = None


class Case:
    """A type for a task, built when it is asked for; always in the same way."""

    def __init__(self, mapping: str, name: str) -> None:
        self.mapping, self.name = mapping, name

    @cached_property
    def variants(self) -> list[Variant]:
        """One for each implementation of attention, in double precision; and with grouped experts, which have none, in single."""
        found: list[Variant] = []
        for attention in attentions(self.mapping, self.name):
            try:
                model = build(self.mapping, self.name, attention)
                variant = Variant(attention, model, batch_for(self.mapping, model), 1e-4, attention)
            except NoBatchError:  # some types cannot be run in double precision by their own code
                variant = self._in_single(attention)
            if not all(bool(logits.isfinite().all()) for logits in _values(variant)):
                # The smallest number and a score have a sum in single precision, where the score is lost, and none in double.
                variant = self._in_single(attention)
            if found and not _agree(found[0], variant):
                # Nor do some compute in it what they do in single: torch's attention misreads a mask in single precision.
                single = self._in_single(attention)
                variant = single if _agree(found[0], single) else variant
            found.append(variant)
        if _has_experts(found[-1].model):
            model = build(self.mapping, self.name, dtype=torch.float32, experts=None)
            if getattr(model.config, "_experts_implementation", None) not in (None, "eager"):
                name = f"{model.config._experts_implementation} experts in float32"
                found.append(Variant(name, model, _single(found[-1].batch), 1e-3))
        return found

    def _in_single(self, attention: str) -> Variant:
        model = build(self.mapping, self.name, attention, dtype=torch.float32)
        return Variant(f"{attention} in float32", model, batch_for(self.mapping, model), 1e-4, attention)

    @property
    def first(self) -> Variant:
        """The one that whatever does not depend on attention is tried on."""
        return [variant for variant in self.variants if variant.limit < 1e-3][-1]

    def fresh(self, biases: bool = False) -> nn.Module:
        """Another model like the first; it is not copied, since some models keep what they computed."""
        return build(self.mapping, self.name, self.first.attention, biases=biases, dtype=self.dtype)

    @cached_property
    def biased(self) -> nn.Module:
        """A model whose biases are not zero, so that it is seen where they are forgotten."""
        return self.fresh(biases=True)

    @property
    def dtype(self) -> torch.dtype:
        """The precision of the first."""
        return next(self.first.model.parameters()).dtype

    another: Any = None
    """A batch as large as the first, with other values, where there is one."""

    def logits(self, model: nn.Module, batch: Any = None) -> list[Tensor]:
        """What a model puts out for a batch, by default the first."""
        torch.manual_seed(0)
        with torch.no_grad():
            return logits_of(model, self.first.batch if batch is None else batch)


def _values(variant: Variant) -> list[Tensor]:
    torch.manual_seed(0)
    with torch.no_grad():
        return [logits.double() for logits in logits_of(variant.model, variant.batch)]


def _agree(one: Variant, other: Variant) -> bool:
    """Whether two variants compute the same, but for what single precision tells apart."""
    found = [_values(variant) for variant in (one, other)]
    shapes = [[logits.shape for logits in logits] for logits in found]
    return shapes[0] == shapes[1] and difference(*found) < 1e-4


def _has_experts(model: nn.Module) -> bool:
    return any(parameter.dim() == 3 and "experts" in name for name, parameter in model.named_parameters())


def _single(batch: dict[str, Any]) -> dict[str, Any]:
    return {
        name: value.float() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in batch.items()
    }


def difference(ones: list[Tensor], others: list[Tensor]) -> float:
    """The largest difference, of what is as large as the largest of all.

    What a model puts in the place of a logit that is not to be chosen (the smallest number, or a million less) is no measure of
    the others, and left out.
    """
    pairs = [(one, other) for one, other in zip(ones, others, strict=True) if one.numel()]
    usual = [one.abs() <= _UNUSUAL * one.abs().median() for one, _ in pairs]
    pairs = [(one[kept], other[kept]) for (one, other), kept in zip(pairs, usual, strict=True) if bool(kept.any())]
    largest = max((float(one.abs().max()) for one, _ in pairs), default=0.0)
    apart = max((float((one - other).abs().max()) for one, other in pairs), default=0.0)
    return apart / max(largest, 1e-12)
