"""The observers of one collection: which weights and units are scored, and what comes of their sums."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lrp_prune.attribution.roots import Root
from lrp_prune.attribution.statistics import (
    MAGNITUDES,
    BatchLayout,
    InputNorm,
    RowStatistic,
    WeightStatistic,
)
from lrp_prune.attribution.tracing import UnitTracer
from lrp_prune.attribution.unit_observers import UNIT_KINDS, Choice, UnitObservers, Units
from lrp_prune.attribution.unit_table import layer_of
from lrp_prune.attribution.uses import Observer, Use
from lrp_prune.members import Member
from lrp_prune.names import class_name, matches, named_parameters, unwrap
from lrp_prune.relevance import STATISTICS, Relevance, granularities_of


def scored_parameters(
    model: nn.Module,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
    trainable_only: bool = False,
    embeddings: bool = False,
) -> dict[str, nn.Parameter]:
    """The weights that are scored: two and more dimensions, no embedding and no output embedding, unless included by name.

    Raises:
        ValueError: if a pattern matches no parameter, nothing is left, or a weight is quantized.
    """
    parameters = named_parameters(model)
    for pattern in (*(include or ()), *(exclude or ())):
        if not any(matches(name, [pattern]) for name in parameters):
            raise ValueError(
                f"pattern {pattern!r} matches no parameter; there are {', '.join(list(parameters)[:4])}, ..."
            )
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding | nn.EmbeddingBag)}
    outputs = _output_embeddings(model)
    chosen: dict[str, nn.Parameter] = {}
    for name, parameter in parameters.items():
        if parameter.dim() < 2 or matches(name, exclude):
            continue
        if include is not None:
            if matches(name, include):
                chosen[name] = parameter
        elif embeddings:
            if id(parameter) in tables:
                chosen[name] = parameter
        elif id(parameter) not in tables | outputs and (parameter.requires_grad or not trainable_only):
            chosen[name] = parameter
    quantized = [name for name, parameter in parameters.items() if not parameter.is_floating_point()]
    if quantized and any(matches(name, include) if include else True for name in quantized):
        raise ValueError(
            f"{quantized[0]} is quantized ({parameters[quantized[0]].dtype}): load the model in a floating-point type"
        )
    if not chosen:
        why = (
            "none requires grad" if trainable_only and include is None else f"include={include!r}, exclude={exclude!r}"
        )
        raise ValueError(f"{type(model).__name__} has no weight to score: {why}")
    return chosen


def _output_embeddings(model: nn.Module) -> set[int]:
    """The weights that turn hidden states into logits over a vocabulary, as Hugging Face models name them."""
    found = set()
    for module in model.modules():
        getter = getattr(module, "get_output_embeddings", None)
        head = getter() if callable(getter) else None
        weight = getattr(head, "weight", None)
        if isinstance(weight, nn.Parameter):
            found.add(id(weight))
    return found


def _auto_dtype(parameter: Tensor) -> torch.dtype | None:
    """bfloat16 where the device multiplies it faster than float32, and has its range in place of float16's."""
    if parameter.dtype not in (torch.float32, torch.float16):
        return None
    if parameter.device.type == "cpu":
        return torch.bfloat16 if torch.ops.mkldnn._is_mkldnn_bf16_supported() else None
    return torch.bfloat16 if parameter.device.type == "cuda" and torch.cuda.is_bf16_supported() else None


class NothingScoredError(ValueError):
    """There is nothing of the kind that was asked for, or no relevance reaches it."""


class ObserverTable:
    """Makes an observer for each scored weight or unit group at its first use, and the relevance in the end."""

    def __init__(
        self,
        model: nn.Module,
        *,
        statistic: str,
        granularity: str | Sequence[str],
        include: Sequence[str] | None,
        exclude: Sequence[str] | None,
        trainable_only: bool,
        accumulate_on: str | torch.device | None,
        matmul_dtype: str | torch.dtype | None,
    ) -> None:
        if statistic not in (*STATISTICS, "input_norm", "structure"):
            raise ValueError(f"statistic must be one of {STATISTICS}, got {statistic!r}")
        kinds = granularities_of(granularity)
        granularity = ",".join(kinds)
        if statistic == "geometric" and granularity != "weight":
            raise ValueError(f"statistic 'geometric' is about weights, not {granularity}s: use 'squared_token'")
        if isinstance(matmul_dtype, str) and matmul_dtype != "auto":
            matmul_dtype = getattr(torch, matmul_dtype)
        self._model, self._statistic, self._granularity = unwrap(model), statistic, granularity
        self._device, self._dtype = accumulate_on, matmul_dtype
        self.batch = BatchLayout()
        self.parameters = scored_parameters(self._model, include, exclude, trainable_only, granularity == "embedding")
        self._all = named_parameters(self._model)
        self.active: set[str] | None = None
        """The weights that are collected in this pass; None for all."""
        self._statistics: dict[str, WeightStatistic | RowStatistic] = {}
        self._members: dict[str, tuple[Member, ...]] = {}
        self._layouts: dict[str, str] = {}
        self._units: UnitObservers | None = None
        if set(kinds) <= set(UNIT_KINDS):
            choice = Choice(self.parameters, include, exclude, trainable_only)
            self._units = UnitObservers(kinds, statistic, self.batch, self._all, choice)

    @property
    def tracer(self) -> UnitTracer | None:
        """Follows units, if it is about any."""
        return None if self._units is None else self._units.tracer

    @property
    def backward_needed(self) -> bool:
        """Whether anything is propagated, or the forward tells all."""
        return self._statistic not in ("input_norm", "structure")

    @property
    def kept(self) -> torch.dtype | None:
        """The precision in which rules may keep activations: that in which relevance passes all of the weights."""
        if self._granularity != "weight" or self._statistic not in MAGNITUDES:
            return None
        wanted = {self._matmul_dtype(parameter) for parameter in self.parameters.values()}
        return wanted.pop() if len(wanted) == 1 else None

    def observers(self, use: Use) -> list[Observer]:
        """What observes a use."""
        if self._granularity == "weight":
            return self._weight_used(use) if self._collects(use.origin.name) else []
        return [] if self._units is None else self._units.observers(use)

    def _collects(self, name: str) -> bool:
        return name in self.parameters and (self.active is None or name in self.active)

    def make_room(self) -> None:
        """Allocate the sums of all weights that the forward used, before the backward pass."""
        for statistic in self._weight_statistics():
            statistic.make_room()

    def passed(self) -> None:
        """The batch is over."""
        for statistic in self._weight_statistics():
            statistic.passed()
        self.batch.finish()

    def _weight_statistics(self) -> Iterator[WeightStatistic]:
        return (found for found in self._statistics.values() if isinstance(found, WeightStatistic))

    def park(self, names: Iterable[str], device: torch.device) -> None:
        """Move the sums of weights to a device where they only wait."""
        for name in names:
            statistic = self._statistics.get(name)
            if isinstance(statistic, WeightStatistic):
                statistic.park(device)

    def _weight_used(self, use: Use) -> list[Observer]:
        name, layout = use.origin.name, use.layout()
        if layout is not None:
            self._layouts.setdefault(name, layout)
        return [self._weight(name)]

    def _weight(self, name: str) -> WeightStatistic:
        found = self._statistics.get(name)
        if found is None:
            parameter = self.parameters[name]
            kind = InputNorm if self._statistic == "input_norm" else WeightStatistic
            dtype = self._matmul_dtype(parameter)
            found = self._statistics[name] = kind(name, parameter, self._statistic, self.batch, dtype, self._device)
        assert isinstance(found, WeightStatistic)
        return found

    def _matmul_dtype(self, parameter: Tensor) -> torch.dtype | None:
        dtype = _auto_dtype(parameter) if self._dtype == "auto" else self._dtype
        assert not isinstance(dtype, str)
        return dtype

    def add_root(self, root: Root, gradient: Tensor) -> None:
        """Add what arrived at an embedding's output, if the embedding is scored."""
        name = root.parameter
        if root.ids is None or name is None or not self._collects(name):
            return
        if self._granularity == "weight":
            self._weight(name).add_rows(root.ids, gradient)
        elif self._granularity == "embedding":
            self._rows(name).add_rows(root.ids, root.leaf.detach() * gradient)

    def add_lookup(self, root: Root) -> None:
        """Add what the forward alone tells of an embedding's rows, if the embedding is scored."""
        name = root.parameter
        if self._granularity == "embedding" and root.ids is not None and name is not None and self._collects(name):
            self._rows(name).add_rows(root.ids, root.leaf.detach())

    def _rows(self, name: str) -> RowStatistic:
        found = self._statistics.get(name)
        if found is None:
            shape = self._all[name].shape
            found = self._statistics[name] = RowStatistic(name, int(shape[0]), self._statistic)
            self._members[name] = (Member.of_slices(name, shape, 0, int(shape[0])),)
        assert isinstance(found, RowStatistic)
        return found

    def finish(self, **description: Any) -> Relevance:
        """The relevance of everything scored, in the model's order.

        Raises:
            NothingScoredError: if nothing was scored.
            FloatingPointError: if a sum is not finite.
        """
        order = [name for name in self.parameters if name in self._statistics] if self._granularity == "weight" else []
        names = dict.fromkeys((*order, *self._statistics))
        sums: dict[str, Tensor] = {}
        inputs: dict[str, Tensor] = {}
        mean_weights: dict[str, Tensor] = {}
        for name in names:
            statistic = self._statistics[name]
            values = statistic.finish()
            if values is None:
                continue
            if not bool(torch.isfinite(values.sum())) and not bool(torch.isfinite(values).all()):
                raise FloatingPointError(
                    f"the relevance of {name!r} is not finite: check the batches and the precision"
                )
            sums[name] = values
            if isinstance(statistic, WeightStatistic) and statistic.inputs is not None:
                weights = statistic.mean_weights()
                assert weights is not None
                # Where the values are: they are read together.
                inputs[name], mean_weights[name] = statistic.inputs.to(values.device), weights.to(values.device)
        left: dict[str, str] = {}
        if self._units is not None:
            units = self._finished_units()
            sums, left = units.sums, units.left
            self._members = units.members
        if not sums:
            raise NothingScoredError(self._nothing(left))
        touched = {member.parameter for members in self._members.values() for member in members} or set(sums)
        unscored = tuple(name for name in self.parameters if name not in sums) if self._granularity == "weight" else ()
        self._statistics = {}
        return Relevance(
            sums,
            granularity=self._granularity,
            statistic=self._statistic,
            model=fingerprint(self._model),
            members={name: members for name, members in self._members.items() if name in sums},
            parameter_shapes={name: tuple(self._all[name].shape) for name in self._all if name in touched},
            unscored=unscored,
            inputs=inputs,
            mean_weights=mean_weights,
            layouts={name: layout for name, layout in self._layouts.items() if name in sums},
            **description,
        )

    def _finished_units(self) -> Units:
        assert self._units is not None
        return self._units.finish()

    def _nothing(self, left: Mapping[str, str]) -> str:
        """Why there is nothing to read."""
        model, what = type(self._model).__name__, self._granularity
        if self._units is None:
            return (
                f"no {what} received relevance in {model}: its weights are used in no operation that is observed, or the rules "
                "stop before them"
            )
        if what == "block":
            return f"{model} has no block: none of its layers writes onto a residual stream (x + f(x))"
        if what == "head":
            return f"{model} has no head: no layer reads what an attention writes"
        asked = [f"{layer_of(name)}: {why}" for name, why in left.items() if name in self.parameters]
        reasons = "; ".join(asked[:3])
        return f"{model} has no {what} that could be removed" + (f" ({reasons})" if reasons else "")


def fingerprint(model: nn.Module) -> str:
    """The model's class and the number of its parameters: what relevance must agree in to be merged."""
    model = unwrap(model)
    return f"{class_name(model)}, {sum(parameter.numel() for parameter in model.parameters())} parameters"
