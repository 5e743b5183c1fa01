"""What a condition is: an object with a name that looks at one module of a model and says where something is under way."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

_KNOWN: dict[str, type["Condition"]] = {}


class Condition(ABC):
    """Where a correction acts: decided anew in each forward, from what one module of the model gets and gives.

    It has no memory of calls before, so that it is the same for a whole text and for one token after the other with a cache, for
    any order of samples in a batch, and in every process. Whatever it needs to know has to be in what the module sees.

    To make one of your own, derive from this and give it a ``name``; instances that are not made from plain values and tensors
    also need :meth:`options` and :meth:`tensors`, which are saved with a patch and are the arguments that it is made with again.

    Attributes:
        name: by which saved patches know it; one class has it.
        at: canonical name of the module that is looked at. Layers that are corrected must come after it.

    Example:
        >>> class Positive(Condition):
        ...     name = "positive"
        ...     def __init__(self, at):
        ...         self.at = at
        ...     def holds(self, inputs, output):
        ...         return output.sum(-1) > 0
        ...     def options(self):
        ...         return {"at": self.at}
        >>> Positive("mlp").holds((), torch.tensor([[1.0, 2.0], [-1.0, 0.0]]))
        tensor([ True, False])
        >>> restored(Positive("mlp").state()) == Positive("mlp")
        True
    """

    name: ClassVar[str]
    at: str

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        name = cls.__dict__.get("name")
        if not isinstance(name, str) or not name:
            raise TypeError(f"the condition {cls.__name__} needs a name of its own, as in name = 'positive'")
        known = _KNOWN.get(name)
        if known is not None and (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
            raise TypeError(f"there is a condition {name!r} already, {known.__qualname__} of {known.__module__}")
        _KNOWN[name] = cls

    @abstractmethod
    def holds(self, inputs: tuple[Any, ...], output: Any) -> Tensor:
        """Where the correction acts in this call.

        Args:
            inputs: positional arguments of the module.
            output: what it returned.

        Returns:
            Bool ``[samples]`` for whole samples, or ``[samples, tokens]`` for each token.
        """

    def options(self) -> dict[str, Any]:
        """Plain values that it is made with again."""
        return {}

    def tensors(self) -> dict[str, Tensor]:
        """Tensors that it is made with again."""
        return {}

    def state(self) -> dict[str, Any]:
        """Name, plain values and tensors, for a file or a checkpoint."""
        return {"name": self.name, "options": self.options(), "tensors": self.tensors()}

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Condition):
            return NotImplemented
        mine, theirs = self.tensors(), other.tensors()
        return (
            self.name == other.name
            and self.options() == other.options()
            and mine.keys() == theirs.keys()
            and all(torch.equal(tensor.cpu(), theirs[key].cpu()) for key, tensor in mine.items())
        )

    __hash__ = None  # type: ignore[assignment]  # as of anything that compares by value

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{key}={value!r}' for key, value in self.options().items())})"


def restored(state: Mapping[str, Any]) -> Condition:
    """The condition that :meth:`Condition.state` describes; nothing is imported or executed for it.

    Raises:
        ValueError: if no class of that name is defined, or it cannot be made of what was saved.
    """
    name = state["name"]
    if name not in _KNOWN:
        raise ValueError(
            f"the patch acts under a condition {name!r}, which is none of {sorted(_KNOWN)}: import the module that defines "
            "it first"
        )
    try:
        return _KNOWN[name](**state["options"], **state["tensors"])
    except TypeError as error:
        raise ValueError(f"the condition {name!r} cannot be made again from what was saved: {error}") from error


def first_tensor(output: Any) -> Tensor:
    """The tensor that a module returns, the first of several.

    Raises:
        ValueError: if there is none.
    """
    while isinstance(output, tuple | list) and output:
        output = output[0]
    if not isinstance(output, Tensor):
        raise ValueError(f"a condition looks at a module that returns a tensor, got {type(output).__name__}")
    return output
