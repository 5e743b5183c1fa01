r"""Gates of recurrent layers, whose channels are fed by two weights: what comes from the input, and from the state before.

What a gate gets is :math:`W_{ih} x_t + b_{ih} + W_{hh} h_{t-1} + b_{hh}`, a row of both weights for each channel, which one scale
for both and one shift bring back to the dense model's. The last gate of a GRU gets both by themselves. The states are those of
the dense model, also behind pruned weights: the states of a layer whose scales are not yet known are none that it will ever have.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lrp_prune.engine.origins import Layout, Origin, marked
from lrp_prune.engine.uses import RecurrentLayer
from lrp_prune.pruning.masks import Masks
from lrp_prune.pruning.places import BiasPlace, Place


class Gates(NamedTuple):
    """Rows of a recurrent layer's weights.

    Args:
        place: of the rows; of both weights where they are summed.
        rows: which they are.
        from_input, from_state: which of the two they are fed by.
    """

    place: Place
    rows: slice
    from_input: bool
    from_state: bool

    def computed(self, layer: RecurrentLayer, x: Tensor, states: Tensor) -> Tensor:
        """What they get ``[samples, tokens, rows]`` from inputs and states ``[samples, tokens, features]``."""
        parts = []
        if self.from_input:
            parts.append(F.linear(x, layer.ih[self.rows], None if layer.bias_ih is None else layer.bias_ih[self.rows]))
        if self.from_state:
            bias = None if layer.bias_hh is None else layer.bias_hh[self.rows]
            parts.append(F.linear(states.to(layer.hh.dtype), layer.hh[self.rows], bias))
        return parts[0] if len(parts) == 1 else parts[0] + parts[1]

    def scale_(self, layer: RecurrentLayer, scale: Tensor, shift: Tensor) -> None:
        """Change the rows of copies of the parameters."""
        chosen = [(layer.ih, layer.bias_ih)] * self.from_input + [(layer.hh, layer.bias_hh)] * self.from_state
        for index, (weight, bias) in enumerate(chosen):
            weight[self.rows].mul_(scale.to(weight)[:, None])
            if bias is not None:
                bias[self.rows].mul_(scale.to(bias)).add_(shift.to(bias) if index == 0 else 0)


def gates_of(layer: RecurrentLayer, apart: bool, masks: Masks) -> list[Gates]:
    """The rows that can be scaled; none where a parameter is computed from others, or is not pruned."""
    found = [None if entry is None else marked(entry) for entry in layer[:4]]
    ih, hh, bias_ih, bias_hh = found
    given = zip(layer[:4], found, strict=True)
    if any(entry is not None and not _is_itself(origin) for entry, origin in given) or ih is None or hh is None:
        return []
    if ih.name not in masks or hh.name not in masks:
        return []
    size = layer.ih.shape[0]
    summed = slice(0, size - size // 3) if apart else slice(0, size)
    own = Place(hh.name, _rows(hh, summed), 0, _bias(bias_hh, summed))
    both = Gates(Place(ih.name, _rows(ih, summed), 0, _bias(bias_ih, summed), (own,)), summed, True, True)
    if not apart:
        return [both]
    last = slice(size - size // 3, size)
    return [
        both,
        Gates(Place(ih.name, _rows(ih, last), 0, _bias(bias_ih, last)), last, True, False),
        Gates(Place(hh.name, _rows(hh, last), 0, _bias(bias_hh, last)), last, False, True),
    ]


def copied(layer: RecurrentLayer) -> RecurrentLayer:
    """Copies of the parameters that are scaled, which nobody else knows."""
    with torch.no_grad():
        bias_ih, bias_hh = (None if bias is None else bias.clone() for bias in (layer.bias_ih, layer.bias_hh))
        return RecurrentLayer(layer.ih.clone(), layer.hh.clone(), bias_ih, bias_hh, layer.hr)


def _is_itself(origin: Origin | None) -> bool:
    return origin is not None and origin.layout is not None and not origin.scaled


def _rows(origin: Origin, rows: slice) -> Layout:
    layout = origin.layout
    assert layout is not None
    size = (rows.stop - rows.start, *layout.size[1:])
    return Layout(size, layout.stride, layout.offset + rows.start * layout.stride[0])


def _bias(origin: Origin | None, rows: slice) -> BiasPlace | None:
    return None if origin is None else BiasPlace(origin.name, _rows(origin, rows))
