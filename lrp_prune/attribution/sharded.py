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

from lrp_prune.attribution.observers import ObserverTable
from lrp_prune.attribution.statistics import BatchLayout, InputNorm, RowStatistic, UnitStatistic, WeightStatistic
from lrp_prune.attribution.tags import set_tag, tag_of
from lrp_prune.attribution.unsharding import own_modules
from lrp_prune.names import named_parameters, unwrap
from lrp_prune.relevance import INPUTS, Relevance
from lrp_prune.sharding import (
    Sharding,
    agree,
    all_gathered,
    all_reduced,
    device_of,
    fsdp_modules,
    local_part,
    sharding_of,
)


class _Divided(WeightStatistic):
    """Sums of one sharded weight: whole and partial while a batch propagates, else this process's part.

    Args:
        name: canonical name.
        parameter: the sharded weight.
        sharding: how it is divided.
        statistic, batch, matmul_dtype, device: see :class:`WeightStatistic`.
    """

    def __init__(
        self,
        name: str,
        parameter: Tensor,
        sharding: Sharding,
        statistic: str,
        batch: BatchLayout,
        matmul_dtype: torch.dtype | None,
        device: torch.device | str | None,
    ) -> None:
        # Of a weight that is not here only the layout is known; it takes no memory.
        stand_in = torch.empty((), dtype=parameter.dtype, device=device_of(sharding.mesh)).expand(sharding.shape)
        super().__init__(name, stand_in, statistic, batch, matmul_dtype, stand_in.device)
        self.sharding, self._sharded, self._kept_on = sharding, parameter, device
        self._part: Tensor | None = None
        self._inputs_sum: Tensor | None = None
        self.inputs_divided = False

    @property
    def code(self) -> int:
        """What waits to be summed: 0 nothing, 1 sums; more if ``inputs`` as well, by the dimension they run along."""
        if self.sums is None:
            return 0
        if self.inputs is None:
            return 1
        long = [dim for dim, size in enumerate(self.inputs.shape) if size > 1]
        return 2 + (long[0] if len(long) == 1 else self.inputs.dim() if long else 0)

    def sum_up(self, code: int) -> None:
        """Add what all processes have to the parts, and give up what is whole."""
        sums = self._allocated()
        self.sums = None
        part = self.sharding.summed(sums)
        del sums
        if self._part is None:
            self._part = torch.zeros(part.shape, dtype=part.dtype, device=self._kept_on or part.device)
        self._part.add_(part.to(self._part.device))
        if code > 1:
            self._sum_up_inputs(code - 2)

    def _sum_up_inputs(self, dim: int) -> None:
        inputs, self.inputs = self.inputs, None
        shape = self.sharding.shape
        full = dim == len(shape)
        wanted = shape if full else tuple(size if axis == dim else 1 for axis, size in enumerate(shape))
        partial = torch.zeros(wanted, dtype=torch.float32, device=self._parameter.device)
        if inputs is not None:
            partial += inputs
        # Vectors are small, and stay whole in every process.
        total = self.sharding.summed(partial) if full else all_reduced(partial, self.sharding.mesh)
        before = self._inputs_sum
        if before is not None and full and not self.inputs_divided:
            before = self.sharding.part(before)
        elif before is not None and not full and self.inputs_divided:
            total = self.sharding.part(total)
        self._inputs_sum = total if before is None else before + total
        self.inputs_divided |= full

    def mean_weights(self) -> Tensor | None:
        """Mean absolute weight for each of the ``inputs``, in their shape."""
        if self.inputs is None:
            return None
        weight = local_part(self._sharded).to(device=self.inputs.device, dtype=torch.float32).abs()
        if self.inputs_divided:
            return weight
        shared = [dim for dim, size in enumerate(self.inputs.shape) if size == 1]
        number = 1
        for dim in shared:
            number *= self.sharding.shape[dim]
        total = torch.zeros_like(self.inputs)
        self.sharding.part(total).copy_(weight.sum(shared, keepdim=True) if shared else weight)
        return self.sharding.all_reduced(total).div_(max(number, 1))

    def finish(self) -> Tensor | None:
        """This process's part of the sums with the factor ``W``, handed over; None if no relevance arrived anywhere."""
        self.sums, self._part = self._part, None
        self.inputs, self._inputs_sum = self._inputs_sum, None
        self._parameter = local_part(self._sharded)
        return super().finish()


class _DividedInputNorm(_Divided, InputNorm):
    """As :class:`_Divided`, from the forward alone."""


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

    def _divided(self, name: str) -> _Divided:
        plain = super()._weight(name)  # for the options that it chooses
        kind = _DividedInputNorm if isinstance(plain, InputNorm) else _Divided
        options = (plain.statistic, self.batch, plain.operand_dtype, self._device)
        return kind(name, self.parameters[name], self.shardings[name], *options)

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
            statistic.code if isinstance(statistic := self._statistics.get(name), _Divided) else 0 for name in names
        ]
        codes = all_reduced(torch.tensor(mine), self.mesh, "MAX").tolist()
        for name, code in zip(names, codes, strict=True):
            if code:
                statistic = self._weight(name)
                assert isinstance(statistic, _Divided)
                statistic.sum_up(code)

    def agree(self, error: Exception | None) -> None:
        """Raise everywhere if one process has an error."""
        agree(error, self.mesh, "collecting relevance")

    def finish(self, **description: Any) -> Relevance:
        """The relevance of everything scored, of the samples of all processes; of sharded weights this process's part."""
        self._same_everywhere()
        bad = [name for name, statistic in self._statistics.items() if not _finite(statistic)]
        self.agree(
            FloatingPointError(f"the relevance of {bad[0]!r} is not finite: check the batches and the precision")
            if bad
            else None
        )
        samples = int(all_reduced(torch.tensor(description.pop("num_samples")), self.mesh))
        divided = {
            name + INPUTS: self.shardings[name]
            for name, statistic in self._statistics.items()
            if isinstance(statistic, _Divided) and statistic.inputs_divided
        }
        return super().finish(**description, num_samples=samples, shardings={**self.shardings, **divided})

    def _same_everywhere(self) -> None:
        """Give each process the statistics that one of them has, and sum those that are whole everywhere."""
        mine = {name: _described(statistic) for name, statistic in self._statistics.items()}
        everyone = all_gathered((mine, self._members, self._layouts), self.mesh)
        descriptions: dict[str, Any] = {}
        for theirs, members, layouts in everyone:
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
            if isinstance(statistic, _Divided):
                continue
            units, inputs = descriptions[name]
            shape = statistic._allocated().shape if isinstance(statistic, WeightStatistic) else (units,)
            sums = statistic.sums if statistic.sums is not None else torch.zeros(shape, device=device_of(self.mesh))
            statistic.sums = all_reduced(sums, self.mesh)
            if isinstance(statistic, WeightStatistic) and inputs is not None:
                own = statistic.inputs if statistic.inputs is not None else torch.zeros(inputs, device=sums.device)
                statistic.inputs = all_reduced(own, self.mesh)

    def _made(self, name: str, units: int) -> WeightStatistic | UnitStatistic | RowStatistic:
        """A statistic that nothing was added to in this process."""
        if self._granularity == "weight":
            return self._weight(name)
        if self._granularity == "embedding":
            return RowStatistic(name, units, self._statistic)
        return UnitStatistic(name, units, self._statistic, self.batch)


def _described(statistic: WeightStatistic | UnitStatistic | RowStatistic) -> tuple[int, tuple[int, ...] | None]:
    if isinstance(statistic, WeightStatistic):
        return 0, None if statistic.inputs is None else tuple(statistic.inputs.shape)
    return (statistic.units if isinstance(statistic, UnitStatistic) else statistic.sums.numel()), None


def _finite(statistic: WeightStatistic | UnitStatistic | RowStatistic) -> bool:
    sums = statistic._part if isinstance(statistic, _Divided) else statistic.sums
    return sums is None or bool(torch.isfinite(sums).all())


def shardings_of(model: nn.Module) -> dict[str, Sharding]:
    """How each sharded parameter of a model is divided, by canonical name; nothing for a model that is not sharded.

    Raises:
        ValueError: if one is divided in another way than by ``fully_shard``, or over other processes than the rest.
    """
    model = unwrap(model)
    found = {name: sharding_of(parameter, name) for name, parameter in named_parameters(model).items()}
    shardings = {name: sharding for name, sharding in found.items() if sharding is not None}
    if not shardings:
        return {}
    known = {id(parameter) for module in fsdp_modules(model) for parameter in module.parameters()}
    meshes = {tuple(sharding.mesh.mesh.flatten().tolist()) for sharding in shardings.values()}
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
