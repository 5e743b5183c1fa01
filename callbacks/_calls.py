"""The calls of a model that a training step makes, with what they gave."""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lrp_prune.models.outputs import logits_in
from lrp_prune.models.padding import attended_labels


@dataclass
class Seen:
    """A call of a module.

    Args:
        module: that was called.
        args, kwargs: what with.
        inside: the call that it was made in, if that is one of a watched module as well.
        trains: whether a gradient can go through it.
        output: what it gave.
    """

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    inside: "Seen | None"
    trains: bool
    output: Any = None
    taken: bool = field(default=False, init=False)

    @property
    def logits(self) -> Tensor | None:
        """The logits, where they can be trained on."""
        found = logits_in(self.output) if self.trains else None
        return found if found is not None and found.is_floating_point() and found.requires_grad else None

    def counted(self) -> Tensor | None:
        """Which tokens of the logits are no padding; None where the call does not say."""
        try:
            bound = inspect.signature(self.module.forward).bind(*self.args, **self.kwargs).arguments
        except (TypeError, ValueError):
            return None
        for name in [name for name, value in bound.items() if isinstance(value, dict)]:
            bound.update(bound.pop(name))
        return attended_labels(self.module, bound) if bound else None


@contextmanager
def watching(modules: Sequence[nn.Module]) -> Iterator[list[Seen]]:
    """Yields a list that the calls of these modules are noted in, in the order in which they begin."""
    calls: list[Seen] = []
    running: list[Seen] = []

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        call = Seen(module, args, kwargs, running[-1] if running else None, torch.is_grad_enabled())
        calls.append(call)
        running.append(call)

    def after(_: nn.Module, __: Any, output: Any) -> None:
        running.pop().output = output

    with ExitStack() as stack:
        for module in modules:
            stack.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
            stack.callback(module.register_forward_hook(after, prepend=True).remove)
        yield calls


def outermost(calls: Sequence[Seen]) -> list[Seen]:
    """Of calls that have logits to train on those that are in no other such call."""
    found = []
    for call in calls:
        around = call.inside
        while around is not None and not around.taken:
            around = around.inside
        if around is None and call.logits is not None:
            call.taken = True
            found.append(call)
    return found
