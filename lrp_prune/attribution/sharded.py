"""Statistics of sharded weights: each process sums what its own samples give, and keeps the sum of all for its part only.

While a module that ``fully_shard`` was called on propagates, the sums of its weights are whole tensors, partial in value.
As soon as relevance leaves the module they are reduce-scattered into the parts and given up, so that one such module
is the most that is ever whole. All processes do so at the same places of the pass, whichever weights they have used.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.utils._pytree import tree_flatten, tree_unflatten

from lrp_prune.attribution.divided import DividedStatistic
from lrp_prune.attribution.observers import ObserverTable
from lrp_prune.attribution.statistics import RowStatistic, WeightStatistic
from lrp_prune.attribution.unit_observers import Units
from lrp_prune.distributed.sharding import (
    Sharding,
    agreeing,
    all_gathered,
    all_reduced,
    device_of,
    fsdp_modules,
    sharding_of,
)
from lrp_prune.engine.tags import set_tag, tag_of
from lrp_prune.engine.unsharding import own_modules
from lrp_prune.names import named_parameters, unwrap
from lrp_prune.relevance import Relevance
from lrp_prune.relevance.contributions import INPUTS

COLLECTING = "collecting relevance"
"""What processes do together here, as it is said if one of them fails."""


class _Leaving(Function):
    """The identity; in the backward pass it tells when relevance has left a module by all its inputs."""

    @staticmethod
    def forward(ctx: Any, left: Any, *inputs: Tensor) -> tuple[Tensor, ...]:
        ctx.left = left
        return tuple(tensor.view_as(tensor) for tensor in inputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        ctx.left()
        return None, *gradients


_leaving: Callable[..., tuple[Tensor, ...]] = _Leaving.apply


class ShardedTable(ObserverTable):
    """The observers of a collection on a sharded model; every process takes part in each of its calls.

    Raises:
        ValueError: if parameters are divided in another way than by ``fully_shard``.
    """

    def __init__(self, model: nn.Module, **options: Any) -> None:
        super().__init__(model, **options)
        self.shardings = shardings_of(self._model)
        self.mesh = next(iter(self.shardings.values())).mesh
        self._groups = _scored_in(self._model, self.parameters, self.shardings)

    def _weight(self, name: str) -> WeightStatistic:
        if name not in self.shardings or name in self._statistics:
            return super()._weight(name)
        found = self._statistics[name] = self._divided(name)
        return found

    def _divided(self, name: str) -> DividedStatistic:
        plain = super()._weight(name)  # for the options that it chooses
        options = (plain.statistic, self.batch, plain.operand_dtype, self._device)
        return DividedStatistic(name, self.parameters[name], self.shardings[name], *options)

    @contextmanager
    def passing(self) -> Iterator[None]:
        """For one forward and backward pass: sum up over processes module by module."""
        with ExitStack() as stack:
            for module, names in self._groups if self._granularity == "weight" else ():
                if self.backward_needed:
                    handle = module.register_forward_pre_hook(self._on_leaving(names), with_kwargs=True)
                else:
                    handle = module.register_forward_hook(self._on_left(names))
                stack.callback(handle.remove)
            yield

    def _on_leaving(self, names: list[str]) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> Any:
            leaves, structure = tree_flatten((args, kwargs))
            with torch._C.DisableTorchFunction():
                active = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.requires_grad]
                if not active or not torch.is_grad_enabled():
                    return None
                copies = _leaving(lambda: self.sum_up(names), *(leaves[i] for i in active))
                for i, copy in zip(active, copies, strict=True):
                    set_tag(copy, tag_of(leaves[i]))
                    if self.tracer is not None:
                        self.tracer.carry(leaves[i], copy)
                    leaves[i] = copy
            return tree_unflatten(leaves, structure)

        return hook

    def _on_left(self, names: list[str]) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            with torch._C.DisableTorchFunction(), torch.no_grad():
                self.sum_up(names)

        return hook

    def sum_up(self, names: Sequence[str] | None = None) -> None:
        """Sum up the sharded weights of these names over all processes; by default of all."""
        names = [name for name in self.parameters if name in self.shardings] if names is None else names
        if not names or self._granularity != "weight":
            return
        mine = [
            statistic.code if isinstance(statistic := self._statistics.get(name), DividedStatistic) else 0
            for name in names
        ]
        codes = all_reduced(torch.tensor(mine, device="cpu"), self.mesh, "MAX").tolist()
        for name, code in zip(names, codes, strict=True):
            if code:
                statistic = self._weight(name)
                assert isinstance(statistic, DividedStatistic)
                statistic.sum_up(code)

    def finish(self, **description: Any) -> Relevance:
        """The relevance of everything scored, of the samples of all processes; of sharded weights this process's part."""
        self._same_everywhere()
        bad = [name for name, statistic in self._statistics.items() if not _finite(statistic)]
        with agreeing(self.mesh, COLLECTING):
            if bad:
                raise FloatingPointError(
                    f"the relevance of {bad[0]!r} is not finite: check the batches and the precision"
                )
        samples = int(all_reduced(torch.tensor(description.pop("num_samples"), device="cpu"), self.mesh))
        divided = {
            name + INPUTS: self.shardings[name]
            for name, statistic in self._statistics.items()
            if isinstance(statistic, DividedStatistic) and statistic.inputs_divided
        }
        return super().finish(**description, num_samples=samples, shardings={**self.shardings, **divided})

    def _finished_units(self) -> Units:
        """Sums of the units of all processes, which are the same in each."""
        units = super()._finished_units()
        found = {name: len(sums) for name, sums in units.sums.items()}
        if any(theirs != found for theirs in all_gathered(found, self.mesh)):
            raise ValueError("the processes found different units: give all of them batches that use the same layers")
        return units._replace(sums={name: all_reduced(sums, self.mesh) for name, sums in units.sums.items()})

    def _same_everywhere(self) -> None:
        """Give each process the statistics that one of them has, and sum those that are whole everywhere."""
        mine = {name: _described(statistic) for name, statistic in self._statistics.items()}
        weights = {name: entry for name, entry in self._statistics.items() if isinstance(entry, WeightStatistic)}
        reasons = {name: entry.unscored for name, entry in weights.items() if entry.unscored is not None}
        known = ({**reasons, **self.refused}, self._noted, self.beside.multiplied)
        everyone = all_gathered((mine, self._members, self._layouts, known), self.mesh)
        descriptions: dict[str, Any] = {}
        for theirs, members, layouts, (refused, noted, products) in everyone:
            self.beside.multiplied |= products
            self.refused = {**refused, **self.refused}
            self._noted = {reason: names | noted[reason] for reason, names in self._noted.items()}
            for name, (units, inputs) in theirs.items():
                known = descriptions.setdefault(name, (units, inputs))
                if known[1] is None and inputs is not None:
                    descriptions[name] = (units, inputs)
            self._members = {**members, **self._members}
            self._layouts = {**layouts, **self._layouts}
        statistics = {
            name: self._statistics.get(name) or self._made(name, units) for name, (units, _) in descriptions.items()
        }
        self._statistics = statistics
        for name, statistic in statistics.items():
            if isinstance(statistic, DividedStatistic):
                continue
            units, inputs = descriptions[name]
            shape = statistic._allocated().shape if isinstance(statistic, WeightStatistic) else (units,)
            sums = statistic.sums if statistic.sums is not None else torch.zeros(shape, device=device_of(self.mesh))
            statistic.sums = all_reduced(sums, self.mesh)
            if isinstance(statistic, WeightStatistic) and inputs is not None:
                own = statistic.inputs if statistic.inputs is not None else torch.zeros(inputs, device=sums.device)
                statistic.inputs = all_reduced(own, self.mesh)

    def _made(self, name: str, rows: int) -> WeightStatistic | RowStatistic:
        """A statistic that nothing was added to in this process."""
        return self._weight(name) if self._granularity == "weight" else RowStatistic(name, rows, self._statistic)


def _described(statistic: WeightStatistic | RowStatistic) -> tuple[int, tuple[int, ...] | None]:
    if isinstance(statistic, WeightStatistic):
        return 0, None if statistic.inputs is None else tuple(statistic.inputs.shape)
    return statistic.sums.numel(), None


def _finite(statistic: WeightStatistic | RowStatistic) -> bool:
    sums = statistic._part if isinstance(statistic, DividedStatistic) else statistic.sums
    return sums is None or bool(torch.isfinite(sums).all())


def shardings_of(model: nn.Module) -> dict[str, Sharding]:
    """How each sharded parameter of a model is divided, by canonical name; nothing for a model that is not sharded.

    Raises:
        ValueError: if one is divided in another way than by ``fully_shard``, or over other processes than the rest.
    """
    model = unwrap(model)
    found = {name: sharding_of(parameter, name) for name, parameter in named_parameters(model).items()}
    shardings = {name: sharding for name, sharding in found.items() if sharding.mesh is not None}
    if not shardings:
        return {}
    known = {id(parameter) for module in fsdp_modules(model) for parameter in module.parameters()}
    meshes = {tuple(entry.mesh.mesh.flatten().tolist()) for entry in shardings.values() if entry.mesh is not None}
    for name, parameter in named_parameters(model).items():
        if name in shardings and id(parameter) not in known:
            raise ValueError(
                f"{name} is a DTensor of a module that fully_shard was not called on: models with tensor parallelism are "
                "not supported, use fully_shard alone"
            )
    if len(meshes) > 1:
        raise ValueError(
            f"the parameters are sharded over different processes ({meshes}): use one mesh for all of them"
        )
    return shardings


def _scored_in(
    model: nn.Module, parameters: dict[str, nn.Parameter], shardings: dict[str, Sharding]
) -> list[tuple[nn.Module, list[str]]]:
    """For each FSDP module the scored weights that are its own; a tied one belongs to the first."""
    names = {id(parameter): name for name, parameter in parameters.items() if name in shardings}
    found = []
    for module in fsdp_modules(model):
        own = [
            names.pop(id(parameter))
            for owner in own_modules(module)
            for parameter in owner._parameters.values()
            if id(parameter) in names
        ]
        if own:
            found.append((module, own))
    return found
