"""Autograd functions with the forward of the original operation and a backward whose gradient x input is the relevance.

All keep the forward value bit for bit. None returns a view where a model may add in place (autograd refuses that),
and all bypass torch-function modes in backward, so that no rule is applied to a rule.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from lrp_prune.engine.precision import as_run_now, without_autocast

_bypass = torch._C.DisableTorchFunction


def own_memory(result: Tensor) -> Tensor:
    """The result of a product as a tensor of its own, in the same memory.

    That of a linear layer with a bias is a view of what was multiplied, which autograd lets nobody change in place; a
    residual stream may be added to it.
    """
    if not result._is_view():
        return result
    storage = result.untyped_storage()
    return result.new_empty(0).set_(storage, result.storage_offset(), result.shape, result.stride())


class ScaledGradient(Function):
    """The identity, whose gradient is multiplied by a constant. For operands of an operation, never for its result."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.detach()  # a view would have other strides along dimensions of size one

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        with _bypass():
            return gradient * ctx.factor, None


class IdentityRule(Function):
    r"""An elementwise function that hands its relevance on unchanged (AttnLRP, arXiv 2402.05602, eq. 9).

    Gradient form: :math:`\partial f / \partial x := f(x) / x`, 0 where ``x = 0``. Until then ``x`` is kept, in the precision
    ``kept`` if that is less than its own, and the function is computed once more: it must not draw random numbers.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, function: Callable[[Tensor], Tensor], kept: torch.dtype | None = None) -> Tensor:
        ctx.function, ctx.dtype = as_run_now(function, x.device), x.dtype
        # Neither the output, which the model may add to in place, nor the ratio, which many are never asked for.
        ctx.save_for_backward(x if kept is None or kept.itemsize >= x.itemsize else x.to(kept))
        return function(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (x,) = ctx.saved_tensors
        with _bypass(), without_autocast(x.device):
            x = x.to(ctx.dtype)  # in which the function was computed, and its own parameters are
            ratio = (ctx.function(x) / x).nan_to_num_(0.0, 0.0, 0.0)  # only x = 0 gives nan or infinity
            return ratio.mul_(gradient).to(ctx.dtype), None, None


class AbsorbingIdentity(Function):
    """:class:`IdentityRule` of a function that is not zero at zero: what it makes of zeros is a constant's.

    Args (of ``apply``):
        x: the input.
        one: a tensor of one, which gets the relevance of entries that are zero.
        function: computes the output from the input.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, one: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.function = as_run_now(function, x.device)
        ctx.save_for_backward(x)
        return function(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        (x,) = ctx.saved_tensors
        with _bypass(), without_autocast(x.device):
            made = ctx.function(x)
            absorbed = (made * gradient).masked_fill_(x != 0, 0.0).sum()
            ratio = (made / x).nan_to_num_(0.0, 0.0, 0.0).masked_fill_(x == 0, 0.0)
            return ratio.mul_(gradient).to(x.dtype), absorbed.to(x.dtype), None


class BesideConstant(Function):
    """The identity on what a constant is added to, whose gradient tells the constant's. For operands, never for results.

    Args (of ``apply``):
        x: an operand.
        leaf: the constant, a scalar.
        factor: by what the gradient of the operand is multiplied to be that of the constant, entry by entry.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, leaf: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.detach()  # a view would have other strides along dimensions of size one

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        with _bypass():
            return gradient, gradient.sum() * ctx.factor, None


class ConstantStatistic(Function):
    r"""A normalisation whose standard deviation is a constant (AttnLRP, arXiv 2402.05602, prop. 3.4).

    :math:`y = (x - \mathrm{mean}(x)) \, s \, w + b` with ``s`` fixed; without the mean for RMS norm. Mean and ``s`` are taken
    over the last axis of ``x`` seen as ``shape``.

    Args (of ``apply``):
        x: the input.
        function: computes the output from the input.
        inverse_deviation: ``s``, from the input, broadcastable to ``x.reshape(shape)``.
        shape: ``x`` as ``[..., entries that share a statistic]``.
        weight: broadcastable to ``x``, or None.
        centered: whether the mean is subtracted.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        function: Callable[[Tensor], Tensor],
        inverse_deviation: Callable[[Tensor], Tensor],
        shape: tuple[int, ...],
        weight: Tensor | None,
        centered: bool,
    ) -> Tensor:
        ctx.shape, ctx.centered, ctx.dtype = shape, centered, x.dtype
        ctx.save_for_backward(inverse_deviation(x.reshape(shape)), weight)
        return function(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        scale, weight = ctx.saved_tensors
        with _bypass():
            passed = gradient if weight is None else gradient * weight
            rows = passed.reshape(ctx.shape)
            if ctx.centered:
                rows = rows - rows.mean(-1, keepdim=True)
            result = (rows * scale).reshape(gradient.shape).to(ctx.dtype)
        return result, None, None, None, None, None


class Affine(Function):
    r"""A function with the gradient :math:`\partial f / \partial x := s`, where ``s`` broadcasts to ``x``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, function: Callable[[Tensor], Tensor], scale: Tensor) -> Tensor:
        ctx.dtype = x.dtype
        ctx.save_for_backward(scale)
        return function(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (scale,) = ctx.saved_tensors
        with _bypass():
            return (gradient * scale).to(ctx.dtype), None, None


class ContiguousGradient(Function):
    """A function with its plain gradient, for which input and gradient are laid out as torch lays them out by default.

    It is computed once more in the backward pass. For operations whose own backward relies on an order in memory.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.function = as_run_now(function, x.device)
        ctx.save_for_backward(x)
        return function(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        with _bypass(), torch.enable_grad():
            # clone(), since contiguous() does not mind the strides of dimensions of size one
            leaf = x.detach().clone(memory_format=torch.contiguous_format).requires_grad_()
            result = ctx.function(leaf)
            (found,) = torch.autograd.grad(result, leaf, gradient.clone(memory_format=torch.contiguous_format))
        return found, None


class Replaced(Function):
    """A tensor with another's value: what is propagated is propagated through the one, the model goes on with the other.

    Args (of ``apply``):
        stand_in: what is propagated through; equal to the value up to rounding.
        value: computes the tensor that the model gets, without a history.
    """

    @staticmethod
    def forward(ctx: Any, stand_in: Tensor, value: Callable[[], Tensor]) -> Tensor:
        ctx.dtype = stand_in.dtype
        return value()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient.to(ctx.dtype), None


scaled_gradient: Callable[[Tensor, float], Tensor] = ScaledGradient.apply
identity_rule: Callable[..., Tensor] = IdentityRule.apply
absorbing_identity: Callable[[Tensor, Tensor, Callable[[Tensor], Tensor]], Tensor] = AbsorbingIdentity.apply
beside_constant: Callable[[Tensor, Tensor, float], Tensor] = BesideConstant.apply
constant_statistic: Callable[..., Tensor] = ConstantStatistic.apply
affine: Callable[[Tensor, Callable[[Tensor], Tensor], Tensor], Tensor] = Affine.apply
contiguous_gradient: Callable[[Tensor, Callable[[Tensor], Tensor]], Tensor] = ContiguousGradient.apply
replaced: Callable[[Tensor, Callable[[], Tensor]], Tensor] = Replaced.apply
