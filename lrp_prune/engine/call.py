"""A call of a torch function inside the model's forward: what rules are given."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from lrp_prune.engine.operations import Operation
from lrp_prune.engine.origins import marked

if TYPE_CHECKING:
    from lrp_prune.engine.rule import Rule


class Call(NamedTuple):
    """One call of a torch function inside the model's forward. Parameters among the arguments are detached already."""

    function: Callable[..., Any]
    operation: Operation
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    kept: torch.dtype | None = None
    """The precision in which a rule may keep activations for the backward pass; None for their own."""
    name: str = ""
    """The canonical name of the module that runs; empty for the model itself."""
    module: nn.Module | None = None
    """The module that runs."""
    depth: int | None = None
    """How many layers (weights, or modules where there is none) have run an operation of this kind before this layer first
    did; None where no rule asks for it."""
    rule: "Rule | None" = None
    """What the composite has chosen for it."""
    absorbing: Callable[[Tensor], Tensor] | None = None
    """Makes a root of one, after a tensor's kind, for what is not the operand's but comes from a constant; None where such
    relevance is not asked for."""
    held: Callable[[Tensor], None] | None = None
    """Is told of an operand that a rule holds constant though it is an activation; None where nobody asks for it."""

    def run(self) -> Any:
        """Compute the operation as the model asked for it: the plain gradient."""
        return self.function(*self.args, **self.kwargs)

    def ruled(self) -> Any:
        """Compute it by its rule."""
        return self.run() if self.rule is None else self.rule(self)

    @property
    def weight(self) -> Tensor | None:
        """The values of the weight that it is about, if one of its operands is made of a parameter alone."""
        return next((value for value in self._constants() if marked(value) is not None), None)

    @property
    def parameter(self) -> str | None:
        """The canonical name of the parameter that its weight is, or is a part of."""
        origin = None if self.weight is None else marked(self.weight)
        return None if origin is None else origin.name

    def _constants(self) -> list[Tensor]:
        return [value for value in self.operands() if isinstance(value, Tensor) and not value.requires_grad]

    @property
    def bias(self) -> Tensor | None:
        """What a layer adds to each of its channels; None where it adds nothing, or something else."""
        place = self.operation.added
        added = None if place is None else self.argument(*place)
        return added if isinstance(added, Tensor) and added.dim() == 1 else None

    def argument(self, position: int, name: str) -> Any:
        """An argument's value, given by position or by name; None where the model left it out."""
        return self.args[position] if position < len(self.args) else self.kwargs.get(name)

    def operand(self, index: int) -> Any:
        """The operand's value; None where the model left it out."""
        return self.argument(*self.operation.operands[index])

    def operands(self) -> list[Any]:
        """All operands in the order of the operation."""
        return [self.operand(index) for index in range(len(self.operation.operands))]

    @property
    def has_activations(self) -> bool:
        """Whether any of its arguments is an activation, operand or not."""
        return any(map(is_activation, (*self.args, *self.kwargs.values())))

    def replacing(self, old: Tensor, new: Tensor) -> "Call":
        """The same call with one tensor in another's place."""
        args = tuple(new if value is old else value for value in self.args)
        return self._replace(
            args=args, kwargs={name: new if value is old else value for name, value in self.kwargs.items()}
        )

    def with_operands(self, values: Sequence[Any]) -> "Call":
        """The same call with other operands."""
        return self.with_arguments(dict(zip(self.operation.operands, values, strict=True)))

    def with_arguments(self, values: Mapping[tuple[int, str], Any]) -> "Call":
        """The same call with other values of some arguments (position and name), as far as they were given."""
        args, kwargs = list(self.args), dict(self.kwargs)
        for (position, name), value in values.items():
            if position < len(args):
                args[position] = value
            elif name in kwargs:
                kwargs[name] = value
        return self._replace(args=tuple(args), kwargs=kwargs)


def is_activation(value: Any) -> bool:
    """Whether relevance flows through the value: in the mode every parameter is detached, so what requires grad is one."""
    return isinstance(value, Tensor) and value.requires_grad and not isinstance(value, nn.Parameter)


def detached(value: Any) -> Any:
    """The tensor without its history; other values as they are."""
    return value.detach() if isinstance(value, Tensor) else value
