"""Roots: where relevance ends. Embedding outputs, float inputs, and parameters that enter as data."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lrp_prune.attribution.origins import Origin, marked
from lrp_prune.attribution.rules import Call, is_activation
from lrp_prune.models.batches import fields, with_fields


@dataclass
class Root:
    """One leaf of the graph: its name, the leaf, and for an embedding the ids that were looked up."""

    name: str
    leaf: Tensor
    parameter: str | None = None
    ids: Tensor | None = None


class Roots:
    """Makes the leaves that require grad, and remembers them in the order of the forward."""

    def __init__(self) -> None:
        self.entries: list[Root] = []
        self.recording = True

    def _record(self, root: Root) -> None:
        if self.recording:
            self.entries.append(root)

    def embedding(self, call: Call, origin: Origin | None) -> Any:
        """The rows that were looked up, as a root; integers carry no relevance, so it ends here."""
        rows = call.run()
        if origin is None or is_activation(rows):
            return rows
        leaf = rows.detach().requires_grad_()
        self._record(Root(origin.name.removesuffix(".weight"), leaf, origin.name, call.operand(1)))
        return leaf.clone()

    def with_data_roots(self, call: Call) -> Call:
        """The call of a sum or concatenation, with parameters that are added to activations as roots.

        Class tokens, learned positions and queries are data like any input. A bias (one dimension) is none: it absorbs.
        """
        tensors = [entry for arg in call.args for entry in (arg if isinstance(arg, tuple | list) else (arg,))]
        if not any(map(is_activation, tensors)):
            return call

        def convert(value: Any) -> Any:
            if isinstance(value, tuple | list):
                return type(value)(map(convert, value))
            origin = marked(value) if isinstance(value, Tensor) and not value.requires_grad else None
            if origin is None or len(origin.parameter.size) < 2 or (origin.layout is None and origin.arithmetic):
                return value
            # A copy: of a sharded model the parameter itself is gone when its relevance is read.
            leaf = value.detach().clone().requires_grad_()
            self._record(Root(origin.name, leaf, origin.name))
            return leaf

        return call._replace(args=tuple(map(convert, call.args)))

    def inputs(self, value: Any, name: str, adopt: bool) -> Any:
        """The argument of a model with each float tensor as a root.

        Args:
            value: a tensor, or any nesting of mappings, lists, tuples and objects with tensors as attributes.
            name: what the roots are called.
            adopt: also take over tensors that already require grad (they are activations otherwise).
        """
        if isinstance(value, Tensor):
            if not value.is_floating_point() or value.dim() == 0 or (value.requires_grad and not adopt):
                return value
            leaf = value.detach().requires_grad_()
            self._record(Root(name, leaf))
            return leaf.clone()
        if isinstance(value, Mapping) and type(value).__module__ != "transformers.cache_utils":
            converted = {
                key: self.inputs(entry, f"{name}.{key}" if name else str(key), adopt) for key, entry in value.items()
            }
            return converted if type(value) is dict else _rebuilt(value, converted)
        if isinstance(value, list | tuple) and not isinstance(value, torch.Size):
            entries = [self.inputs(entry, f"{name}.{index}", adopt) for index, entry in enumerate(value)]
            return type(value)(*entries) if hasattr(value, "_fields") else type(value)(entries)
        named = None if type(value).__module__ == "transformers.cache_utils" else fields(value)
        if named:
            return with_fields(value, {key: self.inputs(entry, f"{name}.{key}", adopt) for key, entry in named.items()})
        return value

    def take(self) -> list[Root]:
        """The roots so far; the next forward starts anew."""
        entries, self.entries = self.entries, []
        return entries


def _rebuilt(original: Mapping[Any, Any], entries: dict[Any, Any]) -> Any:
    """A mapping of the same class (``BatchEncoding``, ...) where it can be made from a dict, else a plain one."""
    try:
        return type(original)(entries)  # type: ignore[call-arg]  # not every Mapping takes one
    except TypeError:
        return entries
