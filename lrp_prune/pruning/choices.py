"""What a forward chooses by its activations, made again in another one: experts that a router sends tokens to, say.

Behind a pruned layer a router sends some tokens to other experts, and what an expert gives then is no pair of what it gave. With
the dense model's choices each expert sees the same tokens, as they are behind the pruned layers.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_CHOOSING = {torch.topk: "topk", Tensor.topk: "topk", torch.argmax: "argmax", Tensor.argmax: "argmax"}


class Choices(TorchFunctionMode):
    """While it is entered, the places of the largest values are those of another forward, one call after the other.

    Args:
        made: the places that the other forward chose; None to note them in :attr:`made`.
    """

    def __init__(self, made: list[Tensor] | None = None) -> None:
        super().__init__()
        self.made: list[Tensor] = []
        self._given = None if made is None else iter(made)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        kind = _CHOOSING.get(func)
        values = None if kind is None else args[0] if args else (kwargs or {}).get("input")
        if not isinstance(values, Tensor) or not values.is_floating_point():
            return result
        found: Tensor = result if kind == "argmax" else result[1]
        if self._given is None:
            self.made.append(found.detach())
            return result
        other = next(self._given, None)
        if other is None or other.shape != found.shape:
            self._given = iter(())  # it runs otherwise from here on
            return result
        if kind == "argmax":
            return other
        dim = args[2] if len(args) > 2 else (kwargs or {}).get("dim", -1)
        return torch.return_types.topk((values.gather(dim, other), other))
