"""Roots: where relevance ends. Embedding outputs, float inputs, and what else enters as data.

Which parameters and constants are data follows from their use. What is joined with activations, concatenated or put into
some positions, is data like any input: class tokens, learned queries. What is added is data where it has two dimensions or
more (learned positions, tables made of sines); a parameter of one dimension is a bias, which absorbs relevance.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lrp_prune.engine import functional
from lrp_prune.engine.beside import beside
from lrp_prune.engine.constants import HUGE, Constants
from lrp_prune.engine.ids import Ids
from lrp_prune.engine.nested import tensors_in
from lrp_prune.engine.origins import marked, note_source, source_of
from lrp_prune.engine.rules import Call, is_activation
from lrp_prune.models.batches import fields, with_fields
from lrp_prune.names import layer_of

_ADDING = frozenset({"sum", "matmul"})
"""Kinds of operation that add what enters them; the others join."""
_SIGNS = {"add": 1, "add_": 1, "sub": -1, "sub_": -1, "subtract": -1, "subtract_": -1, "rsub": 0}
"""Sums in which a number may take part, and its sign there; 0 where the activation is subtracted from it."""


@dataclass
class Root:
    """One leaf of the graph.

    Args:
        name: what it is called.
        leaf: the tensor that requires grad.
        parameter: the parameter that it comes from, if any.
        ids: of an embedding those that were looked up.
        constant: whether it comes from no parameter and no input.
        latent: whether it is no root, but the output of a module that was asked for.
    """

    name: str
    leaf: Tensor
    parameter: str | None = None
    ids: Tensor | None = None
    constant: bool = False
    latent: bool = False

    def relevance(self, gradient: Tensor | None) -> Tensor:
        """The leaf times its gradient, and what rules give to entries that are zero."""
        relevance = torch.zeros_like(self.leaf) if gradient is None else self.leaf.detach() * gradient
        of_zeros = beside(self.leaf)
        return relevance if of_zeros is None else relevance + of_zeros


class Roots:
    """Makes the leaves that require grad, and remembers them in the order of the forward.

    Args:
        constants: names constants that enter as data; None: they are no roots.
        share: of float inputs and outputs of embeddings, with which the model goes on.
    """

    def __init__(self, constants: Constants | None = None, share: float = 1.0) -> None:
        self.entries: list[Root] = []
        self.recording = True
        self._constants, self._share = constants, share
        self.ids = Ids()
        self.biases: dict[str, list[Tensor]] | None = None
        """By module what it adds to activations that is no root and absorbs relevance; None where nobody asks for it."""

    def note_bias(self, call: Call) -> None:
        """A product with a weight is made, to which a bias may be added."""
        place = call.operation.added
        if self.biases is not None and place is not None and call.has_activations:
            self._note_bias(call.argument(*place), call.name)

    def _note_bias(self, value: Any, module: str) -> None:
        if self.biases is not None and isinstance(value, Tensor) and not value.requires_grad:
            self.biases.setdefault(module, []).append(value)

    def _scaled(self, leaf: Tensor) -> Tensor:
        return leaf if self._share == 1 else leaf * self._share

    def _record(self, root: Root) -> None:
        if self.recording:
            self.entries.append(root)

    def embedding(self, call: Call, own: bool) -> Any:
        """The rows that were looked up, as a root; integers carry no relevance, so it ends here.

        Args:
            call: the lookup.
            own: whether the table is a parameter of the module that runs.
        """
        rows = call.run()
        # An embedding bag returns more than its sums of rows.
        looked_up = rows[0] if isinstance(rows, tuple) else rows
        table = call.operand(0)
        if is_activation(looked_up) or not looked_up.is_floating_point():
            return rows
        origin = marked(table)
        named = None if origin is None else layer_of(origin.name)
        if named is None and self._constants is not None:
            named = self._constants.name_of(table, call.name)
        leaf = self._scaled(looked_up.detach()).requires_grad_()
        root = Root((call.name if own else "") or named or f"{call.name or 'model'}.constant", leaf)
        if origin is not None:
            root.parameter, root.ids = origin.name, None if isinstance(rows, tuple) else call.operand(1)
        self._record(root)
        return (leaf.clone(), *rows[1:]) if isinstance(rows, tuple) else leaf.clone()

    def with_data(self, call: Call, written: bool = False) -> Call:
        """The call of an operation that activations enter, with what else enters as data as roots.

        Args:
            call: the call.
            written: whether it writes into its first operand, which stays what it is.
        """
        places = call.operation.data
        values = [call.argument(*place) for place in places]
        if self.absorbs(call):
            return self._with_number(call, values)
        if not any(map(_may_be_data, values)) or not any(map(is_activation, tensors_in((values, call.operands())))):
            return call
        joined = call.operation.kind not in _ADDING
        if written:
            if isinstance(values[0], Tensor) and not values[0].requires_grad:
                self._adopt(values[0], call.name, joined)
            places, values = places[1:], values[1:]
        active = next(value for value in tensors_in((values, call.operands())) if is_activation(value))
        made = [self._data(value, call.name, joined, active.dtype) for value in values]
        if all(new is old for new, old in zip(made, values, strict=True)):
            return call
        return call.with_arguments(dict(zip(places, made, strict=True)))

    def absorbs(self, call: Call) -> bool:
        """Whether a number is added to an activation, or that is subtracted from it, and may have relevance of its own."""
        if self._constants is None or not self._constants.absorbing or call.function.__name__ not in _SIGNS:
            return False
        x, number = call.operands()
        return isinstance(number, int | float) and number != 0 and abs(number) < HUGE and is_activation(x)

    def _with_number(self, call: Call, values: list[Any]) -> Call:
        """The call of a sum with a number, which stays what it is: its relevance is told by the gradient of the activation."""
        (x, number), alpha = values, call.kwargs.get("alpha", 1)
        sign = _SIGNS[call.function.__name__]
        leaf = torch.full((), number, dtype=x.dtype, device=x.device).requires_grad_()
        self._record(Root(f"{call.name or 'model'}.constant", leaf, constant=True))
        return call.with_operands([functional.beside_constant(x, leaf, sign * alpha if sign else -1 / alpha), number])

    @property
    def absorbing(self) -> Callable[..., Tensor] | None:
        """Makes a root of one for what is not an operand's, but comes from a constant; None where that is not asked for."""
        return self._one if self._constants is not None and self._constants.absorbing else None

    def _one(self, like: Tensor, module: str) -> Tensor:
        leaf = torch.ones((), dtype=like.dtype, device=like.device).requires_grad_()
        self._record(Root(f"{module or 'model'}.constant", leaf, constant=True))
        return leaf

    def _adopt(self, target: Tensor, module: str, joined: bool) -> None:
        """Let a constant that activations are written into be a root; what is overwritten gets no relevance."""
        whole = target if target._base is None else target._base
        if self._constants is None or not whole.is_floating_point() or isinstance(whole, nn.Parameter):
            return
        root = self._root_of(whole, module, joined)
        if root is not None:
            root.leaf = whole.detach().clone().requires_grad_()
            self._record(root)
            whole.copy_(root.leaf)
            # A view hears of it when it is asked; until then autograd takes it for a leaf, which nothing may be written into.
            _ = target.grad_fn

    def written(self, target: Any, value: Any) -> None:
        """A constant was written into another one, which is then made of what it was made of."""
        origin = source_of(value) if isinstance(value, Tensor) else None
        if self._constants is not None and origin is not None and isinstance(target, Tensor):
            note_source(target if target._base is None else target._base, origin)

    def _data(self, value: Any, module: str, joined: bool, dtype: torch.dtype) -> Any:
        if isinstance(value, tuple | list):
            entries = [self._data(entry, module, joined, dtype) for entry in value]
            same = all(new is old for new, old in zip(entries, value, strict=True))
            return value if same else type(value)(entries)
        if not isinstance(value, Tensor) or value.requires_grad:
            return value
        if not value.is_floating_point():
            if joined or value.is_complex() or self._constants is None or not self._constants.absorbing:
                return value
            value = value.to(dtype)  # as it will be for the sum
        root = self._root_of(value, module, joined)
        if root is None:
            if not joined and value.dim() and sum(size > 1 for size in value.shape) < 2:
                self._note_bias(value, module)
            return value
        # A copy: of a sharded model the parameter itself is gone when its relevance is read.
        root.leaf = value.detach().clone().requires_grad_()
        self._record(root)
        return root.leaf

    def _root_of(self, value: Tensor, module: str, joined: bool) -> Root | None:
        """The root that a parameter or constant is, if it is data."""
        origin = source_of(value)
        if origin is not None:
            return Root(origin.name, value, origin.name) if joined or len(origin.parameter.size) > 1 else None
        name = None if self._constants is None else self._constants.data(value, module, 0 if joined else 2)
        return None if name is None else Root(name, value, constant=True)

    def inputs(self, value: Any, name: str, adopt: bool) -> Any:
        """The argument of a model with each float tensor as a root.

        Args:
            value: a tensor, or any nesting of mappings, lists, tuples and objects with tensors as attributes.
            name: what the roots are called.
            adopt: also take over tensors that already require grad (they are activations otherwise).
        """
        if isinstance(value, Tensor):
            self.ids.enter(value)
            if not value.is_floating_point() or value.dim() == 0 or (value.requires_grad and not adopt):
                return value
            # What was made in inference mode, as batches of a validation are, cannot require grad; a copy can.
            leaf = self._scaled(value.clone() if value.is_inference() else value.detach()).requires_grad_()
            self._record(Root(name, leaf))
            return _copied(leaf)
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


def _copied(leaf: Tensor) -> Tensor:
    """A copy that lies in memory as the tensor does, as the last bit of what is computed of it depends on that."""
    copy = leaf.clone()
    if copy.stride() == leaf.stride() or 0 in leaf.stride():
        return copy
    return torch.empty_strided(leaf.shape, leaf.stride(), dtype=leaf.dtype, device=leaf.device).copy_(leaf)


def _may_be_data(value: Any) -> bool:
    """Whether the argument is, or holds, a constant."""
    if isinstance(value, Tensor):
        return not value.requires_grad
    return isinstance(value, tuple | list) and any(map(_may_be_data, value))


def _rebuilt(original: Mapping[Any, Any], entries: dict[Any, Any]) -> Any:
    """A mapping of the same class (``BatchEncoding``, ...) where it can be made from a dict, else a plain one."""
    try:
        return type(original)(entries)  # type: ignore[call-arg]  # not every Mapping takes one
    except TypeError:
        return entries
