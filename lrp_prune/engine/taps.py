"""The product of a recurrent weight with the states of all steps, observed at once.

A state is known when the step before it is, so that the product is made step by step; but what relevance of the weight needs
is, as for any other, one contraction of activations ``[samples, tokens, in]`` and propagated gradients
``[samples, tokens, out]``.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from lrp_prune.engine.call import Call, is_activation
from lrp_prune.engine.precision import without_autocast
from lrp_prune.engine.rule import Rule
from lrp_prune.engine.uses import Observer, Use, WeightUses


class RecurrentProduct:
    """``W h_t + b`` at each step.

    Args:
        uses: finds what observes the weight.
        call: of the product, with its rule: ``linear(state, weight)`` with a weight ``[out, in]``.
        bias: ``[out]``, or None.
        places: samples and tokens.
        active: tensors that relevance flows to through the steps; it is known to all when it has left the last of them.
        valid: which places ``[samples, tokens]`` are no padding; None for all.
    """

    def __init__(
        self,
        uses: WeightUses,
        call: Call,
        bias: Tensor | None,
        places: tuple[int, int],
        active: Sequence[Tensor],
        valid: Tensor | None = None,
    ) -> None:
        weight: Tensor = call.operand(1)
        self._call, self._weight, self._bias, self._valid = call, weight, bias, valid
        self._plain = call.rule is None or call.rule.is_plain_for_one
        self._states: list[Tensor] = [weight] * places[1]
        self._use, self._observers = uses.of_linear(weight, all_tokens=valid is not None)
        self._showing = uses.showing
        late = [observer for observer in self._observers if observer.backward_needed]
        self._taps: tuple[Tensor, ...] | None = None
        if late and active:
            shape = (*places, weight.shape[0])
            self._taps = _tapped(weight.new_zeros(shape), self.states, self._use, call.rule, late, *active).unbind(1)

    def at(self, token: int) -> Callable[[Tensor], Tensor]:
        """The product at a step."""

        def product(state: Tensor) -> Tensor:
            self._states[token] = state.detach()
            result = self._multiplied(state)
            # Of a constant state, as the first one is, the product is a constant to all rules that it meets later.
            return result if self._taps is None or not is_activation(state) else result + self._taps[token]

        return product

    def _multiplied(self, state: Tensor) -> Tensor:
        if self._plain or not is_activation(state):
            return F.linear(state, self._weight, self._bias)
        result: Tensor = self._call._replace(args=(state, self._weight)).ruled()
        return result if self._bias is None else result + self._bias

    def shown(self) -> None:
        """All steps are made: show the states to those who need no more."""
        if self._observers and self._showing:
            states = self.states()
            for observer in self._observers:
                assert self._use is not None
                observer.forward(self._use, states)

    def states(self) -> Tensor:
        """What it was multiplied with at each step, ``[samples, tokens, in]``, without padding."""
        states = torch.stack(self._states, 1)
        return states if self._valid is None else states * self._valid[..., None].to(states.dtype)


class _Tap(Function):
    """Zeros that are added where a product is made; their gradient is the one that is propagated there."""

    @staticmethod
    def forward(
        ctx: Any,
        zeros: Tensor,
        states: Callable[[], Tensor],
        use: Use,
        rule: Rule | None,
        observers: list[Observer],
        *active: Tensor,
    ) -> Tensor:
        ctx.states, ctx.use, ctx.rule, ctx.observers = states, use, rule, observers
        ctx.none = [None] * len(active)
        return zeros

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor | None, ...]:
        with torch._C.DisableTorchFunction(), without_autocast(d.device):
            states = ctx.states()
            use = ctx.use.told(ctx.rule, states, d)
            for observer in ctx.observers:
                # Those of weights do not look at what goes on to the states: it does so step by step.
                observer.backward(use, states, d, states)
        return None, None, None, None, None, *ctx.none


_tapped: Callable[..., Tensor] = _Tap.apply
