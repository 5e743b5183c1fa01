"""Layers that run with corrected weights where a condition holds, and untouched everywhere else."""

import sys
from collections.abc import Collection, Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from lrp_prune.correction.conditions.condition import Condition
from lrp_prune.correction.conditions.states import module_at
from lrp_prune.correction.verifying import resolve_entries
from lrp_prune.effects.entries import measuring
from lrp_prune.models.outputs import answer_of
from lrp_prune.names import named_parameters, unwrap
from lrp_prune.relevance import Relevance

if TYPE_CHECKING:
    from lrp_prune.correction.conditional import ConditionalPatch


class Gate:
    """Where the condition of a patch holds in the call under way; the hook of the module that the condition looks at.

    Attributes:
        patch: whose condition it is.
        strength: at which the patch is applied.
        where: bool ``[samples]`` or ``[samples, tokens]``; None before the first call.
    """

    def __init__(self, patch: "ConditionalPatch", strength: float) -> None:
        self.patch, self.strength = patch, strength
        self.where: Tensor | None = None

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        condition: Condition = self.patch.condition
        with torch.no_grad():
            where = condition.holds(inputs, output)
        if not isinstance(where, Tensor) or where.dtype != torch.bool or where.dim() not in (1, 2):
            raise ValueError(f"{condition} must return bool [samples] or [samples, tokens], got {_shown(where)}")
        self.where = where

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "where": None}  # of a copy no call is under way


class Layer(NamedTuple):
    """A layer, what it is called, and the patched positions of each of its parameters."""

    module: nn.Module
    name: str
    positions: dict[str, Tensor]


class GatedLayer:
    """The hook of a layer that a conditional patch touches.

    Where the condition holds, the share :math:`s` of what the patched entries add to the output is taken away, of the weights
    that the layer has now; everything else of the output is what it was, bit by bit. So patches add up, those of one layer too.
    Gradients are those of entries :math:`(1 - s)\\, w`.
    """

    def __init__(self, gate: Gate, name: str, positions: Mapping[str, Tensor]) -> None:
        self.gate, self.name = gate, name
        self.positions = dict(positions)

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
    ) -> Tensor | None:
        if self.gate.where is None:
            raise RuntimeError(
                f"{self.name} runs before {self.gate.patch.condition.at!r}, which its condition looks at: leave it out of the "
                "patch (include=, exclude=), or look at an earlier module"
            )
        where = self.gate.where.to(output.device)
        if tuple(output.shape[: where.dim()]) != tuple(where.shape):
            raise ValueError(
                f"{self.name} returned shape {tuple(output.shape)} where the condition says {tuple(where.shape)}: the two must "
                "have the same samples and tokens"
            )
        if not bool(where.any()):
            return None
        given: Tensor = args[0] if args else next(iter(kwargs.values()))
        return output.index_put((where,), output[where] - self._share(module, given[where]).to(output.dtype))

    def _share(self, module: nn.Module, given: Tensor) -> Tensor:
        """What is taken away from the output for these inputs."""
        weight, bias = (self._entries(module, name) for name in ("weight", "bias"))
        if weight is None:
            assert bias is not None
            return bias.expand(*given.shape[:-1], -1)
        # That of Conv1D is stored the other way round.
        return nn.functional.linear(given, weight if isinstance(module, nn.Linear) else weight.T, bias)

    def _entries(self, module: nn.Module, name: str) -> Tensor | None:
        """A parameter's patched entries by the share that is taken away, zeros elsewhere; None if none is patched."""
        if name not in self.positions:
            return None
        parameter: Tensor = getattr(module, name)
        places = torch.unravel_index(self.positions[name].to(parameter.device), tuple(parameter.shape))
        return torch.zeros_like(parameter).index_put(places, parameter[places] * self.gate.strength)


def attach(patch: "ConditionalPatch", model: nn.Module, strength: float) -> None:
    """Have a model run with a patch where its condition holds; nothing has changed if an error is raised.

    Raises:
        KeyError: the model has not all parameters, or not the module that the condition looks at.
        ValueError: a parameter is of a layer that cannot be corrected for some tokens only.
    """
    watched, layers = check(patch, model)
    gate = Gate(patch, strength)
    watched.register_forward_hook(gate)
    for module, name, positions in layers:
        module.register_forward_hook(GatedLayer(gate, name, positions), with_kwargs=True)
    _forget_compiled()


def check(patch: "ConditionalPatch", model: nn.Module) -> tuple[nn.Module, list[Layer]]:
    """The module that a condition looks at, and the layers that a patch touches; raises what :func:`attach` would raise."""
    return module_at(model, patch.condition.at), list(_layers(patch, model))


def detach(patch: "ConditionalPatch", model: nn.Module) -> bool:
    """Take a patch's hooks off a model; whether there were any."""
    found = False
    for module, key, gate in list(_hooks(model)):
        if gate.patch == patch:
            found = True
            del module._forward_hooks[key]
            module._forward_hooks_with_kwargs.pop(key, None)
    if found:
        _forget_compiled()
    return found


def _forget_compiled() -> None:
    """Have compiled forwards compiled again: they were made for the hooks that there were, and do not look for others."""
    if "torch._dynamo" in sys.modules:  # else nothing is compiled, and it takes seconds to import
        torch.compiler.reset()


def switch(patch: "ConditionalPatch", model: nn.Module, strength: float) -> None:
    """Have a model run with a patch at this strength, whether it is applied or not; 0 takes it off."""
    if strength:
        check(patch, model)
    detach(patch, model)
    if strength:
        attach(patch, model, strength)


def gate_of(patch: "ConditionalPatch", model: nn.Module) -> Gate | None:
    """The gate that a patch has in a model; None if it is not applied."""
    return next((gate for _, _, gate in _hooks(model) if gate.patch == patch), None)


def _hooks(model: nn.Module) -> Iterable[tuple[nn.Module, int, Gate]]:
    # What is applied is seen in the model, as with weights; torch has no other way to ask for a module's hooks.
    for module in unwrap(model).modules():
        for key, hook in module._forward_hooks.items():
            if isinstance(hook, Gate | GatedLayer):
                yield module, key, hook if isinstance(hook, Gate) else hook.gate


def _layers(patch: "ConditionalPatch", model: nn.Module) -> Iterable[Layer]:
    """The layers that own a patch's parameters, tied ones in each of them."""
    owners: dict[int, Layer] = {}
    parameters = resolve_entries(patch, model)
    names = {id(parameter): name for name, parameter in parameters.items()}
    for module in unwrap(model).modules():
        for attribute, parameter in module.named_parameters(recurse=False):
            name = names.get(id(parameter))
            if name is None:
                continue
            if isinstance(module, NonDynamicallyQuantizableLinear):
                raise ValueError(
                    f"{name} is of a layer that is not run by itself, as in nn.MultiheadAttention: no condition can act on it, "
                    "leave it out of the patch (include=, exclude=)"
                )
            if not _can_act(module):
                raise ValueError(
                    f"{name} is of a {type(module).__name__}: a condition on tokens is for linear layers, leave it out of "
                    "the patch (include=, exclude=)"
                )
            layer = owners.setdefault(id(module), Layer(module, name.rpartition(".")[0] or name, {}))
            layer.positions[attribute] = patch[name].positions
    return owners.values()


def later_parameters(model: nn.Module, at: str, batch: Mapping[str, Any]) -> list[str]:
    """The parameters of linear layers that run after a module only: those that a condition on it can act on.

    Args:
        model: the model; it comes out as it went in.
        at: canonical name of the module.
        batch: one that shows in which order modules run.

    Raises:
        KeyError: if the model has no such module.
        ValueError: if no linear layer runs after it.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1))
        >>> later_parameters(model, "1", {"input": torch.ones(1, 2)})
        ['2.weight', '2.bias']
    """
    watched, passed = module_at(model, at), False
    late: dict[nn.Module, bool] = {}

    def note(module: nn.Module, _: Any) -> None:
        late[module] = passed and late.get(module, True)

    def passing(*_: Any) -> None:
        nonlocal passed
        passed = True

    modules = [each for each in unwrap(model).modules() if any(True for _ in each.parameters(recurse=False))]
    handles = [each.register_forward_pre_hook(note) for each in modules] + [watched.register_forward_hook(passing)]
    try:
        with measuring(model):
            answer_of(model, {key: value for key, value in batch.items() if key != "labels"})
    finally:
        for handle in handles:
            handle.remove()
    # A parameter that several layers have, or that one has which runs earlier or is no linear layer, is out of reach.
    owners: dict[int, list[nn.Module]] = {}
    for each in modules:
        for parameter in each.parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(each)
    found = [
        name
        for name, parameter in named_parameters(model).items()
        if all(late.get(each, False) and _can_act(each) for each in owners[id(parameter)])
    ]
    if not found:
        raise ValueError(f"no linear layer runs after {at!r} only: look at an earlier module")
    return found


def within_reach(relevance: Relevance, later: Collection[str], at: str) -> list[str]:
    """The tensors of a relevance whose entries a patch under a condition can take away.

    Args:
        relevance: of weights; or of units, of which what reads them is taken away where that is known.
        later: what :func:`later_parameters` found.
        at: canonical name of the module that is looked at, for errors.

    Raises:
        ValueError: if there are none.
    """

    def removed(name: str) -> list[str]:
        members = relevance.members.get(name, ())
        reading = [member.parameter for member in members if member.reads]
        return reading or [member.parameter for member in members] or [name]

    found = [name for name in relevance if all(parameter in later for parameter in removed(name))]
    if not found:
        raise ValueError(
            f"nothing that is scored runs after {at!r} only: look at an earlier module, or score more than "
            f"{', '.join(list(relevance)[:3])}, ..."
        )
    return found


def _can_act(module: nn.Module) -> bool:
    """Whether a condition on tokens can act on a layer: a linear one."""
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def _shown(value: Any) -> str:
    return f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
