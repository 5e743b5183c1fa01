"""The observers of one collection: which weights and units are scored, and what comes of their sums."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lrp_prune.attribution.roots import Root
from lrp_prune.attribution.statistics import (
    MAGNITUDES,
    BatchLayout,
    InputNorm,
    RowStatistic,
    UnitStatistic,
    WeightStatistic,
)
from lrp_prune.attribution.uses import Observer, Use
from lrp_prune.names import class_name, matches, named_parameters, unwrap
from lrp_prune.relevance import GRANULARITIES, STATISTICS, Member, Relevance


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


class ObserverTable:
    """Makes an observer for each scored weight or unit group at its first use, and the relevance in the end."""

    def __init__(
        self,
        model: nn.Module,
        *,
        statistic: str,
        granularity: str,
        include: Sequence[str] | None,
        exclude: Sequence[str] | None,
        trainable_only: bool,
        accumulate_on: str | torch.device | None,
        matmul_dtype: str | torch.dtype | None,
    ) -> None:
        if statistic not in (*STATISTICS, "input_norm"):
            raise ValueError(f"statistic must be one of {STATISTICS}, got {statistic!r}")
        if granularity not in GRANULARITIES:
            raise ValueError(f"granularity must be one of {GRANULARITIES}, got {granularity!r}")
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
        self._statistics: dict[str, WeightStatistic | UnitStatistic | RowStatistic] = {}
        self._members: dict[str, tuple[Member, ...]] = {}
        self._layouts: dict[str, str] = {}

    @property
    def tracing(self) -> bool:
        """Whether activations must be tagged."""
        return self._granularity in ("neuron", "head", "block")

    @property
    def backward_needed(self) -> bool:
        """Whether anything is propagated, or the forward tells all."""
        return self._statistic != "input_norm"

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
        if not self.tracing or use.form.channel_dim is None or use.tag is None:
            return []
        return self._units(use)

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

    def _units(self, use: Use) -> list[Observer]:
        name, dim = use.origin.name, use.origin.dim(use.form.in_axis)
        tag = use.tag
        assert tag is not None
        channels = int(use.weight.shape[use.form.in_axis])
        heads = tag.head_width is not None and channels % tag.head_width == 0
        wanted = {"head": heads, "neuron": bool(tag.units), "block": heads or bool(tag.units)}[self._granularity]
        if (
            not wanted
            or dim is None
            or not (name in self.parameters or any(entry[0] in self.parameters for entry in tag.producers))
        ):
            return []
        group = name.removesuffix(".weight")
        known = self._statistics.get(group)
        if isinstance(known, UnitStatistic):
            return [known]
        members: list[Member] = []
        if self._granularity == "block":
            units = 1
            members.append(Member(name, 0, self._all[name].shape[0]))
            bias = f"{group}.bias"
            if bias in self._all:
                members.append(Member(bias, 0, self._all[bias].shape[0]))
        elif heads:
            assert tag.head_width is not None
            units = channels // tag.head_width
            members.append(Member(name, dim, tag.head_width))
        else:
            units = tag.units if channels % tag.units == 0 else channels
            members.append(Member(name, dim, channels // units))
            if units == tag.units:
                members += [Member(entry, axis, 1) for entry, axis, _ in sorted(tag.producers)]
                members += [Member(bias, 0, 1) for _, _, bias in sorted(tag.producers) if bias]
        self._members[group] = tuple(members)
        found = self._statistics[group] = UnitStatistic(group, units, self._statistic, self.batch)
        return [found]

    def add_root(self, root: Root, gradient: Tensor) -> None:
        """Add what arrived at an embedding's output, if the embedding is scored."""
        name = root.parameter
        if root.ids is None or name is None or not self._collects(name):
            return
        if self._granularity == "weight":
            self._weight(name).add_rows(root.ids, gradient)
        elif self._granularity == "embedding":
            found = self._statistics.get(name)
            if found is None:
                found = self._statistics[name] = RowStatistic(name, self._all[name].shape[0], self._statistic)
                self._members[name] = (Member(name, 0, 1),)
            assert isinstance(found, RowStatistic)
            found.add_rows(root.ids, root.leaf.detach() * gradient)

    def finish(self, **description: Any) -> Relevance:
        """The relevance of everything scored, in the model's order.

        Raises:
            ValueError: if nothing was scored.
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
        if not sums:
            why = "its weights are used in no operation that is observed"
            if names:
                why = f"the explained value does not depend on {', '.join(list(names)[:3])}, or the rules stop before"
            raise ValueError(f"no {self._granularity} received relevance in {type(self._model).__name__}: {why}")
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


def fingerprint(model: nn.Module) -> str:
    """The model's class and the number of its parameters: what relevance must agree in to be merged."""
    model = unwrap(model)
    return f"{class_name(model)}, {sum(parameter.numel() for parameter in model.parameters())} parameters"
