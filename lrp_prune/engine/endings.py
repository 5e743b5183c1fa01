"""Endings: where relevance ends inside a model, so that what comes back empty can be told why.

What is computed from an activation and carries no relevance on is marked with the reason, and so is what is computed from
that. Where nothing comes back, the marks of the model's outputs tell what cut them off.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lrp_prune.engine.facts import Fact
from lrp_prune.engine.nested import is_transformed
from lrp_prune.engine.places import Places
from lrp_prune.models.returned import tensors_within

_RULELESS = frozenset({"plain", "sum", "join", "embedding"})
_NUMBERS = frozenset("item tolist numpy __float__ __int__ __array__".split())


class Ending(NamedTuple):
    """One reason.

    Args:
        cause: ``"rule"``, ``"registered"`` (a rule of the user's), ``"detached"``, ``"integers"``, ``"numbers"``,
            ``"no_grad"``, ``"no_gradient"`` or ``"transformed"`` (by ``torch.func``).
        operation: the function's name.
        module: the module's name.
        place: the module in words.
    """

    cause: str
    operation: str
    module: str
    place: str

    def __str__(self) -> str:
        return f"{self.operation} in {self.place}"


_FACT: Fact[Ending] = Fact("ending")
ending_of = _FACT.of
"""Why a tensor carries no relevance, if it is known."""


class Endings:
    """What happened to the calls of a model, as far as it matters where nothing comes back.

    Args:
        model: its class.
        composite: the name of the rules.

    Attributes:
        calls: how often it was called.
    """

    def __init__(self, model: str, composite: str) -> None:
        self._model, self._composite = model, composite
        self.calls = self._without_gradients = 0
        self._has_gradient = False
        self._outputs: dict[Ending, None] = {}
        self._opaque: dict[Ending, None] = {}
        self._numbers: dict[Ending, None] = {}
        self._transformed: dict[Ending, None] = {}

    def ended(self, function: Any, values: Iterable[Tensor], result: Any, cause: str, places: Places) -> None:
        """Mark what was computed from activations without a gradient, or from what is marked already.

        Args:
            function: what was called.
            values: the tensors among its arguments.
            result: what it returned.
            cause: see :class:`Ending`.
            places: knows the module that runs.
        """
        if name_of(function).endswith("_like") or name_of(function).startswith("new_"):
            return  # made after the shape of an activation, not of its values
        found = None
        for value in values:
            if is_transformed(value):
                self._transformed[Ending("transformed", name_of(function), places.name, places.described())] = None
                return
            if value.requires_grad and not isinstance(value, nn.Parameter):
                found = Ending(cause, name_of(function), places.name, places.described())
                break
            found = found or ending_of(value)
        if found is None:
            return
        if ends_in_numbers(function):
            self._numbers[found] = None
        for entry in result if isinstance(result, tuple | list) else (result,):
            _FACT.note(entry, found)

    def has_no_gradient(self, function: Any, places: Places) -> None:
        """A function was met through which no gradient goes, though its result seems to have one."""
        self._opaque[Ending("no_gradient", str(function), places.name, places.described())] = None

    def called(self, output: Any) -> None:
        """The model has been called."""
        self.calls += 1
        self._without_gradients += not torch.is_grad_enabled()
        tensors = tensors_within(output)
        self._has_gradient = any(value.requires_grad for value in tensors)
        cut_off = (ending_of(value) for value in tensors if not value.requires_grad)
        self._outputs = dict.fromkeys(ending for ending in cut_off if ending is not None)

    def reason(self, target: Tensor) -> str:
        """Why the target does not depend on the inputs of the model, and the way out."""
        model = self._model
        if not self.calls:
            return (
                f"the {model} was never called inside this context, so that the target does not depend on it: call it in the "
                "context, as a whole, and not a copy of it or a part"
            )
        if self._without_gradients == self.calls:
            return (
                f"the {model} was called inside this context, but without gradients (torch.no_grad, torch.inference_mode, or a "
                "method such as generate that sets them): call its forward with gradients enabled"
            )
        if self._opaque and target.requires_grad:
            return f"the target does not depend on what enters the {model}: {self._told(self._opaque)}"
        if self._has_gradient:
            lost = (
                f". Some of what it returned carries no relevance: {self._told(self._outputs)}" if self._outputs else ""
            )
            return (
                f"the target does not depend on what the {model} returned: after the call it was detached, or computed without "
                f"gradients or from numbers (detach, no_grad, item, argmax), or it comes from something else{lost}"
            )
        endings = self._outputs or self._numbers or self._transformed
        if endings:
            return f"what the {model} returned does not depend on what entered it: {self._told(endings)}"
        return (
            f"nothing that carries relevance enters the {model}: its inputs are no floats, and it looks up no embedding. Give it "
            "floats, such as inputs_embeds or one-hot vectors"
        )

    def _told(self, endings: Iterable[Ending]) -> str:
        by_cause: dict[str, list[str]] = {}
        for ending in endings:
            by_cause.setdefault(ending.cause, []).append(str(ending))
        return "; ".join(
            _TOLD[cause].format(where=_listed(found), composite=self._composite) for cause, found in by_cause.items()
        )


_TOLD = {
    "rule": "the composite {composite!r} stops all relevance at {where}: explain what comes before (logits, not probabilities), "
    "or take another composite",
    "registered": "the rule registered for {where} stops all relevance: register another one, or explain what comes before",
    "detached": "the model cuts it off by {where}: explain what comes before, or leave that out",
    "no_gradient": "{where} has no gradient (as quantized layers have none): load the model in a floating-point type",
    "transformed": "{where} runs inside a transformation of torch.func, such as vmap, and relevance is not followed into these: "
    "write it without, or explain what comes after",
    "integers": "the model goes on with whole numbers or truth values after {where}, which carry no relevance: explain what "
    "comes before",
    "numbers": "the model goes on with Python numbers after {where}: explain what comes before, or keep tensors",
    "no_grad": "{where} ran without gradients (torch.no_grad inside the model): enable them there, or explain what comes before; "
    "what is frozen by requires_grad_(False) in place of it is not trained either, and relevance goes through",
}


def name_of(function: Any) -> str:
    """A torch function's name, of a property's getter what it gets."""
    name = getattr(function, "__name__", None) or str(function)
    owner = getattr(function, "__self__", None)
    return getattr(owner, "__name__", name) if name == "__get__" else name


def cause_of(function: Any, kind: str, result: Any) -> str:
    """Why relevance does not go on with a result: see :class:`Ending`."""
    if ends_in_numbers(function):
        return "numbers"
    if kind in _RULELESS:
        return "detached" if result.is_floating_point() else "integers"
    return "registered" if kind == "registered" else "rule"


def ends_in_numbers(function: Any) -> bool:
    """Whether the function makes Python numbers of a tensor."""
    return getattr(function, "__name__", "") in _NUMBERS


def _listed(words: list[str]) -> str:
    return ", ".join(words[:3]) + (f" and {len(words) - 3} more" if len(words) > 3 else "")
