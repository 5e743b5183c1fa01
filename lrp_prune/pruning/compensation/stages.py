"""Stages: the parts of a model that run one after the other, found by what repeats, and run one at a time.

A stage is one of the repeated modules that a model is made of (a transformer layer, a residual block), or a layer outside of
them. While one is worked at, those before it give what they gave, without being computed again, so that going through a model
costs a few times running it; what the model does between its stages (masks, positions, a change of shape) is its own code, run as
it is.
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from lrp_prune.distributed.sharding import is_sharded, local_part
from lrp_prune.names import kind_of, named_modules
from lrp_prune.pruning.compensation.lineage import Lineage
from lrp_prune.pruning.products import given

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


class StageReached(Exception):  # noqa: N818  # no error: what follows in the model is not needed
    """Leaves a forward, as the stage has been run."""


def stages_of(
    module: nn.Module, weights: Mapping[str, nn.Parameter], passed_by: Collection[str] = ()
) -> dict[str, nn.Module]:
    """The modules that are worked at one after the other, in the order in which they are registered.

    Each of the weights is in one of them at most. One of several modules of a class in one container is a stage (the outermost
    where they are nested), and so is a module that has a weight itself.

    Args:
        module: the model.
        weights: what has to be in some stage.
        passed_by: modules whose weights are used without their being called, as an attention of torch does with its ``out_proj``:
            these weights are of the module around them.

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
        passed = [child for child in entry.children() if _is_passed_by(child, entry, names.get(id(child)), passed_by)]
        held = [*entry.parameters(recurse=False), *(parameter for child in passed for parameter in child.parameters())]
        own = any(id(parameter) in wanted for parameter in held)
        if id(entry) in names and (own or (repeats and not isinstance(entry, _CONTAINERS))):
            found[names[id(entry)]] = entry
            return
        classes = Counter(map(kind_of, entry.children()))
        for child in entry.children():
            visit(child, isinstance(entry, _CONTAINERS) and classes[kind_of(child)] > 1)

    visit(module, False)
    return found


def _is_passed_by(child: nn.Module, owner: nn.Module, name: str | None, passed_by: Collection[str]) -> bool:
    return name in passed_by or (isinstance(owner, nn.MultiheadAttention) and child is owner.out_proj)


class Given:
    """What stages gave, batch by batch, to be given again in their place.

    Args:
        stages: all, in the order of execution.
        needed: for each stage those whose outputs it is made of, see :func:`made_of`.
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
                self._outputs[earlier] = [tree_map_only(Kept, Kept.blank, entry) for entry in self._outputs[earlier]]

    def taken(self, output: Any) -> Any:
        """A copy of what a stage gives, as it is kept."""
        return tree_map_only(
            Tensor, lambda tensor: Kept(tensor.detach().to(self._keep_on, copy=True), tensor.device), output
        )

    @contextmanager
    def standing_in(self, batch: int) -> Iterator[None]:
        """While it lasts, stages that are done give what they gave to this batch."""
        with ExitStack() as stack:
            for name, outputs in self._outputs.items():
                stack.enter_context(_forward(self._stages[name], _giving(outputs[batch])))
            yield


@dataclass(frozen=True)
class Kept:
    """A tensor that a stage gave, kept elsewhere."""

    tensor: Tensor
    device: torch.device

    def blank(self) -> "Kept":
        """As large, and of no memory; what is computed from it is not a number. Others than floats are small, and stay."""
        if not self.tensor.is_floating_point():
            return self
        return Kept(self.tensor.new_full((), float("nan")).expand(self.tensor.shape), self.device)

    def given(self) -> Tensor:
        """A tensor like the one that the stage gave: the model may write into it, and it counts as computed from the inputs."""
        copy = self.tensor.to(self.device, copy=True)
        if not copy.is_floating_point():
            return copy
        with torch._C.DisableTorchFunction():  # it is not the model that makes something require grad
            source = torch.zeros((), device=self.device, requires_grad=True)
        return given(source, lambda: copy)


def _giving(output: Any) -> Callable[..., Any]:
    def forward(*_: Any, **__: Any) -> Any:
        return tree_map_only(Kept, Kept.given, output)

    return forward


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

    # Before hooks of others, which change what is given in the stage's place as well.
    handle = stage.register_forward_hook(hook, prepend=True)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def leaving_before(stage: nn.Module, told: Callable[[Any], None]) -> Iterator[None]:
    """While it lasts, a forward ends before the stage, and the arguments by position and by name that it gets are shown.

    Raises:
        StageReached: out of the forward.
    """

    def hook(_: nn.Module, args: Any, kwargs: Any) -> None:
        told((args, kwargs))
        raise StageReached

    handle = stage.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


Leaving = Callable[[nn.Module, Callable[[Any], None]], AbstractContextManager[None]]
"""One of these two."""


def kept_tensors(kept: Any) -> Any:
    """What :meth:`Given.taken` took, with its tensors as they are kept."""
    return tree_map_only(Kept, lambda entry: entry.tensor, kept)


@contextmanager
def holding(values: Mapping[nn.Parameter, Tensor]) -> Iterator[None]:
    """Parameters with other values, for the time of a context; of those that processes have parts of, what is here."""
    divided = {parameter: value for parameter, value in values.items() if is_sharded(parameter)}
    own = {parameter: parameter.data for parameter in values if parameter not in divided}
    parts = {parameter: local_part(parameter).clone() for parameter in divided}
    try:
        for parameter in own:
            parameter.data = values[parameter]
        for parameter, value in divided.items():
            local_part(parameter).copy_(value)  # where FSDP gathers from
        yield
    finally:
        for parameter, value in own.items():
            parameter.data = value
        for parameter, value in parts.items():
            local_part(parameter).copy_(value)
        torch.clear_autocast_cache()


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
        self._running: list[str] = []
        self._decided: set[str] = set()

    @contextmanager
    def watching(self) -> Iterator[None]:
        """The time of one forward."""
        lineage = Lineage(self._read)
        with ExitStack() as stack:
            for name, stage in self._stages.items():
                stack.callback(stage.register_forward_pre_hook(self._before(name)).remove)
                stack.callback(stage.register_forward_hook(self._after(name, lineage), prepend=True).remove)
            stack.enter_context(lineage)
            yield

    def _read(self, sources: frozenset[str], value: Any) -> None:
        """Something was computed from these stages' outputs."""
        for name in self._running:
            self.needed[name] |= sources - {name}
        if not self._running and not isinstance(value, Tensor | tuple | list):
            self._decided |= sources  # a number: who knows what follows from it

    def _before(self, name: str) -> Any:
        def hook(_: nn.Module, __: Any) -> None:
            if not self.calls[name]:
                self.order.append(name)
            self.calls[name] += 1
            self.needed[name] |= self._decided - {name}
            self._running.append(name)

        return hook

    def _after(self, name: str, lineage: Lineage) -> Any:
        def hook(_: nn.Module, __: Any, output: Any) -> Any:
            # Apart from what went in, which a module may return as it is.
            output = tree_map_only(Tensor, torch.clone, output)
            self._running.pop()
            lineage.begin(output, name)
            return output

        return hook


def made_of(forwards: Sequence[Watched], stages: Collection[str]) -> dict[str, set[str]]:
    """For each of these stages those of them whose outputs it is made of, directly or by what is none of them.

    Args:
        forwards: in each of which it may have been made of others.
        stages: what counts as one.
    """

    def behind(name: str, seen: set[str]) -> set[str]:
        new = set().union(*(watched.needed[name] for watched in forwards)) - seen
        seen |= new
        return {entry for entry in new if entry in stages}.union(
            *(behind(entry, seen) for entry in new if entry not in stages)
        )

    return {name: behind(name, set()) for name in stages}
