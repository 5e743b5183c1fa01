"""What arrives at each module's output in a backward pass, and what it hands on to its inputs."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from lrp_prune.engine.propagation import Propagation
from lrp_prune.engine.roots import Root
from lrp_prune.engine.rules import is_activation
from lrp_prune.models.batches import fields, with_fields
from lrp_prune.names import class_name, named_modules


@dataclass(frozen=True)
class Passage:
    """A module in the backward pass.

    Args:
        name: of the module.
        kind: its class.
        arrived: relevance of its outputs, summed.
        passed: relevance of its inputs, and of what enters as data inside it.
        own: of ``arrived - passed`` what is lost (or, below zero, gained) in it and in none of the modules inside.
    """

    name: str
    kind: str
    arrived: float
    passed: float
    own: float

    @property
    def lost(self) -> float:
        """What is lost in it, and inside it."""
        return self.arrived - self.passed


class Passing:
    """Notes inputs and outputs of modules in one forward."""

    def __init__(self) -> None:
        self.inputs: dict[str, list[Tensor]] = {}
        self.outputs: dict[str, list[Tensor]] = {}

    @contextmanager
    def noting(self, model: nn.Module) -> Iterator[None]:
        """While the context lasts, within that of the rules."""
        with ExitStack() as stack:
            for name, module in named_modules(model).items():
                before = module.register_forward_pre_hook(self._before(name), with_kwargs=True)
                after = module.register_forward_hook(self._after(name))
                stack.callback(before.remove)
                stack.callback(after.remove)
            yield

    def _before(self, name: str) -> Callable[..., Any]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> Any:
            noted = self.inputs.setdefault(name, [])
            return _noted(args, noted), _noted(kwargs, noted)

        return hook

    def _after(self, name: str) -> Callable[..., Any]:
        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            return _noted(output, self.outputs.setdefault(name, []))

        return hook

    def passages(
        self, model: nn.Module, propagation: Propagation, target: Tensor, roots: list[Root]
    ) -> tuple[list[Passage], list[tuple[Root, Tensor]]]:
        """Run the backward pass: of each module that activations go into and come out of, from the model itself on."""
        places = [*self.inputs.items(), *self.outputs.items()]
        flat = [tensor for _, tensors in places for tensor in tensors]
        leaves = [root.leaf for root in roots]
        gradients = propagation.gradients(target, [*flat, *leaves])
        propagation.check_reached(target, gradients)
        sums = iter([_sum(tensor, gradient) for tensor, gradient in zip(flat, gradients, strict=False)])
        passed = {name: sum(next(sums) for _ in tensors) for name, tensors in self.inputs.items()}
        arrived = {name: sum(next(sums) for _ in tensors) for name, tensors in self.outputs.items()}
        ended = [
            (root, root.relevance(gradient).detach())
            for root, gradient in zip(roots, gradients[len(flat) :], strict=True)
        ]
        entered = {root.name: 0.0 for root, _ in ended}
        for root, value in ended:
            entered[root.name] += float(value.double().sum())
        followed = {
            name: arrived[name] - passed[name] - (_inside(name, entered) if name else 0.0)
            for name, tensors in self.inputs.items()
            if self.outputs.get(name) and (tensors or (not name or _has_inside(name, entered)))
        }
        if "" in followed:  # inputs of the whole model are what its arguments' roots have
            followed[""] = arrived[""] - sum(entered.values())
        modules = named_modules(model)
        return [
            Passage(
                name,
                class_name(modules[name]),
                arrived[name],
                arrived[name] - followed[name],
                followed[name] - sum(followed[child] for child in _nearest(name, followed)),
            )
            for name in followed
        ], ended


def _noted(value: Any, noted: list[Tensor]) -> Any:
    """The same value, with a copy of each activation in it noted, which nothing writes into."""
    if isinstance(value, Tensor):
        if not is_activation(value) or not value.is_floating_point():
            return value
        noted.append(value.clone())
        return noted[-1].clone()
    if isinstance(value, Mapping):
        made = {key: _noted(entry, noted) for key, entry in value.items()}
        if type(value) is dict:
            return made
        for key, entry in made.items():
            if entry is not None:
                value[key] = entry  # type: ignore[index]  # model outputs are mutable mappings
        return value
    if type(value) in (tuple, list):
        return type(value)(_noted(entry, noted) for entry in value)
    if isinstance(value, tuple) and hasattr(value, "_fields") and not hasattr(value, "batch_sizes"):
        return type(value)(*(_noted(entry, noted) for entry in value))
    named = None if type(value).__module__ == "transformers.cache_utils" else fields(value)
    return with_fields(value, {name: _noted(entry, noted) for name, entry in named.items()}) if named else value


def _sum(tensor: Tensor, gradient: Tensor | None) -> float:
    return 0.0 if gradient is None else float((tensor.detach().double() * gradient.double()).sum())


def _inside(name: str, entered: Mapping[str, float]) -> float:
    return sum(value for root, value in entered.items() if root == name or root.startswith(f"{name}."))


def _has_inside(name: str, entered: Mapping[str, float]) -> bool:
    return any(root.startswith(f"{name}.") for root in entered)


def _nearest(name: str, followed: Mapping[str, float]) -> list[str]:
    """The outermost of the followed modules inside one."""
    prefix = f"{name}." if name else ""
    inside = [other for other in followed if other != name and other.startswith(prefix)]
    return [other for other in inside if not any(other.startswith(f"{between}.") for between in inside if between)]
