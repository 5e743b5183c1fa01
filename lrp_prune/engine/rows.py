"""Rows: which token of which sample each row of a flattened activation is.

Layers are given rows ``[samples * tokens, channels]`` in the order of samples, of tokens (attention that puts time first), or of
experts. What was done to the rows is told by autograd: their numbers are taken back through the nodes that move entries, and
through what works row by row, until samples and tokens are dimensions.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from lrp_prune.engine.nodes import MOVING_NODES, node_kind

_STAYING = frozenset({"Clone", "Alias", "ToCopy", "Contiguous"})
"""Of the nodes that move entries those that leave them where they are; a cast would round their numbers."""
_MIXING = frozenset(
    """
    Sort Topk Kthvalue Cumsum Cumprod Cummax Cummin IndexAdd IndexPut IndexCopy Put Scatter ScatterAdd ScatterReduce IndexReduce
    MaskedScatter Cdist Bmm Baddbmm
    """.split()
)
"""Nodes whose rows are made of other rows, in an order that is not followed."""
_LONGEST = 200
"""Nodes that are gone through before the search is given up."""

_BASE = 128
"""Numbers below are exact in any type."""

Reader = Callable[[Tensor], Tensor | None]


def places_of(edge: GradientEdge, samples: int, tokens: int) -> Tensor | None:
    """For each row, the number of its token, counted through all samples; None where that cannot be told.

    Args:
        edge: of an activation, whose rows are its first dimension, or the first two.
        samples: how many there are.
        tokens: in each of them.
    """

    def read(numbers: Tensor) -> Tensor | None:
        found = [_placed(each, samples * tokens) for each in _by_token(numbers, samples, tokens)]
        known = [each for each in found if each is not None]
        return known[0] if known and all(torch.equal(known[0], other) for other in known) else None

    return _followed(edge, samples * tokens, read)


def samples_of(edge: GradientEdge, rows: int, samples: int) -> Tensor | None:
    """For each row, the number of its sample; None where that cannot be told."""
    places = places_of(edge, samples, rows // samples)
    if places is not None:
        return places // (rows // samples)
    return _followed(edge, rows, lambda numbers: _in_samples(numbers, rows, samples))


def _by_token(numbers: Tensor, samples: int, tokens: int) -> list[Tensor]:
    """Numbers ``[samples, tokens, entries]``, by each way in which they may lie: also of attention heads, one by one or not."""
    shape, found = numbers.shape, []
    if shape[:2] == (samples, tokens):
        found.append(numbers)
    if len(shape) == 4 and (shape[0], shape[2]) == (samples, tokens):
        found.append(numbers.movedim(2, 1))
    if len(shape) == 3 and shape[1] == tokens and shape[0] % samples == 0:
        found.append(numbers.reshape(samples, -1, *shape[1:]).movedim(2, 1))
    return [entry.reshape(samples, tokens, -1) for entry in found]


def _placed(numbers: Tensor, rows: int) -> Tensor | None:
    own = _agreed(numbers.reshape(rows, -1))
    if own is None or not torch.equal(own.sort().values, torch.arange(rows, device=own.device)):
        return None
    return own.argsort()


def _in_samples(numbers: Tensor, rows: int, samples: int) -> Tensor | None:
    if numbers.shape[0] != samples:
        return None
    within = [own[own > 0].unique() for own in numbers.reshape(samples, -1)]
    if not torch.equal(torch.cat(within).sort().values, torch.arange(1, rows + 1, device=numbers.device)):
        return None
    found = torch.empty(rows, dtype=torch.int64, device=numbers.device)
    for sample, own in enumerate(within):
        found[own.long() - 1] = sample
    return found


def _agreed(numbers: Tensor) -> Tensor | None:
    """The number of each row, counted from 0, of entries that have it, or none."""
    own = numbers.amax(1)
    alike = (numbers == own[:, None]) | (numbers == 0)
    return own.long() - 1 if bool(alike.all()) else None


def _followed(edge: GradientEdge, rows: int, read: Reader) -> Tensor | None:
    """What is read of the rows' numbers, where they can be."""
    device = edge.node._input_metadata[edge.output_nr].device
    shape = edge.node._input_metadata[edge.output_nr].shape
    numbers = torch.arange(1, rows + 1, dtype=torch.float64, device=device)
    leading = 1 if shape[0] == rows else 2
    if math.prod(shape[:leading]) != rows:  # of a convolution, whose second dimension are channels
        return None
    numbers = numbers.reshape(*shape[:leading], *(1,) * (len(shape) - leading))
    pending: list[tuple[Any, int, Tensor]] = [(edge.node, edge.output_nr, numbers)]
    seen: set[Any] = set()
    while pending and len(seen) < _LONGEST:
        node, index, numbers = pending.pop()
        if node in seen:
            continue
        seen.add(node)
        entries = node._input_metadata
        numbers = numbers.expand(entries[index].shape)
        kind = node_kind(node)
        if kind in MOVING_NODES:
            back = numbers if kind in _STAYING else _taken_back(node, index, numbers)
            before, place = node.next_functions[0]
            if before is not None and back is not None:
                pending.append((before, place, back))
            continue
        found = read(numbers)
        if found is not None:
            return found
        by_row = numbers.dim() == 2 and len(numbers) == rows and kind not in _MIXING
        own = _agreed(numbers) if by_row else None
        operands = node.next_functions if own is not None else ()
        for before, place in (
            operands[:1] if kind == "Mm" else operands
        ):  # rows of a product are those of its first factor
            shape = None if before is None else before._input_metadata[place].shape
            if own is not None and shape is not None and len(shape) == 2 and shape[0] == rows:
                pending.append((before, place, (own + 1).to(numbers.dtype)[:, None]))
    return None


def _taken_back(node: Any, index: int, numbers: Tensor) -> Tensor | None:
    """Numbers of what came out of a node that moves entries, where they were before; None where it cannot take them."""
    entries = node._input_metadata

    def back(values: Tensor) -> Tensor:
        found = node(*(values if at == index else None for at in range(len(entries))))
        taken: Tensor = found[0] if isinstance(found, tuple) else found
        return taken.to(numbers.dtype)

    try:
        return back(numbers)
    except (RuntimeError, TypeError):
        pass
    try:  # an index takes its own type alone, in which small numbers are exact
        digits = range(math.ceil(math.log(float(numbers.max()) + 1, _BASE)))
        parts = [back((numbers // _BASE**digit % _BASE).to(entries[index].dtype)) * _BASE**digit for digit in digits]
        return torch.stack(parts).sum(0)
    except (RuntimeError, TypeError):
        return None
