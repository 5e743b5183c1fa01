"""Looking into Python functions of torch: what they call is seen by a mode."""

from types import FunctionType
from typing import Any


class Unchecked:
    """Copies of Python functions that are blind to overrides, made once for each.

    torch's Python functions first ask ``has_torch_function`` and then hand themselves to the mode, which would go on for ever.
    In the copy the body runs, and what it calls is seen.
    """

    def __init__(self) -> None:
        self._copies: dict[Any, FunctionType] = {}
        self._namespaces: dict[int, dict[str, Any]] = {}

    def of(self, function: Any) -> FunctionType:
        """The same function, blind to overrides."""
        copy = self._copies.get(function)
        if copy is None:
            assert isinstance(function, FunctionType)
            copy = self._copies[function] = _unchecked(function, self._namespaces)
        return copy


def _unchecked(function: FunctionType, cache: dict[int, dict[str, Any]]) -> FunctionType:
    namespace = cache.get(id(function.__globals__))
    if namespace is None:
        namespace = dict(function.__globals__)
        for name in ("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic"):
            if name in namespace:
                namespace[name] = lambda *_: False
        cache[id(function.__globals__)] = namespace
    copy = FunctionType(function.__code__, namespace, function.__name__, function.__defaults__, function.__closure__)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy
