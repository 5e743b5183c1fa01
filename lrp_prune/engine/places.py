"""Places: which module runs, by its canonical name."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn

from lrp_prune.names import canonical_name, class_name, unwrap


class Places:
    """The modules that run, from the outermost to the innermost.

    A module that is held in several places, as an embedding that encoder and decoder share, has the name under which the
    module that calls it holds it.

    Args:
        model: names are relative to it.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = unwrap(model)
        self._names: dict[int, list[str]] = {}
        self._running: list[tuple[str, nn.Module]] = []

    @property
    def innermost(self) -> tuple[str, nn.Module]:
        """The name and the innermost module itself; the model where none is followed."""
        return self._running[-1] if self._running else ("", self._model)

    @property
    def name(self) -> str:
        """The innermost module's name; empty for the model itself, and where none runs."""
        return self._running[-1][0] if self._running else ""

    @property
    def module(self) -> nn.Module:
        """The innermost module."""
        return self._running[-1][1] if self._running else self._model

    def described(self) -> str:
        """The innermost module's name and class; of all that is known where modules are not followed, the model's."""
        if not self._names:
            return f"a module of {class_name(self._model)}"
        return f"{self.name or '<model>'} ({class_name(self.module)})"

    @contextmanager
    def following(self, before: Callable[[Any], None], after: Callable[[Any], None]) -> Iterator[None]:
        """Follow the calls of all modules inside, and show what they get and return.

        Outside of this the model itself is taken for the module that runs: it takes two hooks for each module.

        Args:
            before: called with the arguments of a module, while its caller is the innermost.
            after: called with the output of a module, while it is the innermost.
        """

        def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
            before((args, kwargs))
            self._running.append((self._name_of(module), module))

        def leave(module: nn.Module, args: Any, output: Any) -> None:
            if output is not None:  # else it has failed
                after(output)
            # A module that failed before it was seen, in a hook of somebody else's, was never entered.
            if self._running and self._running[-1][1] is module:
                self._running.pop()

        for name, module in self._model.named_modules(remove_duplicate=False):
            self._names.setdefault(id(module), []).append(canonical_name(name))
        with ExitStack() as stack:
            for module in self._model.modules():
                stack.callback(module.register_forward_pre_hook(enter, with_kwargs=True).remove)
                stack.callback(module.register_forward_hook(leave, always_call=True).remove)
            yield

    def _name_of(self, module: nn.Module) -> str:
        names = self._names.get(id(module), [""])
        return names[0] if len(names) == 1 else max(names, key=lambda name: _shared(name, self.name))


def _shared(name: str, other: str) -> int:
    """How many segments two names have in common at their beginning."""
    count = 0
    for one, two in zip(name.split("."), other.split("."), strict=False):
        if one != two:
            break
        count += 1
    return count
