r"""Batch normalisation in evaluation mode, folded into a neighbouring layer for the pass: nothing of the model is written to.

A layer :math:`y = W a + b` and the affine map :math:`s y + t` after it are one layer, with the weight :math:`s W` and the bias
:math:`s b + t`; likewise one before it, with :math:`W s` and :math:`b + W t` (at the border less, where it pads with zeros).
A rule with terms shares relevance by the products of that layer (canonisation: Motzkus et al. 2022, arXiv 2202.06621; Pahde et
al. 2022, arXiv 2211.17174). Under the plain gradient it makes no difference.

Values stay the model's own. What is folded is told by the forward: the layer's node in the graph and that of the normalisation
know each other, also through a concatenation, and hand each other in backward what a gradient cannot say (:class:`Handover`).
What goes over the edge between them is the gradient that times the value there is the relevance, for whoever looks.
"""

import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from lrp_prune.engine.facts import Fact
from lrp_prune.engine.nodes import node_kind

_PLAIN_LAYERS = frozenset({"_Observed", "Convolution", "Addmm", "Mm", "Linear"})
"""Nodes of layers that keep the plain gradient, under which it makes no difference whether they take a normalisation in."""


class Handover:
    """What later nodes tell an earlier one of the gradients that they return: what they stand for."""

    def __init__(self) -> None:
        self._told: list[tuple[int, Tensor, Any]] = []

    def tell(self, gradient: Tensor, meant: Any) -> None:
        """Say what is meant by a gradient that is returned, in the backward pass that runs."""
        task = torch._C._current_graph_task_id()
        self._told = [entry for entry in self._told if entry[0] == task]  # others were never asked for
        self._told.append((task, gradient, meant))

    def heard(self, gradient: Tensor) -> tuple[list[Any], Tensor | None]:
        """What is meant by the gradient that arrives, and what of it comes from elsewhere; None if nothing does."""
        task = torch._C._current_graph_task_id()
        told, self._told = [entry for entry in self._told if entry[0] == task], []
        if not told:
            return [], gradient
        together = told[0][1] if len(told) == 1 else sum((entry[1] for entry in told[1:]), told[0][1])
        meant = [entry[2] for entry in told]
        if _is_same(gradient, together) or torch.equal(gradient, together):
            return meant, None
        return meant, gradient - together


def _is_same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are the same memory."""
    return one.data_ptr() == other.data_ptr() and one.shape == other.shape and one.stride() == other.stride()


class Arrived(NamedTuple):
    """What a layer is told by the normalisation after it.

    Args:
        d: the gradient of what came out of the normalisation.
        y: what the layer returned.
        scale: of its channels.
        shift: likewise.
    """

    d: Tensor
    y: Tensor
    scale: Tensor
    shift: Tensor


class Open(NamedTuple):
    """A normalisation that no layer before it has taken in.

    Args:
        source: what it was given.
        version: of that, as autograd counts changes in place.
        scale: of its channels, in float32 at least.
        shift: likewise.
        node: its own.
    """

    source: Tensor
    version: int
    scale: Tensor
    shift: Tensor
    node: Any


class Part(NamedTuple):
    """Some of a tensor's channels.

    Args:
        size: how many.
        layer: takes what is told to the layer with terms that they come out of, if it is one.
        open: the normalisation that they come out of, if it is one.
        values: the tensor that they were before a concatenation.
    """

    size: int
    layer: Handover | None = None
    open: Open | None = None
    values: Tensor | None = None
    from_layer: bool = False
    """Whether they come out of a layer, with terms or without."""


class _Parts(NamedTuple):
    """The parts of a tensor's channels, and when that holds."""

    parts: tuple[Part, ...]
    node: Any
    saving: Any


_FACT: Fact[_Parts] = Fact("parts")


def _saving() -> Any:
    """Who saves activations now: a checkpointed layer sees nothing of what others know of its inputs when it runs again."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return None if hooks is None else weakref.ref(hooks[0])


def saves_elsewhere() -> bool:
    """Whether what is kept for the backward pass is in somebody's care, who computes it again or moves it."""
    return _saving() is not None


def note_parts(tensor: Any, parts: Sequence[Part]) -> None:
    """Remember what a tensor's channels come out of, until it is changed."""
    _FACT.note(tensor, _Parts(tuple(parts), tensor.grad_fn, _saving()))


def forget_parts(tensor: Any) -> None:
    """Let nothing be known of what a tensor's channels come out of."""
    _FACT.note(tensor, None)


def parts_of(tensor: Tensor) -> tuple[Part, ...]:
    """What a tensor's channels come out of."""
    known = _FACT.of(tensor)
    if known is not None and known.node is tensor.grad_fn and known.saving == _saving():
        return known.parts
    from_layer = tensor.grad_fn is not None and node_kind(tensor.grad_fn) in _PLAIN_LAYERS
    return (Part(tensor.shape[1] if tensor.dim() > 1 else 1, values=tensor, from_layer=from_layer),)


def carry_parts(source: Any, copy: Any) -> None:
    """A copy is what it is a copy of."""
    if _FACT.of(source) is not None:
        note_parts(copy, parts_of(source))


def note_joined(tensors: Any, dim: Any, result: Any) -> None:
    """A concatenation of channels has the parts of what it was made of."""
    if not isinstance(tensors, list | tuple) or not isinstance(result, Tensor) or result.dim() < 2:
        return
    if (1 if dim == 1 - result.dim() else dim) != 1 or not any(_FACT.of(tensor) is not None for tensor in tensors):
        return
    parts = [part for tensor in tensors for part in parts_of(tensor)]
    if not any(part.open is not None for part in parts):
        parts = [part._replace(values=None) for part in parts]  # nobody will ask for them
    note_parts(result, parts)


class _Normalized(Function):
    """``scale * x + shift`` for each channel, with what is before and after it in mind."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        function: Callable[[Tensor], Tensor],
        scale: Tensor,
        shift: Tensor,
        before: tuple[Part, ...],
        after: Handover,
    ) -> Tensor:
        ctx.before, ctx.after, ctx.dtype = before, after, x.dtype
        ctx.is_open = not any(part.from_layer for part in before)
        ctx.is_left = not all(part.from_layer for part in before)
        into_layer = any(part.layer is not None for part in before)
        ctx.save_for_backward(scale, *((shift, x) if into_layer else ()))
        return function(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor | None, ...]:
        scale, *others = ctx.saved_tensors
        with torch._C.DisableTorchFunction():
            taken, rest = ctx.after.heard(d)
            if rest is not None:
                taken.append((rest * _by_channel(scale, rest)).to(ctx.dtype))
            gradient = sum(taken[1:], taken[0])
            if others:
                shift, x = others
                gradient = _handed_over(ctx.before, d, x, scale, shift, gradient)
        return gradient, None, None, None, None, None


def _handed_over(
    before: Sequence[Part], d: Tensor, x: Tensor, scale: Tensor, shift: Tensor, gradient: Tensor
) -> Tensor:
    """The gradient of the input, where layers before it take the normalisation in: they are told."""
    start, parts = 0, []
    for part in before:
        channels = slice(start, start + part.size)
        own, start = gradient[:, channels], start + part.size
        if part.layer is not None:
            y, of_output = (x, d) if len(before) == 1 else (x[:, channels], d[:, channels])
            s, t = scale[channels], shift[channels]
            ratio = _by_channel(t, y) / y + _by_channel(s, y)  # of what comes out to what went in
            own = ratio.nan_to_num_(0.0, 0.0, 0.0).mul_(of_output).to(gradient.dtype)
            part.layer.tell(own, Arrived(of_output, y, s, t))
        parts.append(own)
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def _by_channel(values: Tensor, like: Tensor) -> Tensor:
    return values.reshape(-1, *(1,) * (like.dim() - 2))


_normalized: Callable[..., Tensor] = _Normalized.apply


def normalized(x: Tensor, function: Callable[[Tensor], Tensor], scale: Tensor, shift: Tensor) -> Tensor:
    """An affine map of each channel, folded into the layers that are its neighbours if they have rules with terms.

    Args:
        x: the input ``[samples, channels, ...]``.
        function: computes the output as the model does.
        scale: by what each channel is multiplied, in float32 at least.
        shift: what is added then.
    """
    before, after = parts_of(x), Handover()
    kept = tuple(part._replace(open=None, values=None) for part in before)
    result = _normalized(x, function, scale, shift, kept, after)
    node: Any = result.grad_fn
    if node.is_open:
        part = Part(x.shape[1], open=Open(x, x._version, scale, shift, node))
        note_parts(result, [part])
    return result


def is_left(node: Any) -> bool:
    """Whether the node of a batch normalisation has channels that no layer has taken in."""
    if node_kind(node) == "_Normalized":
        return bool(node.is_left)
    return node_kind(node) in ("Affine", "ContiguousGradient")  # by the batch; by a rule of one's own it is none


class Before(NamedTuple):
    """The normalisations before a layer, for it to take in.

    Args:
        source: what they were given, all channels together.
        scale: of all channels.
        shift: likewise.
        parts: size, and what takes what is told to the normalisation; None where there is none.
    """

    source: Tensor
    scale: Tensor
    shift: Tensor
    parts: tuple[tuple[int, Handover | None], ...]


def before(activation: Tensor) -> Before | None:
    """The normalisations that the channels of an activation come out of; None if there are none to take in."""
    found = parts_of(activation) if _FACT.of(activation) is not None else ()
    opened = [part.open for part in found if part.open is not None]
    if not opened or any(part.open is None and part.values is None for part in found):
        return None
    if any(entry.source._version != entry.version for entry in opened):
        return None
    for entry in opened:
        entry.node.is_left = False
    like = opened[0].scale
    sources, scales, shifts = [], [], []
    for part in found:
        source = part.values if part.open is None else part.open.source
        assert source is not None
        sources.append(source)
        scales.append(like.new_ones(part.size) if part.open is None else part.open.scale)
        shifts.append(like.new_zeros(part.size) if part.open is None else part.open.shift)
    handovers = tuple((part.size, None if part.open is None else part.open.node.after) for part in found)
    joined = sources[0] if len(sources) == 1 else torch.cat(sources, 1)
    return Before(joined, torch.cat(scales), torch.cat(shifts), handovers)


def handed_back(
    own: Tensor, source: Tensor, activation: Tensor, parts: Iterable[tuple[int, Handover | None]]
) -> Tensor:
    """The gradient of an activation that stands for that of what was normalised; the normalisations are told.

    Args:
        own: the gradient of the source.
        source: what was normalised.
        activation: what came out.
        parts: of the channels.
    """
    stand_in = (source.to(own.dtype) / activation).nan_to_num_(0.0, 0.0, 0.0).mul_(own)
    start, gradients = 0, []
    for size, handover in parts:
        channels = slice(start, start + size)
        start += size
        gradient = (own if handover is None else stand_in)[:, channels]
        if handover is not None:
            handover.tell(gradient, own[:, channels])
        gradients.append(gradient)
    return gradients[0] if len(gradients) == 1 else torch.cat(gradients, 1)
