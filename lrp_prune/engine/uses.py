"""Weight uses: where a weight meets an activation, what arrives there is shown to observers.

The gradient that reaches a use is the propagated one, so ``(a, d)`` there is all that weight relevance needs: no weight
gradient is made, and nothing is kept per batch.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.autograd.graph import GradientEdge, get_gradient_edge

from lrp_prune.engine.call import Call, is_activation
from lrp_prune.engine.forms import Convolution, Form, TransposedConvolution, form_of
from lrp_prune.engine.functional import own_memory
from lrp_prune.engine.held import Held, Switch
from lrp_prune.engine.nested import is_transformed
from lrp_prune.engine.operands import Latest
from lrp_prune.engine.operations import OPERATIONS
from lrp_prune.engine.origins import Origin, marked
from lrp_prune.engine.precision import without_autocast
from lrp_prune.engine.rules.layers import Layer, widened
from lrp_prune.engine.rules.linear import Terms, Watching, ruled
from lrp_prune.engine.rules.messages import Message, arrival
from lrp_prune.engine.saved import Saving
from lrp_prune.engine.tracing import Reading, UnitTracer


class Use:
    """One use of a weight in a forward.

    Args:
        form: how it meets the activation.
        weight: its values there.
        origin: which parameter's these are.
        reading: the units that it reads, where units are followed.
        all_tokens: whether padding is none of the activation's, so that all of its tokens count.
        constant: whether it is no activation, but a constant, which nothing is propagated to.
        messages: how relevance comes back to it by the terms of the layer's rule; None for the plain gradient.
        scale: by what the weight multiplies each channel of the activation besides, where a normalisation before the layer is
            folded into it; None for nothing.
        edge: the activation's in the graph, which tells the order of its rows; None where there is none.
    """

    def __init__(
        self,
        form: Form,
        weight: Tensor,
        origin: Origin,
        reading: Reading | None = None,
        all_tokens: bool = False,
        constant: bool = False,
        messages: list[Message] | None = None,
        scale: Tensor | None = None,
        edge: GradientEdge | None = None,
    ) -> None:
        self.edge = edge
        self.form, self.weight, self.origin, self.reading = form, weight, origin, reading
        self.all_tokens, self.constant, self.messages, self.scale = all_tokens, constant, messages, scale

    def coming_back(self, weight: Tensor, messages: list[Message] | None = None, scale: Tensor | None = None) -> "Use":
        """The use as it is seen in backward."""
        return Use(self.form, weight, self.origin, self.reading, self.all_tokens, False, messages, scale, self.edge)

    def told(self, rule: Any, activation: Tensor, d: Tensor) -> "Use":
        """The use in backward, with the messages of a rule for its layer, if that has terms."""
        if not isinstance(rule, Terms):
            return self.coming_back(self.weight)
        activation, weight, d = widened(activation, self.weight, d)
        return self.coming_back(weight, arrival(rule.groups, Layer(self.form, weight), activation, d).messages())

    def layout(self) -> str | None:
        """What a row of the weight is (see :class:`~lrp_prune.relevance.Relevance`); None where the use does not tell."""
        if isinstance(self.form, TransposedConvolution):  # in groups an index of outputs is one of several
            return "transposed_convolution" if self.form.groups == 1 else None
        if isinstance(self.form, Convolution):
            return "convolution"
        axes = self.form.axes()
        if axes is None:
            return None
        dims, number = self.origin.dims(), len(self.origin.parameter.size)
        if dims is None:
            return "convolution" if axes[0] == self.origin.flattened_axis() else None
        out, into = (dims[axis] for axis in axes)
        if number == 2:
            return "linear" if out < into else "transposed"
        if number == 3 and {out, into} == {1, 2}:
            return "stacked" if out < into else "stacked_transposed"
        return None  # it is no stack along its first dimension


class RecurrentLayer(NamedTuple):
    """The parameters of one layer in one direction; ``hr`` projects the hidden state of an LSTM."""

    ih: Tensor
    hh: Tensor
    bias_ih: Tensor | None
    bias_hh: Tensor | None
    hr: Tensor | None


class Product(NamedTuple):
    """A product of an activation with a weight."""

    activation: Tensor
    weight: Tensor
    origin: Origin
    form: Form


class Observer(Protocol):
    """Sees a use in the forward and, where it asks for it, in the backward."""

    backward_needed: bool
    operand_dtype: torch.dtype | None
    """The precision in which the activation is wanted in backward, and kept until then; None for its own."""
    propagated_dtype: torch.dtype | None
    """The precision in which the gradient may be carried through the weight; None for its own."""

    def forward(self, use: Use, activation: Tensor) -> None:
        """Called with the activation ``a``."""

    def backward(self, use: Use, activation: Tensor, d: Tensor, input_gradient: Tensor) -> None:
        """Called with ``a``, the propagated gradient ``d`` of the output, and the one that goes on to ``a``."""


class _Observed(Function):
    @staticmethod
    def forward(
        ctx: Any,
        activation: Tensor,
        kept: Tensor,
        weight: Tensor,
        use: Use,
        observers: list[Observer],
        switch: Switch | None,
    ) -> Tensor:
        ctx.save_for_backward(kept, weight)
        ctx.use, ctx.observers, ctx.switch, ctx.dtype = use, observers, switch, activation.dtype
        return own_memory(use.form.forward(activation, weight))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor | None, ...]:
        activation, weight = ctx.saved_tensors
        with torch._C.DisableTorchFunction(), without_autocast(d.device):
            precision = _agreed(observer.propagated_dtype for observer in ctx.observers)
            if precision is not None and precision.itemsize < d.itemsize and ctx.use.form.only_shows_activation:
                d = d.to(precision)
            gradient = ctx.use.form.input_gradient(d, activation, weight).to(ctx.dtype)
            use = ctx.use.coming_back(weight)
            for observer in () if ctx.switch is not None and ctx.switch.muted else ctx.observers:
                observer.backward(use, activation, d, gradient)
        return gradient, None, None, None, None, None


_observed: Callable[..., Tensor] = _Observed.apply


def _watching(use: Use, observers: list[Observer]) -> Watching:
    def watching(
        found: list[Message],
        activation: Tensor,
        weight: Tensor,
        d: Tensor,
        input_gradient: Tensor,
        scale: Tensor | None,
    ) -> None:
        coming_back = use.coming_back(weight, found, scale)
        for observer in observers:
            observer.backward(coming_back, activation, d, input_gradient)

    return watching


def _agreed(dtypes: Iterable[torch.dtype | None]) -> torch.dtype | None:
    """The precision that all observers ask for; None where they differ."""
    wanted = set(dtypes)
    return wanted.pop() if len(wanted) == 1 else None


class WeightUses:
    """Finds uses of weights among the calls, and connects observers to them.

    Args:
        observers: for a use, what observes it.
        tracer: follows units, or None.
        held: notes what rules hold constant, or None.
    """

    def __init__(
        self,
        observers: Callable[[Use], list[Observer]] | None = None,
        tracer: UnitTracer | None = None,
        held: Held | None = None,
    ) -> None:
        self._observers, self._tracer, self._held = observers, tracer, held
        self._latest = Latest()
        self.saving = Saving()
        """What the graph of the pass that is going on saves."""
        self.showing = True
        self.touched: set[str] = set()
        """Parameters that any function was called with."""
        self.on_constants: set[str] = set()
        """Weights of layers that were applied to constants."""
        self.without_gradients: set[str] = set()
        """Parameters of functions that were called while gradients were off."""
        self.transformed: set[str] = set()
        """Weights of products inside a transformation of `torch.func`."""
        self.left_out: dict[str, str] = {}
        """Weights that are not shown to anyone, each with the reason."""
        self._all_tokens = False

    @property
    def note_held(self) -> Callable[[Tensor], None] | None:
        """Is told what a rule holds constant; None where nobody asks for it, and in the backward pass."""
        return self._held.note if self._held is not None and self._held.noting else None

    @contextmanager
    def counting(self, all_tokens: bool) -> Iterator[None]:
        """While it lasts, activations have no padding, whatever the batch says of its tokens."""
        before, self._all_tokens = self._all_tokens, all_tokens
        try:
            yield
        finally:
            self._all_tokens = before

    def _applied_to_constants(self, call: Call, origin: Origin) -> None:
        """A layer goes over embeddings of positions, say: nothing is propagated, but it has an input."""
        self.on_constants.add(origin.name)
        constant, weight = call.operands()
        use = Use(form_of(call.with_operands([None, weight]), 0, 1), weight, origin, None, True, constant=True)
        for observer in self._observers(use) if self._observers is not None and self.showing else ():
            observer.forward(use, constant)

    replaces_values = False
    """Whether products come out with other values than in the model, so that nothing computed from them can be given."""

    def before_steps(self, layer: RecurrentLayer, x: Tensor, apart: bool, valid: Tensor | None) -> RecurrentLayer:
        """The parameters that the steps of a recurrent layer are made with.

        Args:
            layer: the model's.
            x: the layer's inputs ``[samples, tokens, in]``.
            apart: whether the last gate gets what comes from the input and from the state by itself, as that of a GRU does.
            valid: which places ``[samples, tokens]`` are no padding; None for all.
        """
        return layer

    def after_steps(self, states: Callable[[], Tensor]) -> None:
        """The steps of the layer are made, from states ``[samples, tokens, hidden]``."""

    def leave_out(self, weight: Tensor, reason: str) -> None:
        """Show no use of a weight."""
        origin = marked(weight)
        if origin is not None:
            self.left_out[origin.name] = reason

    def of_linear(self, weight: Tensor, all_tokens: bool) -> tuple[Use | None, list[Observer]]:
        """The use of a weight ``[out, in]`` in products that somebody else makes, and what observes it."""
        origin = marked(weight)
        if self._observers is None or origin is None:
            return None, []
        call = Call(F.linear, OPERATIONS[F.linear], (None, weight), {})
        use = Use(form_of(call, 0, 1), weight, origin, None, all_tokens)
        return use, [] if origin.name in self.left_out else self._observers(use)

    def _product(self, call: Call) -> Product | None:
        """The parts of a product of one activation and one weight; None for other calls."""
        operands = call.operands()
        origins = [
            marked(value) if isinstance(value, Tensor) and not value.requires_grad else None for value in operands
        ]
        active = [index for index, value in enumerate(operands) if is_activation(value)]
        if any(map(is_transformed, operands)):
            self.transformed.update(origin.name for origin in origins if origin is not None)
            return None
        if not active and _is_layer(call) and origins[1] is not None and origins[1].layout is not None:
            self._applied_to_constants(call, origins[1])
        weights = [index for index, origin in enumerate(origins) if origin is not None]
        if len(operands) != 2 or len(active) != 1 or len(weights) != 1:
            return None
        if any(is_activation(arg) for arg in (*call.args, *call.kwargs.values()) if arg is not operands[active[0]]):
            return None
        activation, weight, origin = operands[active[0]], operands[weights[0]], origins[weights[0]]
        assert origin is not None
        # The form is kept for backward: it must not hold the activation a second time.
        form = form_of(
            call.with_operands([None if index == active[0] else value for index, value in enumerate(operands)]),
            active[0],
            weights[0],
        )
        return Product(activation, weight, origin, form)

    def observed(self, call: Call) -> Any:
        """The result of a product of one activation and one weight by its rule, observed; None for other calls."""
        if self._observers is None:
            return None
        found = self._product(call)
        if found is None:
            return None
        activation, weight, origin, form = found
        reading = None if self._tracer is None else self._tracer.reads(form, weight, origin, activation)
        use = Use(form, weight, origin, reading, self._all_tokens, edge=get_gradient_edge(activation))
        observers = [] if origin.name in self.left_out else self._observers(use)
        if observers and call.rule is not None and not call.rule.scores_weights:
            raise ValueError(
                f"{origin.name} has a rule of its own ({call.rule}), and what relevance weights have then is not known: leave it "
                "out, declare its terms (lrp_prune.attribution.Terms), or use lrp_prune.attributing for activations"
            )
        if self.showing:
            for observer in observers:
                observer.forward(use, activation)
        late = [observer for observer in observers if observer.backward_needed]
        if isinstance(call.rule, Terms):
            result = ruled(activation, weight, form, call.rule, _watching(use, late) if late else None)
        elif late:
            result = self._watched(activation, weight, use, late)
        else:
            result = call.run()
        if self._tracer is not None and reading is not None:
            self._tracer.writes(form, weight, origin, reading, call.bias, result)
        return result

    def _watched(self, activation: Tensor, weight: Tensor, use: Use, observers: list[Observer]) -> Tensor:
        """The product, whose observers see what comes back to the weight."""
        switch = None if self._held is None else self._held.switch
        result = _observed(activation, self._kept(activation, use, observers), weight, use, observers, switch)
        if self._held is not None and self._held.noting:
            self._held.wrote(use, result)
        return result

    def _kept(self, activation: Tensor, use: Use, observers: list[Observer]) -> Tensor:
        """What is kept of the activation for the backward pass: half of it where half the precision is multiplied."""
        dtype = _agreed(observer.operand_dtype for observer in observers) if use.form.only_shows_activation else None
        if dtype is None or dtype.itemsize >= activation.itemsize:
            return activation
        return self._latest.made(dtype, activation.detach(), lambda tensor: tensor.to(dtype))


def _is_layer(call: Call) -> bool:
    """Whether the second operand is a weight by the function's own account, whatever its operands are in this call."""
    row = OPERATIONS.get(call.function)
    return row is not None and row.kind in ("linear", "convolution") and len(call.operation.operands) == 2
