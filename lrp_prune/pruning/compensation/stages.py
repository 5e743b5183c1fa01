"""Stages: the parts of a model that run one after the other, found by what repeats, and run one at a time.

A stage is one of the repeated modules that a model is made of (a transformer layer, a residual block), or a layer outside of
them. While one is worked at, those before it give what they gave, without being computed again, so that going through a model
costs a few times running it; what the model does between its stages (masks, positions, a change of shape) is its own code, run as
it is.
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from lrp_prune.names import named_modules

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


class StageReached(Exception):  # noqa: N818  # no error: what follows in the model is not needed
    """Leaves a forward, as the stage has been run."""


def stages_of(module: nn.Module, weights: Mapping[str, nn.Parameter]) -> dict[str, nn.Module]:
    """The modules that are worked at one after the other, in the order in which they are registered.

    Each of the weights is in one of them at most. One of several modules of a class in one container is a stage (the outermost
    where they are nested), and so is a module that has a weight itself.

    Args:
        module: the model.
        weights: what has to be in some stage.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
        >>> list(stages_of(model, dict(model.named_parameters())))
        ['0', '2']
    """
    wanted = {id(weight) for weight in weights.values()}
    names = {id(entry): name for name, entry in named_modules(module).items()}
    found: dict[str, nn.Module] = {}

    def visit(entry: nn.Module, repeats: bool) -> None:
        if not any(id(parameter) in wanted for parameter in entry.parameters()):
            return
        own = any(id(parameter) in wanted for parameter in entry.parameters(recurse=False))
        if id(entry) in names and (own or (repeats and not isinstance(entry, _CONTAINERS))):
            found[names[id(entry)]] = entry
            return
        classes = Counter(type(child) for child in entry.children())
        for child in entry.children():
            visit(child, isinstance(entry, _CONTAINERS) and classes[type(child)] > 1)

    visit(module, False)
    return found


class Given:
    """What stages gave, batch by batch, to be given again in their place.

    Args:
        stages: all, in the order of execution.
        needed: for each stage those whose outputs it is made of, see :meth:`Watched.made_of`.
        keep_on: where outputs are kept.
    """

    def __init__(
        self, stages: Mapping[str, nn.Module], needed: Mapping[str, Collection[str]], keep_on: torch.device | str
    ) -> None:
        self._stages, self._keep_on = stages, keep_on
        order = list(stages)
        self._last = {
            name: max((order.index(user) for user in order if name in needed[user]), default=-1) for name in order
        }
        self._outputs: dict[str, list[Any]] = {}

    def keep(self, name: str, outputs: list[Any]) -> None:
        """Remember what a stage gave to each batch, and forget what no later stage is made of."""
        self._outputs[name] = outputs
        now = list(self._stages).index(name)
        for earlier, last in self._last.items():
            if last <= now and earlier in self._outputs and (earlier != name or last < 0):
                self._outputs[earlier] = [tree_map_only(Tensor, _nothing, entry) for entry in self._outputs[earlier]]

    def taken(self, output: Any) -> Any:
        """A copy of what a stage gives, as it is kept."""
        return tree_map_only(Tensor, lambda tensor: tensor.detach().to(self._keep_on, copy=True), output)

    @contextmanager
    def standing_in(self, batch: int, device: torch.device) -> Iterator[None]:
        """While it lasts, stages that are done give what they gave to this batch."""
        with ExitStack() as stack:
            for name, outputs in self._outputs.items():
                stack.enter_context(_forward(self._stages[name], _giving(outputs[batch], device)))
            yield


def _nothing(tensor: Tensor) -> Tensor:
    """As large, and of no memory; what is computed from it is not a number."""
    blank = float("nan") if tensor.is_floating_point() else 0
    return torch.full((), blank, dtype=tensor.dtype, device=tensor.device).expand(tensor.shape)


def _giving(output: Any, device: torch.device) -> Callable[..., Any]:
    def forward(*_: Any, **__: Any) -> Any:
        return tree_map_only(Tensor, lambda tensor: _active(tensor.to(device)), output)

    return forward


def _active(tensor: Tensor) -> Tensor:
    """A tensor that counts as computed from the model's inputs."""
    return tensor.detach().requires_grad_() if tensor.is_floating_point() else tensor


@contextmanager
def _forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    before = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before


@contextmanager
def leaving_after(stage: nn.Module, told: Callable[[Any], None]) -> Iterator[None]:
    """While it lasts, a forward ends with the stage, and what that gives is shown.

    Raises:
        StageReached: out of the forward.
    """

    def hook(_: nn.Module, __: Any, output: Any) -> None:
        told(output)
        raise StageReached

    handle = stage.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


class Watched:
    """Which stages a forward runs, how often, in which order, and of which others' outputs each is made.

    Args:
        stages: candidates.
    """

    def __init__(self, stages: Mapping[str, nn.Module]) -> None:
        self._stages = stages
        self.calls: Counter[str] = Counter()
        self.order: list[str] = []
        self.needed: dict[str, set[str]] = {name: set() for name in stages}
        self._made: dict[Any, str] = {}

    @contextmanager
    def watching(self) -> Iterator[None]:
        """The time of one forward, with gradients enabled."""
        handles = []
        for name, stage in self._stages.items():
            handles.append(stage.register_forward_pre_hook(self._before(name), with_kwargs=True))
            handles.append(stage.register_forward_hook(self._after(name)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def made_of(self, stages: Collection[str]) -> dict[str, set[str]]:
        """For each of these stages those of them whose outputs it is made of, directly or by what is none of them."""

        def behind(name: str, seen: set[str]) -> set[str]:
            new = self.needed[name] - seen
            seen |= new
            return {entry for entry in new if entry in stages}.union(
                *(behind(entry, seen) for entry in new if entry not in stages)
            )

        return {name: behind(name, set()) for name in stages}

    def _before(self, name: str) -> Any:
        def hook(_: nn.Module, args: Any, kwargs: Any) -> None:
            if not self.calls[name]:
                self.order.append(name)
            self.calls[name] += 1
            self.needed[name] |= self._sources(tree_leaves((args, kwargs)))

        return hook

    def _after(self, name: str) -> Any:
        def hook(_: nn.Module, __: Any, output: Any) -> Any:
            def cut(tensor: Tensor) -> Tensor:
                if not tensor.is_floating_point():
                    return tensor
                leaf = tensor.detach().requires_grad_()
                # What is computed from a leaf goes back to the node that accumulates its gradient.
                with torch.enable_grad():
                    self._made[leaf.view_as(leaf).grad_fn.next_functions[0][0]] = name  # type: ignore[union-attr]
                return leaf

            return tree_map_only(Tensor, cut, output)

        return hook

    def _sources(self, inputs: Sequence[Any]) -> set[str]:
        """The stages that tensors were made by, on whichever way."""
        found: set[str] = set()
        stack = [value.grad_fn for value in inputs if isinstance(value, Tensor) and value.requires_grad]
        for value in inputs:
            if isinstance(value, Tensor) and value.is_leaf and value.requires_grad:
                with torch.enable_grad():
                    stack.append(value.view_as(value).grad_fn)
        seen: set[Any] = set()
        while stack:
            node = stack.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            if node in self._made:
                found.add(self._made[node])
            stack.extend(parent for parent, _ in node.next_functions)
        return found
