"""What a row of a weight is, by the product that it is in: the entries that one output depends on."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import lrp_prune
from lrp_prune.selection.scopes import as_rows

Product = Callable[[Tensor, Tensor], Tensor]


def by_groups(x: Tensor, w: Tensor) -> Tensor:
    """Three rows by one matrix and three by the other; in bfloat16, with sizes that the kernel takes."""
    ends = torch.tensor([3, 6], dtype=torch.int32)
    return torch._grouped_mm(x.repeat(1, 4).bfloat16(), w.bfloat16(), offs=ends).float()


PRODUCTS: dict[str, tuple[tuple[int, ...], Product, str]] = {
    "einsum io": ((4, 8), lambda x, w: torch.einsum("bi,io->bo", x, w), "transposed"),
    "einsum oi": ((8, 4), lambda x, w: torch.einsum("bi, oi -> bo", x, w), "linear"),
    "einsum, the weight first": ((8, 4), lambda x, w: torch.einsum("oi,bi->bo", w, x), "linear"),
    "einsum without an output": ((4, 8), lambda x, w: torch.einsum("bi,io", x, w), "transposed"),
    "einsum of a list": ((4, 8), lambda x, w: torch.einsum("bi,io->bo", [x, w]), "transposed"),
    "@": ((4, 8), lambda x, w: x @ w, "transposed"),
    "@, the weight first": ((8, 4), lambda x, w: (w @ x.T).T, "linear"),
    "mm of a view": ((8, 4), lambda x, w: torch.mm(x, w.t()), "linear"),
    "addmm, scaled": ((4, 8), lambda x, w: torch.addmm(torch.ones(8), x, w, alpha=2.0), "transposed"),
    "bmm": ((2, 4, 4), lambda x, w: torch.bmm(x.expand(2, -1, -1), w).movedim(0, 1).flatten(1), "stacked_transposed"),
    "bmm of a view": ((2, 4, 4), lambda x, w: torch.bmm(x.expand(2, -1, -1), w.mT).movedim(0, 1).flatten(1), "stacked"),
    "einsum of heads": ((2, 4, 4), lambda x, w: torch.einsum("bi,hio->bho", x, w).flatten(1), "stacked_transposed"),
    "a flattened kernel": ((8, 2, 2, 1), lambda x, w: nn.functional.linear(x, w.flatten(1)), "convolution"),
    "a flattened kernel, transposed": ((8, 2, 2), lambda x, w: x @ w.flatten(1).T, "convolution"),
    "a part": ((16, 4), lambda x, w: nn.functional.linear(x, w[4:12]), "linear"),
    "one of a stack": ((2, 4, 8), lambda x, w: x @ w[0] + x @ w[1], "stacked_transposed"),
    "of one input": ((8, 1), lambda x, w: nn.functional.linear(x[:, :1], w), "linear"),
    "of one input, by a view": ((8, 1), lambda x, w: x[:, :1] @ w.t(), "linear"),
    "of one input, transposed": ((1, 8), lambda x, w: x[:, :1] @ w, "transposed"),
    "groups of rows": ((2, 16, 8), by_groups, "stacked_transposed"),
    "einsum by head": ((2, 4, 2), lambda x, w: torch.einsum("bhi,hoi->bho", x.view(-1, 2, 2), w).flatten(1), "stacked"),
}
STACKS = ("one of a stack", "groups of rows")
"""Whose layers make the same outputs."""
UNTOLD: dict[str, tuple[tuple[int, ...], Product]] = {
    "heads in the middle": ((4, 2, 4), lambda x, w: torch.einsum("bi,iho->bho", x, w).flatten(1)),
    "heads last": ((4, 4, 2), lambda x, w: torch.einsum("bi,ioh->bho", x, w).flatten(1)),
    "a sum over outputs": ((4, 8), lambda x, w: torch.einsum("bi,io->b", x, w)[:, None].expand(-1, 8)),
    "heads as columns": ((4, 2, 4), lambda x, w: torch.einsum("bi,io->bo", x, w.flatten(1))),
    "flattened inputs": ((2, 2, 8), lambda x, w: x @ w.flatten(0, 1)),
    "a slice in the middle": ((4, 2, 8), lambda x, w: x @ w[:, 0]),
    "a slice at the end": ((4, 8, 2), lambda x, w: x @ w[..., 0]),
    "a stack of stacks": ((2, 2, 4, 4), lambda x, w: (x @ w).movedim(2, 0).flatten(1)),
    "heads that are rows": ((4, 8), lambda x, w: torch.einsum("bhi,hio->bo", x.view(-1, 2, 2), w.view(2, 2, 8))),
    "two inputs": ((2, 2, 8), lambda x, w: torch.einsum("bij,ijo->bo", x.view(-1, 2, 2), w)),
}


class Using(nn.Module):
    def __init__(self, shape: tuple[int, ...], product: Product, width: int) -> None:
        super().__init__()
        self.weight, self.product, self.last = nn.Parameter(torch.randn(shape)), product, nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.product(x, self.weight))


def made(shape: tuple[int, ...], product: Product) -> tuple[Using, tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    x = torch.randn(6, 4)
    return Using(shape, product, product(x, torch.ones(shape)).shape[1]), (x, torch.randint(3, (6,)))


@pytest.mark.parametrize("name", PRODUCTS)
def test_a_row_is_what_one_output_depends_on(name: str) -> None:
    shape, product, layout = PRODUCTS[name]
    model, batch = made(shape, product)
    x = batch[0]
    assert lrp_prune.attribute(model, [batch]).layouts["weight"] == layout
    # By a look at each entry: which outputs move with it.
    numbers = torch.arange(model.weight.numel()).view(shape)
    moved = {}
    for number in range(numbers.numel()):
        alone = torch.zeros(shape).flatten()
        alone[number] = 1.0
        moved[number] = frozenset(
            (product(x, alone.view(shape)) - product(x, torch.zeros(shape))).any(0).nonzero()[:, 0].tolist()
        )
    rows = as_rows(numbers, layout, "row", name).flatten(0, 1).flatten(1).tolist()
    outputs = [{moved[entry] for entry in row} for row in rows if moved[row[0]]]  # a part is used
    assert all(len(each) == 1 for each in outputs) and len(outputs) >= len(rows) // 2
    if name not in STACKS:
        assert len({each for found in outputs for each in found}) == len(outputs)


@pytest.mark.parametrize("method", ["lrp", "wanda"])
@pytest.mark.parametrize("name", PRODUCTS)
def test_each_output_loses_half_of_its_inputs(name: str, method: str, recwarn: pytest.WarningsRecorder) -> None:
    shape, product, layout = PRODUCTS[name]
    model, batch = made(shape, product)
    lrp_prune.prune(model, [batch], 0.5, method=method, scope="row", recalibrate=False)
    kept = as_rows(model.weight.detach() != 0, layout, "row", name).flatten(2)
    kept, inputs = kept.sum(-1), kept.shape[-1]
    assert set(kept.flatten().tolist()) == {inputs - inputs // 2}
    assert not [each for each in recwarn if "nothing tells along which dimension" in str(each.message)]


@pytest.mark.parametrize("method", ["lrp", "magnitude"])
@pytest.mark.parametrize("name", UNTOLD)
def test_what_is_not_told_is_said(name: str, method: str) -> None:
    model, batch = made(*UNTOLD[name])
    with pytest.warns(
        UserWarning, match="nothing tells along which dimension weight have their outputs.*scope='layer'"
    ):
        lrp_prune.prune(model, [batch], 0.5, method=method, scope="row", recalibrate=False)
