"""Hooks on parameters and optimizers that hold some entries of parameters through a training: put on and taken off together."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle


class Hooks:
    """Hooks that are taken off together.

    They belong to tensors and optimizers of this process: a copy, or what is read from a file, has none of them.

    Example:
        >>> import torch
        >>> layer = nn.Linear(2, 1)
        >>> def zero(parameter: Tensor) -> None:
        ...     parameter.grad.zero_()
        >>> hooks = Hooks()
        >>> hooks.on_gradient(layer.bias, zero)
        >>> layer(torch.ones(1, 2)).sum().backward()
        >>> layer.weight.grad, layer.bias.grad, len(hooks)
        (tensor([[1., 1.]]), tensor([0.]), 1)
        >>> hooks.clear()
    """

    def __init__(self) -> None:
        self._handles: list[RemovableHandle] = []

    def __len__(self) -> int:
        return len(self._handles)

    def on_gradient(self, parameter: nn.Parameter, hook: Callable[[Tensor], None]) -> None:
        """Call ``hook(parameter)`` once its gradient is accumulated; of a frozen parameter, once it is unfrozen."""
        if not (parameter.is_floating_point() or parameter.is_complex()):
            return  # it can have no gradient
        # A frozen parameter takes no hook.
        requires_grad = parameter.requires_grad
        parameter.requires_grad_(True)
        self._handles.append(parameter.register_post_accumulate_grad_hook(hook))  # type: ignore[no-untyped-call]  # torch's
        parameter.requires_grad_(requires_grad)

    def on_step(
        self,
        optimizer: Optimizer,
        after: Callable[[Optimizer, Any, Any], None],
        before: Callable[[Optimizer, Any, Any], Any] | None = None,
        loaded: Callable[[Optimizer], None] | None = None,
    ) -> None:
        """Call these before and after each step, and when the optimizer has loaded a state."""
        self._handles.append(optimizer.register_step_post_hook(after))
        if before is not None:
            self._handles.append(optimizer.register_step_pre_hook(before))
        if loaded is not None:
            self._handles.append(optimizer.register_load_state_dict_post_hook(loaded))

    def clear(self) -> None:
        """Take all of them off."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def __getstate__(self) -> dict[str, Any]:
        return {"_handles": []}


def check_optimizers(optimizers: Iterable[Optimizer], kept: str) -> None:
    """Refuse an object that has no hooks for its steps, since its updates cannot be followed.

    Args:
        optimizers: what is to be watched.
        kept: what for, in words.

    Raises:
        TypeError: for such an object.
    """
    for optimizer in optimizers:
        if not hasattr(optimizer, "register_step_post_hook"):
            raise TypeError(
                f"{type(optimizer).__name__} has no register_step_post_hook, so {kept} through its steps: derive it from "
                "torch.optim.Optimizer"
            )


def owned_by(optimizer: Optimizer, parameters: Iterable[nn.Parameter]) -> Iterator[bool]:
    """Whether each of some parameters is one that an optimizer steps."""
    owned = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    return (id(parameter) in owned for parameter in parameters)
