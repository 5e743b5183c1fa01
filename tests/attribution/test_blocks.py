"""Blocks, where what a layer writes goes through something before it is added, and where it is more than what layers wrote."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import lrp_prune
from tests.support.units import assert_taken_out_as_if_silent

WIDTH = 6


class Stream(nn.Module):
    """Two branches on a stream.

    Args:
        joined: what becomes of the stream and of what a branch writes.
    """

    def __init__(self, joined: Callable[["Stream", Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.joined = joined
        self.one, self.two = (nn.Sequential(nn.Linear(WIDTH, 8), nn.ReLU(), nn.Linear(8, WIDTH)) for _ in range(2))
        self.scale, self.shift = nn.Parameter(torch.rand(WIDTH) + 0.5), nn.Parameter(torch.rand(WIDTH))
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        for branch in (self.one, self.two):
            x = self.joined(self, x, branch(x))
        result: Tensor = self.head(x)
        return result


def _norm(module: Stream, x: Tensor) -> Tensor:
    """The norm of Gemma 2, in another precision and back."""
    wide = x.double()
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6) * (1 + module.scale.double())).type_as(x)


FORMS: dict[str, Callable[[Stream, Tensor, Tensor], Tensor]] = {
    "normalized before": lambda module, x, written: x + _norm(module, written),
    "both are scaled": lambda module, x, written: x * 0.5 + written * 2,
    "the stream is scaled by a parameter": lambda module, x, written: x * module.scale + written,
    "the stream is divided": lambda module, x, written: written + x / 3,
    "in the shape of the stream": lambda module, x, written: x + written.flatten().reshape_as(x),
}


def _blocks(model: nn.Module, x: Tensor) -> lrp_prune.Relevance:
    return lrp_prune.attribute(
        model, [x], target=lambda model, x: model(x).sum(), granularity="block", matmul_dtype=None
    )


@pytest.mark.parametrize("form", FORMS)
def test_what_is_normalized_or_scaled_on_the_way_is_a_block(form: str) -> None:
    torch.manual_seed(0)
    model, x = Stream(FORMS[form]).eval(), torch.randn(5, WIDTH)
    blocks = _blocks(model, x)
    assert list(blocks) == ["one.2", "two.2"]
    assert_taken_out_as_if_silent(blocks, {"one.2": model.one, "two.2": model.two}, model, x)


class Shifted(Stream):
    """Both sides have a shift of their own (ZAYA), of which one belongs to the block."""

    def __init__(self) -> None:
        super().__init__(lambda module, x, written: (written + module.shift) * 2 + (x + 1) * module.scale)


def test_a_shift_of_the_branch_belongs_to_the_block() -> None:
    torch.manual_seed(0)
    model, x = Shifted().eval(), torch.randn(5, WIDTH)
    blocks = _blocks(model, x)
    assert {member.parameter for member in blocks.members["two.2"]} == {"shift", "two.2.weight", "two.2.bias"}


class Rotated(nn.Module):
    """Queries that are turned by their halves (GPT-OSS): a sum of parts of one tensor is no stream."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH // 2, 3)

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.layer(x).chunk(2, dim=-1)
        result: Tensor = self.head(first * 0.3 - second * 0.8)
        return result


def test_halves_of_one_output_are_no_branch_and_stream() -> None:
    with pytest.raises(ValueError, match=r"Rotated has no block: none of its layers writes onto a residual stream"):
        _blocks(Rotated().eval(), torch.randn(5, WIDTH))


def _gathered(module: Stream, x: Tensor, written: Tensor) -> Tensor:
    """As experts do, which add up what they wrote."""
    rows = torch.arange(len(x)).flip(0)
    return x + torch.zeros_like(x).index_add(0, rows, written)


def test_what_is_more_than_the_output_of_a_layer_is_named() -> None:
    torch.manual_seed(0)
    x = torch.randn(5, WIDTH)
    expected = r"more than the output of one\.2, two\.2 \(it comes out of index_add\)"
    with pytest.raises(ValueError, match=f"Stream has no block: what is added to a residual stream is {expected}"):
        _blocks(Stream(_gathered).eval(), x)

    def second_is_gathered(module: Stream, x: Tensor, written: Tensor) -> Tensor:
        return x + written if next(steps) == 0 else _gathered(module, x, written)

    steps: Any = iter([0, 1])
    with pytest.warns(UserWarning, match=r"no block and left alone: .*more than the output of two\.2 \("):
        blocks = _blocks(Stream(second_is_gathered).eval(), x)
    assert list(blocks) == ["one.2"]


class Tied(nn.Module):
    """What the last branch writes by is what the output is made by as well, as in tied factors of an embedding."""

    def __init__(self, twice: bool) -> None:
        super().__init__()
        self.twice = twice
        self.one, self.up, self.down = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 8), nn.Linear(8, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.one(x).relu()
        for _ in range(2):
            written = self.down(self.up(x).relu())
            x = x + written
        x = x + written  # as often added as its weight has written
        return x @ self.down.weight if self.twice else x


def test_a_layer_that_is_run_again_is_a_block_unless_its_weight_writes_something_else_as_well() -> None:
    x = torch.randn(5, WIDTH)
    assert list(_blocks(Tied(False), x)) == ["one", "down"]
    with pytest.warns(UserWarning, match="left alone: the weights of down write something else as well"):
        assert list(_blocks(Tied(True), x)) == ["one"]


class Recomputed(Stream):
    """Its layers are computed again in the backward pass, which ends before what is written is added."""

    def forward(self, x: Tensor) -> Tensor:
        for branch in (self.one, self.two):
            x = checkpoint(lambda x, branch=branch: self.joined(self, x, branch(x)), x, use_reentrant=False)
        result: Tensor = self.head(x)
        return result


def test_blocks_are_found_in_layers_that_are_computed_again() -> None:
    assert list(_blocks(Recomputed(FORMS["normalized before"]), torch.randn(5, WIDTH))) == ["one.2", "two.2"]
