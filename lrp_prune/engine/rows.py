"""Rows: which token of which sample each row of a flattened activation is.

Layers are given rows ``[samples * tokens, channels]`` in the order of samples, of tokens (attention that puts time first), or of
experts. What was done to the rows is told by autograd: their numbers are taken back through the nodes that move entries, and
through what works row by row, until samples and tokens are dimensions, whose numbers come forward on the same way.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from lrp_prune.engine.nodes import MOVING_NODES, node_kind
from lrp_prune.engine.saved import with_all

_STAYING = frozenset({"Clone", "Alias", "ToCopy", "Contiguous"})
"""Of the nodes that move entries those that leave them where they are; a cast would round their numbers."""
_MIXING = frozenset(
    """
    Sort Topk Kthvalue Cumsum Cumprod Cummax Cummin IndexAdd IndexPut IndexCopy Put Scatter ScatterAdd ScatterReduce IndexReduce
    MaskedScatter Cdist Baddbmm
    """.split()
)
"""Nodes whose rows are made of other rows, in an order that is not followed."""
_LONGEST = 200
"""Nodes that are gone through before the search is given up."""

_BASE = 128
"""Numbers below are exact in any type."""

Numbering = Callable[[torch.Size, torch.device], list[Tensor]]
"""Numbers from 1 on of what has a shape, by each way in which it may lie."""


def places_of(edge: GradientEdge, samples: int, tokens: int) -> Tensor | None:
    """For each row, the number of its token, counted through all samples; None where that cannot be told.

    Rows may be some of the tokens, or repeat them, as what experts get does.

    Args:
        edge: of an activation, whose rows are its first dimension, or of more than two dimensions the first two.
        samples: how many there are.
        tokens: in each of them.
    """
    return _followed(edge, lambda shape, device: _by_token(shape, samples, tokens, device))


def samples_of(edge: GradientEdge, rows: int, samples: int) -> Tensor | None:
    """For each row, the number of its sample, of which all have as many; None where that cannot be told."""
    places = places_of(edge, samples, rows // samples)
    if places is None:
        found = _followed(edge, lambda shape, device: _by_sample(shape, samples, device))
    else:
        found = places // (rows // samples)
    even = found is not None and len(found) == rows and bool((found.bincount() == rows // samples).all())
    return found if even else None


def made_of_tokens(edge: GradientEdge, samples: int, tokens: int) -> bool:
    """Whether anything that an activation is made of is laid out in samples and tokens."""
    pending, seen = [edge.node], {edge.node}
    while pending:
        node = pending.pop()
        if any(len(entry.shape) > 2 and tuple(entry.shape[:2]) == (samples, tokens) for entry in node._input_metadata):
            return True
        before = {entry for entry, _ in node.next_functions if entry is not None} - seen
        seen |= before
        pending += before
    return False


def _by_token(shape: torch.Size, samples: int, tokens: int, device: torch.device) -> list[Tensor]:
    """Numbers of tokens, also of attention heads, one by one or not."""
    numbers = torch.arange(1, samples * tokens + 1, device=device).reshape(samples, tokens)
    found = []
    if len(shape) > 1 and shape[:2] == (samples, tokens):
        found.append(numbers.reshape(samples, tokens, *(1,) * (len(shape) - 2)))
    if len(shape) == 4 and (shape[0], shape[2]) == (samples, tokens):
        found.append(numbers[:, None, :, None])
    if len(shape) == 3 and shape[1] == tokens and shape[0] % samples == 0:
        found.append(numbers.repeat_interleave(shape[0] // samples, 0)[..., None])
    return [entry.expand(shape) for entry in found]


def _by_sample(shape: torch.Size, samples: int, device: torch.device) -> list[Tensor]:
    if not shape or shape[0] != samples:
        return []
    return [torch.arange(1, samples + 1, device=device).reshape(samples, *(1,) * (len(shape) - 1)).expand(shape)]


class _Way(NamedTuple):
    """How far rows are followed.

    Args:
        node: that made what they are in by now.
        place: which of its outputs.
        start: stands for the activation, or for the operand of the last function that works row by row.
        moved: the same, taken back through nodes that move entries.
        rows: of each row of the activation, the number of the row of `start`; None: the same.
    """

    node: Any
    place: int
    start: Tensor
    moved: Tensor
    rows: Tensor | None


def _followed(edge: GradientEdge, numbering: Numbering) -> Tensor | None:
    """The number of each row, from 0 on, of where they come from; None where it cannot be told."""
    with torch.enable_grad(), with_all():
        pending = [_way(edge.node, edge.output_nr, None)]
        seen: set[Any] = set()
        while pending and len(seen) < _LONGEST:
            way = pending.pop()
            if way.node in seen:
                continue
            seen.add(way.node)
            kind = node_kind(way.node)
            if kind in MOVING_NODES:
                back = way.moved if kind in _STAYING else _taken_back(way)
                before, place = way.node.next_functions[0]
                if before is not None and back is not None:
                    pending.append(way._replace(node=before, place=place, moved=back))
                continue
            found = _agreeing([_numbered(way, entry) for entry in numbering(way.moved.shape, way.moved.device)])
            if found is not None:
                return found if way.rows is None else found[way.rows]
            if kind not in _MIXING and way.moved.dim() in (2, 3):
                pending += _row_by_row(way, kind)
    return None


def _row_by_row(way: _Way, kind: str) -> list[_Way]:
    """Back through a function that makes each row of those at the same place."""
    leading, rows = way.moved.shape[:-1], way.rows
    if way.moved is not way.start:
        numbers = torch.arange(1, leading.numel() + 1, device=way.moved.device)
        own = _numbered(way, numbers.reshape(*leading, 1).expand(way.moved.shape))
        if own is None:
            return []
        rows = own if rows is None else own[rows]
    operands = way.node.next_functions
    if kind in ("Mm", "Bmm"):  # rows of a product are those of its first factor
        operands = operands[:1]
    return [
        _way(before, place, rows)
        for before, place in operands
        if before is not None
        and len(before._input_metadata[place].shape) == way.moved.dim()
        and tuple(before._input_metadata[place].shape[:-1]) == leading
    ]


def _way(node: Any, index: int, rows: Tensor | None) -> _Way:
    """One that begins at what a node made."""
    entry = node._input_metadata[index]
    start = torch.zeros((), dtype=entry.dtype, device=entry.device).expand(entry.shape).detach().requires_grad_()
    return _Way(node, index, start, start, rows)


def _numbered(way: _Way, numbers: Tensor) -> Tensor | None:
    """What rows of `start` get of numbers that lie as `moved` does, less 1; None where entries of a row differ, or get none."""
    if way.moved is way.start:
        taken = numbers
    else:  # what was taken back is given forward again by its gradient, some digits at a time
        digits = range(math.ceil(math.log(float(numbers.max()) + 1, _BASE)))
        given = [(numbers // _BASE**digit % _BASE).to(way.moved.dtype) for digit in digits]
        parts = [torch.autograd.grad(way.moved, way.start, each, retain_graph=True)[0] for each in given]
        taken = torch.stack([part.long() * _BASE**digit for digit, part in zip(digits, parts, strict=True)]).sum(0)
    taken = taken.reshape(way.start.shape[: 1 if way.start.dim() == 2 else 2].numel(), -1)
    own = taken.amax(1)
    alike = (taken == own[:, None]) | (taken == 0)
    return own - 1 if bool((own > 0).all()) and bool(alike.all()) else None


def _agreeing(found: list[Tensor | None]) -> Tensor | None:
    known = [each for each in found if each is not None]
    return known[0] if known and all(torch.equal(known[0], other) for other in known) else None


def _taken_back(way: _Way) -> Tensor | None:
    """What came out of a node that moves entries, where it was before; None where it cannot take it."""
    entries = way.node._input_metadata
    values = way.moved.to(entries[way.place].dtype)
    try:
        found = way.node(*(values if at == way.place else None for at in range(len(entries))))
    except (RuntimeError, TypeError):
        return None
    taken: Tensor = found[0] if isinstance(found, tuple) else found
    return taken
