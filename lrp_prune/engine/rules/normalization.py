"""Normalisations: what subtracts a mean, divides by a deviation, and scales. Their rules, and their plain gradient.

Batch normalisation with running statistics is an affine map, and is propagated as one under every composite: torch's own
backward of it is wrong on the CPU for one image whose output's gradient lies in memory like ``[height, width, channels]``.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from lrp_prune.engine import functional
from lrp_prune.engine.call import Call, detached, is_activation
from lrp_prune.engine.operations import Signature
from lrp_prune.engine.rule import Rule
from lrp_prune.engine.rules.folding import normalized


class _Statistic(NamedTuple):
    """What the entries of ``x.reshape(shape)`` along the last axis share, and how they are scaled afterwards."""

    shape: tuple[int, ...]
    eps: float
    weight: Tensor | None
    centered: bool


class _Channels(NamedTuple):
    """The arguments of batch and instance normalisation."""

    weight: Tensor | None
    bias: Tensor | None
    mean: Tensor | None
    variance: Tensor | None
    measured: bool
    """Whether mean and variance are those of the input."""
    eps: float


@dataclass(frozen=True)
class ConstantStatistic(Rule):
    """The deviation that a normalisation divides by is a constant (AttnLRP, prop. 3.4; the identity rule of LRP for norms).

    Batch normalisation's mean is one as well, whether it is the running one or that of the batch.
    """

    kinds: ClassVar[tuple[str, ...] | None] = ("normalization",)

    def __call__(self, call: Call) -> Any:
        x = call.operand(0)
        if _scaled_by_activations(call):
            return _with_activations(call, self, 0.5)
        if _keeps_statistics(call):
            channels = _channels(call)
            if _signature(call).over == "batch" or not channels.measured:
                return _affine(call, channels)
        statistic = _STATISTICS[_signature(call).over](call)

        def inverse_deviation(rows: Tensor) -> Tensor:
            wide = rows.to(torch.promote_types(rows.dtype, torch.float32))
            spread = (
                wide.var(-1, keepdim=True, unbiased=False)
                if statistic.centered
                else wide.square().mean(-1, keepdim=True)
            )
            return torch.rsqrt(spread + statistic.eps)

        return functional.constant_statistic(
            x, _function(call), inverse_deviation, statistic.shape, statistic.weight, statistic.centered
        )


@dataclass(frozen=True)
class PlainNormalization(Rule):
    """The plain gradient, also where torch's own backward gets the order of the gradient's memory wrong."""

    kinds: ClassVar[tuple[str, ...] | None] = ("normalization",)

    def __call__(self, call: Call) -> Any:
        if not _keeps_statistics(call):
            return call.run()
        if _scaled_by_activations(call):
            return _with_activations(call, self, 1.0)
        channels = _channels(call)
        if not channels.measured:
            return _affine(call, channels)
        return functional.contiguous_gradient(call.operand(0), _function(_without_buffers(call)))


def _scale_and_shift(call: Call) -> list[tuple[int, str]]:
    """Where the arguments ``weight`` and ``bias`` are."""
    arguments = _signature(call).arguments
    return [(arguments.index(name), name) for name in ("weight", "bias") if name in arguments]


def _keeps_statistics(call: Call) -> bool:
    """Whether it may use statistics that were measured before, as batch and instance normalisation do."""
    return "running_mean" in _signature(call).arguments


def _scaled_by_activations(call: Call) -> bool:
    return any(is_activation(call.argument(*place)) for place in _scale_and_shift(call))


def _with_activations(call: Call, rule: Callable[[Call], Any], share: float) -> Any:
    """A normalisation whose scale or shift the model computes: that of the input alone, times and plus an activation.

    Args:
        rule: what normalises the input alone.
        share: what the gradients of a product's factors are multiplied by.
    """
    places = _scale_and_shift(call)
    weight, bias = [call.argument(*place) for place in places] + [None] * (2 - len(places))
    result = rule(call.with_arguments({place: None for place in places}))
    if weight is not None:
        weight = _aligned(call, weight)
        if is_activation(weight) and is_activation(result):
            result, weight = functional.scaled_gradient(result, share), functional.scaled_gradient(weight, share)
        result = result * weight
    if bias is not None:
        result = result + _aligned(call, bias)
    constant = call.with_operands([detached(call.operand(0))]).with_arguments(
        {place: detached(call.argument(*place)) for place in places}
    )
    return functional.replaced(result, constant.run)


def _aligned(call: Call, values: Tensor) -> Tensor:
    """Scale or shift in a shape that broadcasts to the input."""
    aligned = _per_channel(values, call.operand(0)) if _signature(call).per_channel else values
    assert aligned is not None
    return aligned


def _function(call: Call) -> Callable[[Tensor], Tensor]:
    """The call as a function of its input, which it does not hold."""
    of_nothing = call.with_operands([None])

    def function(value: Tensor) -> Tensor:
        result: Tensor = of_nothing.with_operands([value]).run()
        return result

    return function


def _affine(call: Call, channels: _Channels) -> Any:
    """Batch norm with mean and variance as constants: ``weight / sqrt(variance + eps)`` for each channel."""
    x, mean, variance = call.operand(0), channels.mean, channels.variance
    if channels.measured:
        call, mean = _without_buffers(call), None
        variance = torch.var(x.detach(), [dim for dim in range(x.dim()) if dim != 1], unbiased=False)
    assert variance is not None
    scale = torch.rsqrt(variance.to(torch.promote_types(variance.dtype, torch.float32)) + channels.eps)
    scale = scale if channels.weight is None else scale * channels.weight
    if mean is None:
        return functional.affine(x, _function(call), scale.reshape(-1, *(1,) * (x.dim() - 2)))
    shift = (
        -mean * scale if channels.bias is None else torch.addcmul(channels.bias.to(scale.dtype), mean, scale, value=-1)
    )
    return normalized(x, _function(call), scale, shift)


def _without_buffers(call: Call) -> Call:
    """The call with the input's own statistics, that leaves the running ones alone."""
    return call.with_arguments({(3, "running_mean"): None, (4, "running_var"): None})


def _channels(call: Call) -> _Channels:
    """The arguments of batch and instance normalisation."""
    given = _arguments(call)
    mean = given.get("running_mean")
    measured = bool(given.get("training") or given.get("use_input_stats")) or mean is None
    return _Channels(
        given.get("weight"), given.get("bias"), mean, given.get("running_var"), measured, given.get("eps", 1e-5)
    )


def _last_statistic(call: Call) -> _Statistic:
    """Of layer and RMS norm: over the last dimensions."""
    x, given = call.operand(0), _arguments(call)
    count, eps, centered = len(given["normalized_shape"]), given.get("eps"), _signature(call).centered
    if eps is None:
        eps = 1e-5 if centered else torch.finfo(x.dtype).eps
    shape = (*x.shape[:-count], x.shape[-count:].numel())
    return _Statistic(shape, eps, given.get("weight"), centered)


def _group_statistic(call: Call) -> _Statistic:
    x, given = call.operand(0), _arguments(call)
    shape = (x.shape[0], given["num_groups"], x[0].numel() // given["num_groups"])
    return _Statistic(shape, given.get("eps", 1e-5), _per_channel(given.get("weight"), x), centered=True)


def _position_statistic(call: Call) -> _Statistic:
    x, channels = call.operand(0), _channels(call)
    return _Statistic((*x.shape[:2], x[0, 0].numel()), channels.eps, _per_channel(channels.weight, x), centered=True)


def _per_channel(weight: Tensor | None, input: Tensor) -> Tensor | None:
    return None if weight is None else weight.reshape(-1, *(1,) * (input.dim() - 2))


_STATISTICS: dict[str, Callable[[Call], _Statistic]] = {
    "last": _last_statistic,
    "groups": _group_statistic,
    "positions": _position_statistic,
}
"""By what shares a statistic, see :class:`~lrp_prune.engine.operations.Signature`."""


def _signature(call: Call) -> Signature:
    assert call.operation.signature is not None
    return call.operation.signature


def _arguments(call: Call) -> dict[str, Any]:
    """The arguments that were given, by name."""
    return {**dict(zip(_signature(call).arguments, call.args, strict=False)), **call.kwargs}


constant_statistic, plain_normalization = ConstantStatistic(), PlainNormalization()
