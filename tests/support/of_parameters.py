"""A model of bare parameters, as TransformerLens wrote them, and the same function of layers."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HEADS, DIM, WIDTH, HIDDEN, VOCABULARY, CLASSES = 3, 4, 10, 14, 20, 5
IDS = torch.randint(VOCABULARY, (6, 7), generator=torch.Generator().manual_seed(0))
BATCHES = [{"ids": IDS, "labels": torch.arange(6) % CLASSES}]


class Embed(nn.Module):
    """A table that an index looks up."""

    def __init__(self, look_up: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.W_E, self._look_up = nn.Parameter(torch.empty(VOCABULARY, WIDTH)), look_up

    def forward(self, ids: Tensor) -> Tensor:
        return self._look_up(self.W_E, ids)


def flat(weight: Tensor) -> Tensor:
    """``[heads, width, dim]`` as ``[heads * dim, width]``, which no view is."""
    return weight.permute(0, 2, 1).reshape(HEADS * DIM, WIDTH)


def split(x: Tensor) -> Tensor:
    return x.unflatten(-1, (HEADS, DIM))


READING: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "einsum": lambda x, w: torch.einsum("bpm,hmd->bphd", x, w),
    "copies in another shape": lambda x, w: split(F.linear(x, flat(w))),
    "a view of a copy": lambda x, w: split(F.linear(x, w.permute(0, 2, 1).contiguous().view(HEADS * DIM, WIDTH))),
    "a copy in two shapes": lambda x, w: split(F.linear(x, w.permute(0, 2, 1).reshape(-1).reshape(HEADS * DIM, WIDTH))),
}
WRITING: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "einsum": lambda z, w: torch.einsum("b q h d, h d m -> b q m", z, w),
    "einsum, weight first": lambda z, w: torch.einsum("hdm,bqhd->bqm", w, z),
    "einsum, heads before tokens": lambda z, w: torch.einsum("bhqd,hdm->bqm", z.transpose(1, 2), w),
    "einsum, axes of the weight turned": lambda z, w: torch.einsum("bqhd,dhm->bqm", z, w.transpose(0, 1)),
    "einsum of any number of dimensions": lambda z, w: torch.einsum("...hd,hdm->...m", z, w),
    "einsum, each head by itself": lambda z, w: torch.einsum("bqhd,hdm->bqhm", z, w).sum(2),
    "tensordot": lambda z, w: torch.tensordot(z, w, dims=2),
    "a view": lambda z, w: F.linear(z.flatten(2), w.permute(2, 0, 1).reshape(WIDTH, HEADS * DIM)),
}
LOOKING_UP: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "all of a row": lambda table, ids: table[ids, :],
    "index": lambda table, ids: table[ids.long().clamp(min=0)],
    "counted from the end": lambda table, ids: table[ids - VOCABULARY],
    "index_select": lambda table, ids: table.index_select(-2, ids.flatten()).view(*ids.shape, -1),
}


class OfParameters(nn.Module):
    """An attention and a feed-forward part, each written with tensors."""

    def __init__(self, read: str = "einsum", write: str = "einsum", look_up: str = "all of a row") -> None:
        super().__init__()
        self.embed = Embed(LOOKING_UP[look_up])
        self.W_Q, self.W_K, self.W_V = (nn.Parameter(torch.empty(HEADS, WIDTH, DIM)) for _ in range(3))
        self.b_V = nn.Parameter(torch.empty(HEADS, DIM))
        self.W_O = nn.Parameter(torch.empty(HEADS, DIM, WIDTH))
        self.W_in, self.b_in = nn.Parameter(torch.empty(WIDTH, HIDDEN)), nn.Parameter(torch.empty(HIDDEN))
        self.W_out = nn.Parameter(torch.empty(HIDDEN, WIDTH))
        self.head = nn.Linear(WIDTH, CLASSES)
        self._read, self._write = READING[read], WRITING[write]

    def forward(self, ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = self.embed(ids)
        q, k, v = (self._read(x, weight) for weight in (self.W_Q, self.W_K, self.W_V))
        pattern = torch.einsum("bqhd,bkhd->bhqk", q, k).softmax(-1)
        pattern = torch.where(pattern.isnan(), torch.zeros_like(pattern), pattern)
        x = x + self._write(torch.einsum("bhqk,bkhd->bqhd", pattern, v + self.b_V), self.W_O)
        x = x + (x @ self.W_in + self.b_in).relu() @ self.W_out
        return self.head(x.mean(1))


class OfModules(nn.Module):
    """The same function, of layers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.q, self.k = nn.Linear(WIDTH, HEADS * DIM, bias=False), nn.Linear(WIDTH, HEADS * DIM, bias=False)
        self.v, self.o = nn.Linear(WIDTH, HEADS * DIM), nn.Linear(HEADS * DIM, WIDTH, bias=False)
        self.up, self.down = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH, bias=False)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = self.embed(ids)
        q, k, v = (split(layer(x)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        pattern = (q @ k.transpose(-1, -2)).softmax(-1)
        x = x + self.o((pattern @ v).transpose(1, 2).flatten(2))
        x = x + self.down(self.up(x).relu())
        return self.head(x.mean(1))


SAME = {
    "embed.W_E": "embed.weight", "W_Q": "q.weight", "W_K": "k.weight", "W_V": "v.weight", "b_V": "v.bias", "W_O": "o.weight",
    "W_in": "up.weight", "b_in": "up.bias", "W_out": "down.weight", "head.weight": "head.weight", "head.bias": "head.bias",
}  # fmt: skip


def as_of_modules(name: str, values: Tensor) -> Tensor:
    """Values of a parameter in the shape of the layer's."""
    if name in ("W_Q", "W_K", "W_V"):
        return flat(values)
    if name == "W_O":
        return values.flatten(0, 1).T
    return values.T if name in ("W_in", "W_out") else values.flatten() if name == "b_V" else values


def both(**ways: str) -> tuple[OfParameters, OfModules]:
    torch.manual_seed(0)
    ours, other = OfParameters(**ways).double(), OfModules().double()
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            parameter.normal_(std=0.6)
            other.get_parameter(SAME[name]).copy_(as_of_modules(name, parameter))
    torch.testing.assert_close(ours(IDS), other(IDS))
    return ours.eval(), other.eval()
