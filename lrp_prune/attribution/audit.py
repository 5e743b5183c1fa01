"""The audit: operations that relevance went through without a rule.

A mode sees torch functions, but neither the inside of ``torch.jit`` code nor of a custom ``autograd.Function``. Their
autograd nodes it does see. So for one forward, every node is accounted for: it was made by a rule, or is linear in its
input, or is reported with the module that made it.
"""

import warnings
from typing import Any

from torch import Tensor, nn

from lrp_prune.attribution.operations import LINEAR_NODES, node_kind

# What a sharded model puts around its modules: the identity, which tells when a backward pass comes by.
_IDENTITIES = frozenset({"RegisterPostBackwardFunction", "RegisterPreBackwardFunction", "_Leaving"})
_ACCOUNTED = LINEAR_NODES | _IDENTITIES


class UnruledOperationWarning(UserWarning):
    """A nonlinear operation has no rule: its plain gradient was used, and relevance through it is not LRP."""


class UnruledOperationError(RuntimeError):
    """A nonlinear operation has no rule, and ``unruled="error"`` was asked for."""


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        return [tensor for entry in value.values() for tensor in _tensors(entry)]
    if isinstance(value, tuple | list):
        return [tensor for entry in value for tensor in _tensors(entry)]
    return []


class Audit:
    """Accounts for each autograd node of one forward.

    Nodes are kept alive until :meth:`report`, so that their identities stay unique.
    """

    def __init__(self) -> None:
        self._known: set[Any] = set()
        self._found: dict[tuple[str, str], None] = {}
        self._pending: list[str] = []

    def visit(self, function: Any, result: Any, ruled: bool) -> None:
        """Account for the nodes that a torch function has just made."""
        for node in self._new_nodes(result):
            if not ruled and node_kind(node) not in _ACCOUNTED:
                name = getattr(function, "__qualname__", None) or str(function)
                self._pending.append(name.removeprefix("_VariableFunctionsClass."))

    def leave(self, module_name: str, module: nn.Module, output: Any) -> None:
        """Account for what a module made out of the mode's sight, and name the module for what was found inside it."""
        for node in self._new_nodes(output):
            if node_kind(node) not in _ACCOUNTED:
                self._pending.append(node.name())
        place = f"{module_name or '<model>'} ({type(module).__name__})"
        for operation in self._pending:
            self._found[operation, place] = None
        self._pending.clear()

    def _new_nodes(self, value: Any) -> list[Any]:
        found, stack = [], [tensor.grad_fn for tensor in _tensors(value) if tensor.grad_fn is not None]
        while stack:
            node = stack.pop()
            if node in self._known:
                continue
            self._known.add(node)
            found.append(node)
            stack.extend(parent for parent, _ in node.next_functions if parent is not None)
        return found

    def report(self, unruled: str) -> None:
        """Warn, or raise, if something was found; forget the nodes.

        Raises:
            UnruledOperationError: if something was found and ``unruled`` is ``"error"``.
        """
        self._known.clear()
        if not self._found:
            return
        by_operation: dict[str, list[str]] = {}
        for operation, place in self._found:
            by_operation.setdefault(operation, []).append(place)
        lines = [
            f"{operation} in {', '.join(places[:3])}{f' and {len(places) - 3} more' if len(places) > 3 else ''}"
            for operation, places in by_operation.items()
        ]
        self._found.clear()
        message = (
            f"no rule for: {'; '.join(lines)}. Its plain gradient is used, so relevance through it is not LRP. "
            "Add one with lrp_prune.attribution.register_rule(function, rule)."
        )
        if unruled == "error":
            raise UnruledOperationError(message)
        warnings.warn(message, UnruledOperationWarning, stacklevel=4)
