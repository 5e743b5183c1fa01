r"""Recurrent layers, step by step: torch computes an LSTM in one function, which hides the products that rules are about.

The steps are written out, so that each product of a gate and a signal, each activation and each use of a weight goes through
the composite's rules; the values that are returned are those of torch's own function, bit for bit. In

.. math::
    c_t = f_t \odot c_{t-1} + i_t \odot g_t, \qquad h_t = o_t \odot \tanh(c_t)

``f``, ``i`` and ``o`` are gates; of a GRU, :math:`h_t = (1 - z_t) \odot n_t + z_t \odot h_{t-1}` with
:math:`n_t = \tanh(x_t + r_t \odot (W h_{t-1}))`, they are ``r``, ``z`` and ``1 - z``. Where gates are stopped (``cp_lrp``) all
relevance goes to the signals: LRP-all of Arras et al. 2019 (arXiv 1909.12114). Where products are shared (``attnlrp``), a gate
gets half of it, and elsewhere the plain gradient.

A gate is :math:`\sigma(x) = 1/2 + \tanh(x / 2) / 2`, and a gated signal :math:`s / 2 + s \tanh(x / 2) / 2`: what passes a half
open gate without any input to the gate is the signal's, and the rest is a product. So relevance is conserved by ``attnlrp`` as
well, and stays bounded. Handed on through the sigmoid as a whole it would be scaled by :math:`\sigma(x)/x`, which has no bounds
where a gate is half open, and would grow with each step: in 50 steps of a random GRU by a factor of a million.

Dropout between layers is off, as everywhere. Weights are only read: on a GPU cuDNN reads them from one piece of memory, which
they stay in, since pruning sets entries to zero in place.

Steps in Python take their time: collecting relevance of two layers of 128 units over 100 tokens takes about seven times a
forward and backward pass of torch's own function on a CPU.
"""

from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from lrp_prune.engine.operations import OPERATIONS
from lrp_prune.engine.packed import Packing
from lrp_prune.engine.precision import without_autocast
from lrp_prune.engine.rules import Call, is_activation
from lrp_prune.engine.saved import with_all
from lrp_prune.engine.tags import Tag, set_tag
from lrp_prune.engine.taps import RecurrentProduct
from lrp_prune.engine.uses import RecurrentLayer, WeightUses
from lrp_prune.relevance.unscored import GATES

_PLAIN = ("input", "hx", "params", "has_biases", "num_layers", "dropout", "train", "bidirectional", "batch_first")
_PACKED = ("data", "batch_sizes", "hx", "params", "has_biases", "num_layers", "dropout", "train", "bidirectional")
_CELL = ("input", "hx", "w_ih", "w_hh", "b_ih", "b_hh")

State = tuple[Tensor, ...]


class Rules:
    """What the steps are made of: the composite's rules, and the model's weights.

    Args:
        call: of the recurrent function.
        ruled: gives a call the rule that the composite has for it.
        uses: connects observers to weights.
    """

    def __init__(self, call: Call, ruled: Callable[[Call], Call], uses: WeightUses) -> None:
        self._call, self._ruled, self.uses = call._replace(kwargs={}), ruled, uses

    def activation(self, function: Callable[..., Tensor], x: Tensor) -> Tensor:
        """``function(x)`` by the rule for activations."""
        result: Tensor = self._called(function, x)
        return result

    def gated(self, x: Tensor, signal: Tensor) -> Tensor:
        """``sigmoid(x) * signal`` by the rule for products, which is told which is the gate."""
        gate = 0.5 * self.activation(torch.tanh, 0.5 * x)
        set_tag(gate, Tag(gate=True))
        product: Tensor = self._called(torch.mul, gate, signal)
        return 0.5 * signal + product

    @cached_property
    def stops_gates(self) -> bool:
        """Whether no relevance goes to the gate of a product."""
        with with_all():
            gate, signal = (torch.ones((), requires_grad=True, device="cpu") for _ in range(2))
            product = self.gated(gate, signal.clone())
            return torch.autograd.grad(product, gate, allow_unused=True)[0] is None

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """``x W^T + b``, its weight observed."""
        call = self.of(F.linear, x, weight)
        result: Tensor | None = self.uses.observed(call)
        if result is None:
            result = call.ruled() if is_activation(x) else call.run()
        return result if bias is None else result + bias

    def of(self, function: Callable[..., Any], *operands: Tensor) -> Call:
        """A call of a step, with its rule."""
        return self._ruled(self._call._replace(function=function, operation=OPERATIONS[function], args=operands))

    def _called(self, function: Callable[..., Any], *operands: Tensor) -> Any:
        call = self.of(function, *operands)
        return call.ruled() if any(map(is_activation, operands)) else call.run()


Step = Callable[[Rules, Tensor, Callable[[Tensor], Tensor], State], State]


def _lstm(rules: Rules, x: Tensor, recurrent: Callable[[Tensor], Tensor], state: State) -> State:
    h, c = state
    width = c.shape[-1]
    i_f, g, o = torch.split(
        x + recurrent(h), [2 * width, width, width], -1
    )  # a Python call is what takes time: two at once
    new, kept = rules.gated(i_f, torch.cat([rules.activation(torch.tanh, g), c], -1)).chunk(2, -1)
    c = kept + new
    return rules.gated(o, rules.activation(torch.tanh, c)), c


def _gru(rules: Rules, x: Tensor, recurrent: Callable[[Tensor], Tensor], state: State) -> State:
    (h,) = state
    (x_r, x_z, x_n), (h_r, h_z, h_n) = x.chunk(3, -1), recurrent(h).chunk(3, -1)
    new = rules.activation(torch.tanh, x_n + rules.gated(x_r + h_r, h_n))
    kept = x_z + h_z
    return (rules.gated(-kept, new) + rules.gated(kept, h),)


def _elman(function: Callable[..., Tensor]) -> Step:
    def step(rules: Rules, x: Tensor, recurrent: Callable[[Tensor], Tensor], state: State) -> State:
        return (rules.activation(function, x + recurrent(state[0])),)

    return step


_STEPS: dict[str, Step] = {"lstm": _lstm, "gru": _gru, "rnn_tanh": _elman(torch.tanh), "rnn_relu": _elman(torch.relu)}


def recurrent(call: Call, given: Call, ruled: Callable[[Call], Call], uses: WeightUses) -> Any:
    """The result of a recurrent function of torch, with a graph by the rules.

    Args:
        call: of the function, with parameters detached.
        given: as the model made it; what torch computes depends in its last bit on which tensors require grad.
        ruled: gives a call the rule that the composite has for it.
        uses: connects observers to weights.
    """
    cell, arguments = call.function.__name__.endswith("_cell"), _arguments(call)
    x, state = next(iter(arguments.values())), _states(arguments)
    if not any(map(is_activation, (x, *state))):
        return call.run()
    step, rules = _STEPS[call.function.__name__.removesuffix("_cell")], Rules(call, ruled, uses)
    if step in (_lstm, _gru) and rules.stops_gates:
        for weight in (arguments["w_ih"], arguments["w_hh"]) if cell else arguments["params"]:
            if weight.dim() == 2 and weight.shape[0] != state[0].shape[-1]:  # a projection comes after the gates
                uses.leave_out(weight, GATES)
    with without_autocast(x.device):
        made = _one_step(rules, step, arguments, state) if cell else _all_layers(rules, step, arguments, state)
    if uses.replaces_values:
        return made if len(made) > 1 else made[0]
    with with_all():
        values = call.function(*{**_arguments(given), **({} if cell else {"dropout": 0.0})}.values())
        several = isinstance(values, tuple)
        values = [entry.detach() for entry in (values if several else (values,))]
    results = _with_values(values, *made)
    return results if several else results[0]


def _arguments(call: Call) -> dict[str, Any]:
    """By name, in the function's order."""
    packed = (len(call.args) > 3 and isinstance(call.args[3], tuple | list)) or "batch_sizes" in call.kwargs
    names = _CELL if call.function.__name__.endswith("_cell") else _PACKED if packed else _PLAIN
    found = {**dict(zip(names, call.args, strict=False)), **call.kwargs}
    return {name: found[name] for name in names if name in found}


def _states(arguments: dict[str, Any]) -> State:
    """The initial states: of an LSTM two."""
    state = arguments["hx"]
    return tuple(state) if isinstance(state, tuple | list) else (state,)


def _one_step(rules: Rules, step: Step, arguments: dict[str, Any], state: State) -> State:
    layer = RecurrentLayer(arguments["w_ih"], arguments["w_hh"], arguments.get("b_ih"), arguments.get("b_hh"), None)
    given = arguments["input"].to(layer.ih.dtype)
    layer = rules.uses.before_steps(layer, given[:, None], step is _gru, None)
    x = rules.linear(given, layer.ih, layer.bias_ih)
    active = _active(x, *state)
    product = RecurrentProduct(rules.uses, rules.of(F.linear, x, layer.hh), layer.bias_hh, (x.shape[0], 1), active)
    state = step(rules, x, product.at(0), tuple(entry.to(x.dtype) for entry in state))
    rules.uses.after_steps(product.states)
    product.shown()
    return state


def _all_layers(rules: Rules, step: Step, arguments: dict[str, Any], state: State) -> tuple[Tensor, ...]:
    """Output and final states of a stack of layers."""
    packing = Packing(arguments["batch_sizes"], arguments["data"].device) if "batch_sizes" in arguments else None
    if packing is not None:
        x = packing.padded(arguments["data"])
    else:
        x = arguments["input"] if arguments["batch_first"] else arguments["input"].transpose(0, 1)
    directions = 2 if arguments["bidirectional"] else 1
    layers = _layers(arguments, projected=len(state) == 2 and state[0].shape[-1] != state[1].shape[-1])
    finals: list[State] = []
    for index in range(arguments["num_layers"]):
        outputs = []
        for direction in range(directions):
            position = index * directions + direction
            initial = tuple(entry[position] for entry in state)
            output, final = _one_layer(rules, step, layers[position], x, initial, direction == 1, packing)
            outputs.append(output)
            finals.append(final)
        x = torch.cat(outputs, -1) if directions == 2 else outputs[0]
    stacked = tuple(torch.stack(entries) for entries in zip(*finals, strict=True))
    if packing is not None:
        return packing.packed(x), *stacked
    return x if arguments["batch_first"] else x.transpose(0, 1), *stacked


def _layers(arguments: dict[str, Any], projected: bool) -> list[RecurrentLayer]:
    each = 2 + 2 * bool(arguments["has_biases"]) + projected
    found = []
    for start in range(0, len(arguments["params"]), each):
        ih, hh, *rest = arguments["params"][start : start + each]
        of_ih, of_hh = (rest[0], rest[1]) if arguments["has_biases"] else (None, None)
        found.append(RecurrentLayer(ih, hh, of_ih, of_hh, rest[-1] if projected else None))
    return found


def _one_layer(
    rules: Rules, step: Step, layer: RecurrentLayer, x: Tensor, state: State, backwards: bool, packing: Packing | None
) -> tuple[Tensor, State]:
    """The outputs ``[samples, tokens, features]`` of one layer in one direction, and its last state."""
    layer = rules.uses.before_steps(layer, x, step is _gru, None if packing is None else packing.valid)
    with rules.uses.counting(all_tokens=packing is not None):
        pre = rules.linear(x.to(layer.ih.dtype), layer.ih, layer.bias_ih)
    places, active = (pre.shape[0], pre.shape[1]), _active(pre, *state)
    valid = None if packing is None else packing.valid
    rest = (places, active, valid)
    product = RecurrentProduct(rules.uses, rules.of(F.linear, x, layer.hh), layer.bias_hh, *rest)
    projection = (
        None if layer.hr is None else RecurrentProduct(rules.uses, rules.of(F.linear, x, layer.hr), None, *rest)
    )
    state = tuple(entry.to(pre.dtype) for entry in state)
    outputs: list[Tensor] = [pre] * places[1]
    steps = pre.unbind(1)  # taken one by one, each would make a gradient as large as all of them
    for token in reversed(range(places[1])) if backwards else range(places[1]):
        new = step(rules, steps[token], product.at(token), state)
        if projection is not None:
            new = (projection.at(token)(new[0]), *new[1:])
        if valid is not None:
            new = tuple(torch.where(valid[:, token, None], entry, old) for entry, old in zip(new, state, strict=True))
        state, outputs[token] = new, new[0]
    rules.uses.after_steps(product.states)
    product.shown()
    if projection is not None:
        projection.shown()
    output = torch.stack(outputs, 1)
    return output if valid is None else output.masked_fill(~valid[..., None], 0.0), state


def _active(*tensors: Tensor) -> list[Tensor]:
    return [tensor for tensor in tensors if is_activation(tensor)]


class _WithValues(Function):
    """Given values, with the gradient going to tensors that equal them up to rounding."""

    @staticmethod
    def forward(ctx: Any, values: list[Tensor], *computed: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.dtypes = [tensor.dtype for tensor in computed]
        return tuple(values)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        with torch._C.DisableTorchFunction():
            pairs = zip(gradients, ctx.dtypes, strict=True)
            return None, *(None if gradient is None else gradient.to(dtype) for gradient, dtype in pairs)


_with_values: Callable[..., tuple[Tensor, ...]] = _WithValues.apply
