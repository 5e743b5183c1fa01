r"""The z+ rule for softmax, and for attention that contains one.

To first order softmax is :math:`s_j \approx \sum_i J_{ji} x_i` with :math:`J_{ji} = s_j (\delta_{ij} - s_i)`. AttnLRP
(Achtibat et al. 2024, prop. 3.1) takes these terms as they are, which is the plain gradient and does not conserve (Taylor);
CP-LRP takes the pattern for a constant; z+ shares relevance among the positive terms alone, and conserves where there are
any. Signs are known: of :math:`i \ne j` the terms with a negative :math:`x_i` are positive, of :math:`i = j` that with a
positive one, so that nothing of the size of the Jacobian is made.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from lrp_prune.engine import functional
from lrp_prune.engine.call import Call, detached, is_activation
from lrp_prune.engine.precision import as_run_now, without_autocast
from lrp_prune.engine.rule import Rule
from lrp_prune.without_data import has_data


@dataclass(frozen=True)
class SoftmaxZPlus(Rule):
    r"""z+ for softmax: :math:`R_i = \sum_j (x_i J_{ji})^+ / \sum_{i'} (x_{i'} J_{ji'})^+ \, R_j`, with the Jacobian J.

    Relevance is conserved where an entry has a positive term. Of ``logsumexp`` the plain gradient, which is a softmax.
    """

    kinds: ClassVar[tuple[str, ...] | None] = ("softmax",)

    def __call__(self, call: Call) -> Any:
        x = call.operand(0)
        dim = call.argument(1, "dim")
        if not is_activation(x) or dim is None or "softm" not in call.function.__name__:
            return call.run()
        of_nothing = call.with_operands([None])
        return softmax_z_plus(x, lambda value: of_nothing.with_operands([value]).run(), dim)


@dataclass(frozen=True)
class AttentionZPlus(Rule):
    """Attention by AttnLRP's shares for its two products (prop. 3.3), and z+ for the softmax between them. Dropout is off."""

    kinds: ClassVar[tuple[str, ...] | None] = ("attention",)

    def __call__(self, call: Call) -> Any:
        call = call.with_arguments({(4, "dropout_p"): 0.0})
        if not any(map(is_activation, call.operands())):
            return call.run()
        query, key, value = (_halved(entry) for entry in call.operands())
        mask, causal = call.argument(3, "attn_mask"), bool(call.argument(5, "is_causal"))
        given = call.argument(6, "scale")
        if key.shape[-3:-2] != query.shape[-3:-2]:  # several heads of queries share one of keys and values
            repeats = query.shape[-3] // key.shape[-3]
            key, value = (entry.repeat_interleave(repeats, -3) for entry in (key, value))
        scores = (query @ key.transpose(-1, -2)) * (1 / math.sqrt(query.shape[-1]) if given is None else given)
        if causal:
            mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        if mask is not None:
            scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
        pattern = softmax_z_plus(scores, lambda rows: torch.softmax(rows, -1).nan_to_num(0.0), -1)
        stand_in = _halved(pattern) @ value
        constant = call.with_operands(list(map(detached, call.operands())))
        constant = constant.with_arguments({(3, "attn_mask"): detached(call.argument(3, "attn_mask"))})
        return functional.replaced(stand_in, constant.run)


def without_masked_rows(result: Any, dim: int) -> None:
    """Hand nothing on from rows that are masked as a whole.

    Such a row of a softmax is not a number. Models that put zeros in its place have a finite value, whose gradient is not finite
    all the same. A value that the row has a part in is none, and told of where it is explained.

    Args:
        result: of a softmax, just computed.
        dim: along which it was taken.
    """
    node = getattr(result, "grad_fn", None)
    if node is None or not has_data(result) or result.dim() == 0 or result.shape[dim] == 0:
        return
    masked = result.detach().narrow(dim, 0, 1).isnan()  # as the whole row is, if one of its entries is
    if masked.is_cpu and not bool(masked.any()):
        return

    def zeroed(gradients: tuple[Tensor | None, ...], _: Any) -> tuple[Tensor | None, ...]:
        own = gradients[0]
        return (None if own is None else own.masked_fill(masked, 0.0), *gradients[1:])

    node.register_hook(zeroed)


def _halved(value: Any) -> Any:
    return functional.scaled_gradient(value, 0.5) if is_activation(value) else value


class _SoftmaxZPlus(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, function: Callable[[Tensor], Tensor], dim: int) -> Tensor:
        ctx.save_for_backward(x)
        ctx.function, ctx.dim = as_run_now(function, x.device), dim
        return function(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (x,) = ctx.saved_tensors
        with torch._C.DisableTorchFunction(), without_autocast(x.device):
            wide = torch.promote_types(x.dtype, torch.float32)
            s = ctx.function(x).to(wide)
            rows = x.to(wide).nan_to_num(0.0, 0.0, 0.0)  # what is masked has none
            positive, negative = rows.clamp(min=0) * (1 - s), rows.clamp(max=0).neg_() * s
            total = positive + negative.sum(ctx.dim, keepdim=True) - negative  # over s, like what is shared
            share = (s * gradient.to(wide) / total).nan_to_num_(0.0, 0.0, 0.0)
            relevance = positive * share + negative * (share.sum(ctx.dim, keepdim=True) - share)
            return (relevance / rows).nan_to_num_(0.0, 0.0, 0.0).to(x.dtype), None, None


softmax_z_plus: Callable[[Tensor, Callable[[Tensor], Tensor], int], Tensor] = _SoftmaxZPlus.apply
softmax_by_z_plus, attention_by_z_plus = SoftmaxZPlus(), AttentionZPlus()
