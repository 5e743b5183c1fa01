"""The audit: operations that relevance went through without a rule.

A mode sees torch functions, but neither the inside of ``torch.jit`` code nor of a custom ``autograd.Function``. Their
autograd nodes it does see. So for one forward every node is accounted for, when a function or module gets it and when
one returns it: it was made by a rule, or is linear in its input, or is remembered with the module that ran. What the
explained value depends on of that is reported.
"""

import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lrp_prune.engine.application import folds
from lrp_prune.engine.composites import Composite
from lrp_prune.engine.nested import tensors_in
from lrp_prune.engine.nodes import LINEAR_NODES, NO_GRADIENT_NODES, node_kind
from lrp_prune.engine.places import Places
from lrp_prune.engine.rules.folding import is_left

# What a sharded model puts around its modules: the identity, which tells when a backward pass comes by.
_IDENTITIES = frozenset({"RegisterPostBackwardFunction", "RegisterPreBackwardFunction", "_Leaving"})
_ACCOUNTED = LINEAR_NODES | _IDENTITIES
# What is in proportion to its input has as plain gradient what the rule of activations gives: f(x) / x.
_IN_PROPORTION = frozenset({"Relu", "LeakyRelu", "PreluKernel"})


class UnruledOperationWarning(UserWarning):
    """A nonlinear operation has no rule: its plain gradient was used, and relevance through it is not LRP."""


class UnruledOperationError(RuntimeError):
    """A nonlinear operation has no rule, and ``unruled="error"`` was asked for."""


class UnfoldedNormalizationWarning(UserWarning):
    """A batch normalisation could not be folded into a layer, under rules that ask for it: it is an affine map of its own."""


class Finding(NamedTuple):
    """An operation without a rule.

    Args:
        kind: ``"function"`` (that a rule can be registered for), ``"hidden"`` (from the mode), ``"between"`` (the forwards of
            modules), or ``"no gradient"``.
        operation: its name.
        place: the module that ran.
    """

    kind: str
    operation: str
    place: str


_NORMALIZATIONS = frozenset({torch.batch_norm})

_TOLD = {
    "function": "no rule for: {}. Its plain gradient is used, so relevance through it is not LRP. Add a rule with "
    "lrp_prune.register_rule(function, rule).",
    "hidden": "no rule for: {}. It is hidden from the rules (a torch.autograd.Function, scripted or compiled code), its own "
    "gradient is used, and relevance through it is not LRP. Give the module that runs it a rule with "
    "lrp_prune.register_rule(class, rule).",
    "between": "outside of the model's forward: {}. Between the forwards of its modules rules do not act, so its plain gradient "
    "is used there. Compute it in the forward of a module, and call that.",
    "no gradient": "no relevance goes through: {}. It has no gradient (as quantized layers have none), and relevance ends there, "
    "with 0 before it. Load the model in a floating-point type.",
}


class Audit:
    """Accounts for each autograd node of the forwards.

    Args:
        places: knows the module that runs.
        unruled: what is done in the end, ``"warn"`` or ``"error"``.
        composite: whose rules tell whether batch normalisation is to be folded into layers; None for no.
    """

    def __init__(self, places: Places, unruled: str, composite: Composite | None = None) -> None:
        self._places, self._unruled = places, unruled
        self._folding = composite is not None and folds(composite)
        self._normalizations: dict[Any, str] = {}
        self._known: set[Any] = set()
        self._began = self._ended = 0  # of the latest forward, by autograd's own count of nodes
        self._found: dict[Any, Finding] = {}

    def arrive(self, values: Any) -> None:
        """Account for what a function or module is given: what the mode has not seen being made was hidden from it."""
        for node in self._new_nodes(values):
            kind = node_kind(node)
            if kind not in _ACCOUNTED:
                self._found[node] = Finding(
                    "no gradient" if kind in NO_GRADIENT_NODES else "hidden", _operation(node), self._places.described()
                )

    def entered(self, values: Any) -> None:
        """A forward begins: account for what it is given of an earlier one's outputs, and of what was made of these since."""
        self._began = _count()
        self._new_nodes(values)

    def made(self, function: Any, result: Any, ruled: bool) -> None:
        """Account for what a torch function has just made."""
        if self._folding and function in _NORMALIZATIONS and isinstance(result, Tensor) and result.grad_fn is not None:
            self._normalizations[result.grad_fn] = self._places.described()
        for node in self._new_nodes(result):
            kind = node_kind(node)
            if not ruled and kind not in _ACCOUNTED:
                known = not isinstance(function, torch._ops.OpOverloadPacket | torch._ops.OpOverload)
                name = (known and getattr(function, "__qualname__", None)) or str(function)
                name = name.removeprefix("_VariableFunctionsClass.").removeprefix("TensorBase.")
                self._found[node] = Finding(
                    "no gradient" if kind in NO_GRADIENT_NODES else "function", name, self._places.described()
                )

    def _new_nodes(self, value: Any) -> list[Any]:
        """Those behind a value that the forward has made since they were asked for last.

        What is older was accounted for in an earlier forward, or was made between the two, outside of any.
        """
        found, stack = [], [tensor.grad_fn for tensor in tensors_in(value) if tensor.grad_fn is not None]
        while stack:
            node = stack.pop()
            if node in self._known:
                continue
            self._known.add(node)
            if node._sequence_nr() >= self._began:
                found.append(node)
            elif not self._is_between(node):
                continue
            stack.extend(parent for parent, _ in node.next_functions if parent is not None)
        return found

    def forget(self) -> None:
        """The forward is over: only what was found is kept, so that its graph can be freed."""
        self._known.clear()
        self._normalizations = {node: place for node, place in self._normalizations.items() if is_left(node)}
        self._ended = _count()

    def _is_between(self, node: Any) -> bool:
        """Whether a node was made after the forward before this one; remembered where its plain gradient is no rule's."""
        if not self._ended <= node._sequence_nr() < self._began:
            return False
        kind = node_kind(node)
        if self._ended and kind not in _ACCOUNTED and kind not in _IN_PROPORTION:
            self._found[node] = Finding("between", _operation(node), "the target, or a step of the model")
        return True

    def take(self, target: Tensor) -> list[Finding]:
        """What was found and the target depends on, from the inputs on; it is not reported any more."""
        found = (self._found.pop(node, None) for node in (_behind(target) if self._found else ()))
        return [finding for finding in found if finding is not None]

    def report(self, target: Tensor) -> None:
        """Warn, or raise, of what was found and the target depends on.

        Raises:
            UnruledOperationError: if there is any, and ``unruled`` is ``"error"``.
        """
        self._report_unfolded(target)
        by_kind: dict[str, dict[str, dict[str, None]]] = {}
        for finding in self.take(target):
            by_kind.setdefault(finding.kind, {}).setdefault(finding.operation, {})[finding.place] = None
        if not by_kind:
            return
        message = " ".join(_TOLD[kind].format(_listed(by_kind[kind])) for kind in _TOLD if kind in by_kind)
        if self._unruled == "error":
            raise UnruledOperationError(message)
        warnings.warn(message, UnruledOperationWarning, stacklevel=5)

    def _report_unfolded(self, target: Tensor) -> None:
        """Warn of normalisations that no layer has taken in, and that the target depends on."""
        known, self._normalizations = self._normalizations, {}
        left = {node: place for node, place in known.items() if is_left(node)}  # a later forward may have taken it in
        places = [left[node] for node in _behind(target) if node in left] if left else []
        if places:
            more = f" and {len(places) - 5} more" if len(places) > 5 else ""
            warnings.warn(
                f"not folded into a layer, though the composite's rules for layers ask for it: {', '.join(places[:5])}{more}. "
                "Batch normalisation is folded in evaluation mode where it follows a layer with nothing in between, or comes "
                "right before one; a concatenation may be between. Here it is an affine map of each channel, whose shift keeps "
                'its share as a bias does. Give "normalization" the rule "identity" if it is to hand all relevance on.',
                UnfoldedNormalizationWarning,
                stacklevel=6,
            )


def _count() -> int:
    """How many nodes autograd has made in this thread."""
    return int(torch._C._autograd._get_sequence_nr())


def _operation(node: Any) -> str:
    """What made a node: the class of a custom function, else the node's own name."""
    function = getattr(node, "_forward_cls", None)
    return str(node.name()).rpartition("::")[2] if function is None else str(function.__name__)


def _behind(target: Tensor) -> Iterator[Any]:
    """All nodes that a value depends on, from the inputs on."""
    seen: dict[Any, None] = {}
    stack = [] if target.grad_fn is None else [target.grad_fn]
    while stack:
        node = stack.pop()
        if node not in seen:
            seen[node] = None
            stack.extend(parent for parent, _ in node.next_functions if parent is not None)
    yield from reversed(seen)


def _listed(places: dict[str, dict[str, None]]) -> str:
    lines = []
    for operation, found in places.items():
        names = list(found)
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        lines.append(f"{operation} in {', '.join(names[:3])}{more}")
    return "; ".join(lines)
