"""Small networks of convolutions."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lrp_prune
from lrp_prune.relevance import Relevance


def conv_bn(inputs: int, outputs: int, kernel: int = 1, **options: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, kernel, **options), nn.BatchNorm2d(outputs))


class Net(nn.Module):
    """Layers by name, and a function that runs them."""

    def __init__(self, run: Callable[["Net", Tensor], Tensor], **layers: nn.Module | nn.Parameter) -> None:
        super().__init__()
        self._run = run
        for name, layer in layers.items():
            setattr(self, name, layer)
        self.head = nn.Linear(int(self.head_inputs()), 3)

    def head_inputs(self) -> int:
        with torch.no_grad():
            self.head = nn.Identity()
            return self(torch.zeros(2, 4, 6, 6)).shape[-1]

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self._run(self, x))


def pooled(x: Tensor) -> Tensor:
    return x.mean((2, 3))


def shuffled(x: Tensor, groups: int) -> Tensor:
    """ShuffleNet's."""
    samples, channels, height, width = x.shape
    return x.view(samples, groups, channels // groups, height, width).transpose(1, 2).reshape(x.shape)


def _by_response(x: Tensor, gain: Tensor, shift: Tensor) -> Tensor:
    """ConvNeXt V2's global response normalisation, of channels that come last."""
    response = torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True)
    return gain * (x * response / (response.mean(-1, keepdim=True) + 1e-6)) + shift + x


def _by_root_mean_square(x: Tensor, weight: Tensor) -> Tensor:
    """RMSNorm as language models write it out, of channels that come last."""
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * weight


# name: network, and for each group of units the modules whose output channels they are (unit u is channel u).
NETS: dict[str, tuple[Callable[[], nn.Module], dict[str, list[str]]]] = {
    "grouped": (
        lambda: Net(
            lambda n, x: pooled(n.b(n.a(x).relu()).relu()), a=nn.Conv2d(4, 8, 1), b=nn.Conv2d(8, 8, 1, groups=2)
        ),
        {"b": ["a"], "head": ["b"]},
    ),
    "grouped in the middle": (
        lambda: Net(
            lambda n, x: pooled(n.c(n.b(n.a(x).relu()).relu()).relu()),
            a=nn.Conv2d(4, 6, 3),
            b=nn.Conv2d(6, 9, 1, groups=3),
            c=nn.Conv2d(9, 4, 1),
        ),
        {"b": ["a"], "c": ["b"], "head": ["c"]},
    ),
    "depthwise with batch norm": (
        lambda: Net(
            lambda n, x: pooled(n.c(n.b(n.a(x).relu()).relu()).relu()),
            a=conv_bn(4, 6, 3),
            b=conv_bn(6, 6, 3, groups=6),
            c=conv_bn(6, 5),
        ),
        {"c.0": ["a.1", "b.1"], "head": ["c.1"]},
    ),
    "depthwise with two filters a channel": (
        lambda: Net(
            lambda n, x: pooled(n.c(n.b(n.a(x).relu()).relu()).relu()),
            a=nn.Conv2d(4, 3, 3),
            b=nn.Conv2d(3, 6, 3, groups=3),
            c=nn.Conv2d(6, 5, 1),
        ),
        {"b": ["a"], "c": ["b"], "head": ["c"]},
    ),
    "transposed": (
        lambda: Net(
            lambda n, x: pooled(n.c(n.b(n.a(x).relu()).relu()).relu()),
            a=nn.Conv2d(4, 6, 3),
            b=nn.ConvTranspose2d(6, 4, 2, groups=2),
            c=nn.ConvTranspose2d(4, 5, 2),
        ),
        {"b": ["a"], "c": ["b"], "head": ["c"]},
    ),
    "flattened": (
        lambda: Net(lambda n, x: n.a(x).relu().flatten(1), a=conv_bn(4, 5, 3)),
        {"head": ["a.1"]},
    ),
    "residual": (
        lambda: Net(
            lambda n, x: pooled((n.c(n.b((s := n.a(x).relu()))).relu() + s).relu()),
            a=conv_bn(4, 6, 3),
            b=conv_bn(6, 3),
            c=conv_bn(3, 6),
        ),
        {"b.0": ["a.1", "c.1"], "c.0": ["b.1"]},
    ),
    "projected residual": (
        lambda: Net(
            lambda n, x: pooled((n.c(n.b((s := n.a(x).relu())).relu()) + n.d(s)).relu()),
            a=conv_bn(4, 6, 3),
            b=conv_bn(6, 3),
            c=conv_bn(3, 5),
            d=conv_bn(6, 5),
        ),
        {"b.0": ["a.1"], "c.0": ["b.1"], "head": ["c.1", "d.1"]},
    ),
    "shuffled": (
        lambda: Net(
            lambda n, x: pooled(n.c(shuffled(n.b(shuffled(n.a(x).relu(), 2)).relu(), 3)).relu()),
            a=nn.Conv2d(4, 6, 1),
            b=nn.Conv2d(6, 6, 1, groups=2),
            c=nn.Conv2d(6, 4, 1, groups=2),
        ),
        {"b": ["a"], "c": ["b"], "head": ["c"]},
    ),
    "turned in place": (  # as many channels as rows and columns
        lambda: Net(
            lambda n, x: pooled(
                n.b(
                    n.a(x)
                    .relu()
                    .unsqueeze_(0)
                    .transpose_(2, 4)
                    .swapaxes_(2, 4)
                    .squeeze_(0)
                    .transpose_(1, 2)
                    .mT.mT.transpose_(1, 2)
                ).relu()
            ),
            a=nn.Conv2d(4, 6, 1),
            b=nn.Conv2d(6, 5, 1),
        ),
        {"b": ["a"], "head": ["b"]},
    ),
    "squeeze and excite": (
        lambda: Net(
            lambda n, x: pooled(
                n.b((y := n.a(x).relu()) * n.e(n.s(y.mean((2, 3), keepdim=True)).relu()).sigmoid()).relu()
            ),
            a=conv_bn(4, 6, 3),
            s=nn.Conv2d(6, 2, 1),
            e=nn.Conv2d(2, 6, 1),
            b=nn.Conv2d(6, 5, 1),
        ),
        {"s": ["a.1"], "e": ["s"], "head": ["b"]},
    ),
    "padded, pooled and resized": (
        lambda: Net(
            lambda n, x: pooled(
                n.b(
                    F.interpolate(F.max_pool2d(F.pad(n.a(x).relu(), (1, 1, 1, 1), "reflect"), 2), scale_factor=2.0)
                ).relu()
            ),
            a=nn.Conv2d(4, 5, 3),
            b=nn.Conv2d(5, 4, 3, padding=1),
        ),
        {"b": ["a"], "head": ["b"]},
    ),
    "concatenated and split": (
        lambda: Net(
            lambda n, x: pooled(
                torch.cat([n.c((z := torch.cat([n.a(x), n.b(x)], 1).relu())[:, :6]), n.d(z[:, 6:])], 1).relu()
            ),
            a=nn.Conv2d(4, 4, 1),
            b=nn.Conv2d(4, 5, 1),
            c=nn.Conv2d(6, 3, 1),
            d=nn.Conv2d(3, 2, 1),
        ),
        {"c(a)": ["a"], "c(b)": ["b"], "head(c)": ["c"], "head(d)": ["d"]},
    ),
    "used twice": (
        lambda: Net(
            lambda n, x: pooled(n.b(n.b(n.a(x).relu()).relu()).relu()),
            a=nn.Conv2d(4, 5, 1),
            b=nn.Conv2d(5, 5, 3, padding=1),
        ),
        {"b": ["a", "b"]},
    ),
    "shifted and scaled by hand": (
        lambda: Net(
            lambda n, x: pooled(n.b((n.a(x) * n.scale.view(1, -1, 1, 1) + n.shift.view(-1, 1, 1)).relu()).relu()),
            a=nn.Conv2d(4, 5, 3, bias=False),
            b=nn.Conv2d(5, 4, 1),
            scale=nn.Parameter(torch.zeros(5)),
            shift=nn.Parameter(torch.zeros(5)),
        ),
        {"b": ["a+shift"], "head": ["b"]},
    ),
    "scaled by its share of all responses": (
        lambda: Net(
            lambda n, x: pooled(n.b(_by_response(n.a(x).relu().movedim(1, -1), n.gain, n.shift)).movedim(-1, 1)),
            a=nn.Conv2d(4, 5, 3),
            b=nn.Linear(5, 4),
            gain=nn.Parameter(torch.zeros(1, 1, 1, 5)),
            shift=nn.Parameter(torch.zeros(1, 1, 1, 5)),
        ),
        {"b": ["a+shift"], "head": ["b"]},
    ),
    "normed by the root mean square": (
        lambda: Net(
            lambda n, x: pooled(n.b(n.norm(n.a(x).relu().movedim(1, -1))).movedim(-1, 1)),
            a=nn.Conv2d(4, 5, 3),
            norm=nn.RMSNorm(5),
            b=nn.Linear(5, 4),
        ),
        {"b": ["a"], "head": ["b"]},
    ),
    "normed by the root mean square, written out": (
        lambda: Net(
            lambda n, x: pooled(n.b(_by_root_mean_square(n.a(x).relu().movedim(1, -1), n.weight)).movedim(-1, 1)),
            a=nn.Conv2d(4, 5, 3),
            weight=nn.Parameter(torch.zeros(5)),
            b=nn.Linear(5, 4),
        ),
        {"b": ["a"], "head": ["b"]},
    ),
    "in place": (
        lambda: Net(lambda n, x: pooled(n.b(n.a(x).relu_().mul_(2)).relu_()), a=conv_bn(4, 5), b=nn.Conv2d(5, 4, 1)),
        {"b": ["a.1"], "head": ["b"]},
    ),
    "rearranged to depth": (
        lambda: Net(
            lambda n, x: pooled(n.b(F.pixel_shuffle(n.a(x).relu(), 2)).relu()),
            a=nn.Conv2d(4, 12, 1),
            b=nn.Conv2d(3, 4, 1),
        ),
        {"head": ["b"]},
    ),
}


def units(model: nn.Module, batch: Any, granularity: str = "neuron", **options: Any) -> Relevance:
    if isinstance(batch, Tensor):
        batch = (batch, torch.zeros(len(batch), dtype=torch.int64))
    return lrp_prune.attribute(model, [batch], target="class", granularity=granularity, matmul_dtype=None, **options)
