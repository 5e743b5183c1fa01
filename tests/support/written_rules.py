"""Rules written out one contribution at a time, in float64, for layers of every dimension."""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import lrp_prune
from lrp_prune import Composite
from lrp_prune.attribution import AlphaBeta, Epsilon, Flat, Gamma, Terms, WSquare, ZBox, ZPlus

LOW, HIGH = (-2.0, -3.0, -2.5, -4.0), (3.0, 2.5, 4.0, 2.0)


def _entries(shape: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    return itertools.product(*map(range, shape))


def connections(layer: Any, x: Tensor, z: Tensor) -> list[tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]:
    """Each ``(output, input, weight)`` of one sample that belong together."""
    if isinstance(layer, nn.Linear):
        return [((j,), (i,), (j, i)) for j, i in _entries(layer.weight.shape)]
    found, groups = [], layer.groups
    moving, fixed = (
        (x, z) if layer.transposed else (z, x)
    )  # places that the kernel is moved to, and that it then covers
    for one, other, *kernel in _entries(layer.weight.shape):
        group = one // (layer.weight.shape[0] // groups)
        channel = group * layer.weight.shape[1] + other
        for place in _entries(moving.shape[2:]):
            covered = tuple(
                p * stride - padding + k * dilation
                for p, k, stride, padding, dilation in zip(
                    place, kernel, layer.stride, layer.padding, layer.dilation, strict=True
                )
            )
            if all(0 <= c < size for c, size in zip(covered, fixed.shape[2:], strict=True)):
                ends = ((one, *place), (channel, *covered))
                found.append((*(ends[::-1] if layer.transposed else ends), (one, other, *kernel)))
    return found


@dataclass
class Written:
    """Contributions of one sample, written out: entries of all tensors flattened."""

    x: Tensor
    w: Tensor
    b: Tensor
    of_output: Tensor
    channel: Tensor
    outputs: int

    def total(self, n: Tensor) -> Tensor:
        """The sum of what each output gets."""
        return torch.zeros(self.outputs, dtype=n.dtype).index_add(0, self.of_output, n)

    def shares(self, n: Tensor, of_bias: Tensor | float = 0.0, epsilon: float = 0.0) -> Tensor:
        total = self.total(n) + of_bias
        total = torch.where(total < 0, total - epsilon, total + epsilon)[self.of_output]
        return torch.where(total == 0, 0.0, n / total)


def _epsilon(c: Written) -> Tensor:
    return c.shares(c.x * c.w, c.b, 0.3)


def _gamma(c: Written, epsilon: float = 0.0) -> Tensor:
    n = c.x * c.w
    z = c.total(n) + c.b
    favoured = torch.where(n * z[c.of_output] > 0, 1.4 * n, n)
    return c.shares(favoured, torch.where(c.b * z > 0, 1.4 * c.b, c.b), epsilon)


def _alpha_beta(c: Written) -> Tensor:
    n = c.x * c.w
    return 2 * c.shares(n.clamp(min=0), c.b.clamp(min=0)) - c.shares(n.clamp(max=0), c.b.clamp(max=0))


def _z_plus(c: Written, epsilon: float = 0.0) -> Tensor:
    return c.shares((c.x * c.w).clamp(min=0), c.b.clamp(min=0), epsilon)


def _flat(c: Written) -> Tensor:
    return c.shares(torch.ones_like(c.w))


def _w_square(c: Written) -> Tensor:
    return c.shares(c.w**2)


def _z_box(c: Written) -> Tensor:
    return c.shares(c.x * c.w + 2 * c.w.clamp(min=0) - 3 * c.w.clamp(max=0))


def _z_box_of_channels(c: Written) -> Tensor:
    low, high = (torch.tensor(bound, dtype=c.w.dtype)[c.channel] for bound in (LOW, HIGH))
    return c.shares(c.x * c.w - low * c.w.clamp(min=0) - high * c.w.clamp(max=0))


RULES: dict[str, tuple[Terms, Callable[[Written], Tensor]]] = {
    "epsilon": (Epsilon(0.3), _epsilon),
    "gamma": (Gamma(0.4), _gamma),
    "gamma, stabilised": (Gamma(0.4, stabilizer=0.2), lambda c: _gamma(c, 0.2)),
    "alpha_beta": (AlphaBeta(2, 1), _alpha_beta),
    "z_plus": (ZPlus(), _z_plus),
    "z_plus, stabilised": (ZPlus(stabilizer=0.2), lambda c: _z_plus(c, 0.2)),
    "flat": (Flat(), _flat),
    "w_square": (WSquare(), _w_square),
    "z_box": (ZBox(-2, 3), _z_box),
    "z_box of channels": (ZBox(LOW, HIGH), _z_box_of_channels),
}
CONSERVING = ["gamma", "flat", "w_square", "z_box", "z_box of channels"]

LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(4, 5, bias=False), (4,)),
    "linear with bias": (lambda: nn.Linear(4, 5), (4,)),
    "conv1d with bias": (lambda: nn.Conv1d(4, 3, 3, padding=1), (4, 5)),
    "conv1d, strided and dilated": (lambda: nn.Conv1d(4, 3, 2, stride=2, padding=1, dilation=2, bias=False), (4, 7)),
    "conv2d with bias": (lambda: nn.Conv2d(4, 3, 2), (4, 3, 4)),
    "conv2d, grouped and padded": (lambda: nn.Conv2d(4, 6, 3, padding=1, groups=2, bias=False), (4, 3, 3)),
    "conv2d, of each channel": (lambda: nn.Conv2d(4, 4, (2, 3), dilation=(2, 1), groups=4), (4, 4, 4)),
    "conv3d": (lambda: nn.Conv3d(4, 2, 2, padding=(1, 0, 0), bias=False), (4, 2, 3, 2)),
    "conv_transpose1d": (lambda: nn.ConvTranspose1d(4, 3, 3, stride=2, padding=1, bias=False), (4, 4)),
    "conv_transpose2d, grouped, with bias": (
        lambda: nn.ConvTranspose2d(4, 4, 2, stride=2, dilation=2, groups=2, output_padding=1),
        (4, 2, 3),
    ),
    "conv_transpose3d": (lambda: nn.ConvTranspose3d(4, 2, 2, bias=False), (4, 2, 1, 2)),
}


class Case:
    """A layer, inputs of either sign with a zero among them, and what the formula says.

    Args:
        layer: one of :data:`LAYERS`.
        shares: by connection, what each has of its output's relevance.
        positive: whether no input is negative.
        norm: whether a batch normalisation in evaluation mode comes ``"before"`` or ``"after"`` the layer, and is a part of it.
    """

    def __init__(
        self, layer: str, shares: Callable[[Written], Tensor], positive: bool = False, norm: str | None = None
    ) -> None:
        make, shape = LAYERS[layer]
        torch.manual_seed(0)
        self.layer: Any = make().double()
        for parameter in self.layer.parameters():
            nn.init.normal_(parameter)
        self.x = torch.randn(3, *shape, dtype=torch.float64)
        self.x = self.x.abs() if positive else self.x
        self.x.view(3, -1)[:, 1] = 0.0
        channels = (4, self.layer(self.x).shape[1])
        scales, shifts = (
            [torch.ones(size).double() for size in channels],
            [torch.zeros(size).double() for size in channels],
        )
        self.model, self.name = self.layer, "weight"
        if norm is not None:
            place = ("before", "after").index(norm)
            made, scales[place], shifts[place] = normalization(channels[place], len(shape))
            self.model = nn.Sequential(*((made, self.layer) if norm == "before" else (self.layer, made)))
            self.name = f"{1 - place}.weight"
        z = self.model(self.x).detach()
        self.c = torch.randn_like(z)
        self.relevance = self.c * z
        weight, found = self.layer.weight.detach(), connections(self.layer, self.x, z)
        of_output, of_input, of_weight = (
            torch.tensor([_place(entry[end], size) for entry in found])
            for end, size in enumerate((z.shape[1:], self.x.shape[1:], weight.shape))
        )
        into, channel = (torch.tensor([entry[end][0] for entry in found]) for end in (0, 1))
        own = weight.flatten()[of_weight] * scales[1][into]
        bias = torch.zeros(z.shape[1]) if self.layer.bias is None else self.layer.bias.detach()
        bias = (bias.double() * scales[1] + shifts[1]).reshape(-1, *(1,) * (z.dim() - 2)).expand(z.shape[1:]).flatten()
        bias = bias.clone().index_add_(0, of_output, own * shifts[0][channel])
        self.has_input = torch.bincount(of_output, minlength=z[0].numel()).view(z.shape[1:]) > 0
        """Of which outputs: some of a transposed convolution are its bias."""
        per_sample = []
        for x, relevance, output in zip(self.x, self.relevance, z, strict=True):
            written = Written(x.flatten()[of_input], own * scales[0][channel], bias, of_output, channel, z[0].numel())
            torch.testing.assert_close(written.total(written.x * written.w) + bias, output.flatten())
            per_sample.append(shares(written) * relevance.flatten()[of_output])
        self.messages = torch.stack(per_sample)
        """``[samples, connections]``."""
        self.of_inputs = torch.zeros(3, self.x[0].numel()).double().index_add(1, of_input, self.messages)
        self.of_inputs = self.of_inputs.view_as(self.x)
        self._of_weight = of_weight

    def of_weights(self, messages: Tensor) -> Tensor:
        """``[samples, ...]``, the sums of what the connections of each weight have."""
        weight = self.layer.weight
        found = torch.zeros(3, weight.numel()).double().index_add(1, self._of_weight, messages)
        return found.view(3, *weight.shape)

    def target(self, model: nn.Module, batch: Tensor) -> Tensor:
        return (model(batch) * self.c).sum()

    def found(self, rule: Terms, statistic: Any) -> Tensor:
        """The sums of the layer's weight."""
        relevance = lrp_prune.attribute(
            self.model, [self.x], self.target, declared(rule), statistic, include=[self.name], matmul_dtype=None
        )
        return relevance.sums[self.name]


def normalization(channels: int, dims: int) -> tuple[nn.Module, Tensor, Tensor]:
    """One with statistics, and by what it scales and shifts each channel; some scales are negative."""
    norm = (nn.BatchNorm1d, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[dims - 1](channels).double().eval()
    assert norm.running_mean is not None and norm.running_var is not None
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    nn.init.normal_(norm.running_mean)
    nn.init.uniform_(norm.running_var, 0.5, 2.0)
    scale = (norm.weight / (norm.running_var + norm.eps).sqrt()).detach()
    return norm, scale, (norm.bias - norm.running_mean * scale).detach()


def _place(entry: tuple[int, ...], shape: tuple[int, ...]) -> int:
    place = 0
    for index, size in zip(entry, shape, strict=True):
        place = place * size + index
    return place


def declared(rule: Terms) -> Composite:
    return Composite("declared", {"layer": rule})
