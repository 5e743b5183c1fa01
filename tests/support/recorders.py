"""Batches of many types, and forwards that remember what they were given."""

import dataclasses
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

X, Y = torch.arange(6.0).view(3, 2), torch.tensor([0, 2, 1])


class Fields(NamedTuple):
    x: Tensor
    y: Tensor


@dataclasses.dataclass(frozen=True)
class Record:
    x: Tensor
    y: Tensor
    name: str = "record"


class Attributes:
    """An object whose tensors are its attributes."""

    def __init__(self) -> None:
        self.x, self.y, self._private = X, Y, "kept"


class Graph:
    """As PyTorch Geometric has them: tensors in a store of its own."""

    def __init__(self, **store: Any) -> None:
        self.__dict__["_store"] = store

    def keys(self) -> list[str]:
        return list(self._store)

    def __getitem__(self, name: str) -> Any:
        return self._store[name]

    def __getattr__(self, name: str) -> Any:
        try:
            return self.__dict__["_store"][name]
        except KeyError as error:
            raise AttributeError(name) from error

    def __copy__(self) -> "Graph":
        return Graph(**self._store)

    def __iter__(self) -> Any:
        return iter(self._store.items())

    def __setitem__(self, name: str, value: Any) -> None:
        self._store[name] = value


class Recorder(nn.Module):
    """Records what it is called with; its answer depends on it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 3)
        self.given: Any = None

    def say(self, x: Tensor, *given: Any) -> Tensor:
        self.given = given
        result: Tensor = self.layer(x)
        return result


class Named(Recorder):
    def forward(self, x: Tensor) -> Tensor:
        return self.say(x)
