"""Single entries that stay at their values through any training."""

from collections.abc import Iterable, Sequence
from itertools import compress
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from lrp_prune.correction.entries import locate
from lrp_prune.training.hooks import Hooks, check_optimizers, owned_by


class Frozen:
    """Holds entries of parameters fixed while everything else trains.

    - **In each backward** their gradient is zeroed as soon as it is accumulated: before it is clipped, before DDP
      reduces it, and in manual optimization. Left in, it would inflate the norm that clipping divides by. Sparse
      gradients are left as they are.
    - **After each step** of an attached optimizer the values are written again: weight decay, momentum from before, and
      updates that mix entries would change them. A few thousand entries cost nothing beside a step.

    Example:
        >>> import torch
        >>> model = nn.Linear(2, 1, bias=False)
        >>> optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        >>> frozen = Frozen()
        >>> frozen.set([(model.weight, torch.tensor([0]), torch.tensor([0.5]))])
        >>> frozen.attach([optimizer])
        >>> model(torch.ones(1, 2)).sum().backward()
        >>> optimizer.step()
        >>> model.weight[0, 0].item(), model.weight.grad[0].tolist()
        (0.5, [0.0, 1.0])
        >>> frozen.clear()
    """

    def __init__(self) -> None:
        self._entries: list[tuple[nn.Parameter, Tensor, Tensor]] = []
        self._gradient_hooks, self._step_hooks = Hooks(), Hooks()

    def set(self, entries: Sequence[tuple[nn.Parameter, Tensor, Tensor]]) -> None:
        """Hold these and no others: parameter, flat positions, values. Gradients that exist are zeroed there."""
        self._gradient_hooks.clear()
        self._entries = list(entries)
        for parameter, positions, _ in self._entries:
            hook = _GradientZero(positions)
            hook(parameter)
            self._gradient_hooks.on_gradient(parameter, hook)

    def attach(self, optimizers: Iterable[Optimizer]) -> None:
        """Watch the steps of these optimizers, and of no others.

        Raises:
            TypeError: for an object that has no hooks for its steps.
        """
        optimizers = list(optimizers)
        check_optimizers(optimizers, "corrected entries cannot be kept")
        self._step_hooks.clear()
        for optimizer in optimizers:
            self._step_hooks.on_step(optimizer, self._after_step)

    def clear(self) -> None:
        """Let everything train again."""
        self.set(())
        self.attach(())

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        owned = owned_by(optimizer, (parameter for parameter, _, _ in self._entries))
        for parameter, positions, values in compress(self._entries, owned):
            locate(parameter, positions).write_(values)

    def __getstate__(self) -> dict[str, Any]:
        # A copy of the model gets its own by set and attach.
        return {"_entries": [], "_gradient_hooks": Hooks(), "_step_hooks": Hooks()}


class _GradientZero:
    """Zeroes the gradient at some positions, which move to its device once."""

    def __init__(self, positions: Tensor) -> None:
        self._positions = positions

    def __call__(self, parameter: Tensor) -> None:
        gradient = parameter.grad
        if gradient is not None and not gradient.is_sparse:
            self._positions = self._positions.to(gradient.device)
            locate(gradient, self._positions).fill_(0.0)
