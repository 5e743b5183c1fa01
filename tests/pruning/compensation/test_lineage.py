"""Marks follow what is computed, whatever the operation is."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lrp_prune.pruning.compensation.lineage import Lineage

WAYS: dict[str, Callable[[Tensor], Any]] = {
    "a comparison": lambda x: x > 0,
    "what is detached": lambda x: x.detach() * 2,
    "integers": lambda x: x.argmax(-1) + 1,
    "a view": lambda x: x.view(-1)[1:],
    "written into": lambda x: torch.zeros(2, 3).copy_(x),
    "part of it": lambda x: torch.zeros(4, 3).index_put_((torch.tensor([1, 2]),), x),
    "several": lambda x: x.max(-1),
    "a number": lambda x: x.sum().item(),
    "a sparse tensor": lambda x: x + torch.zeros(2, 3).to_sparse(),
}


@pytest.mark.parametrize("way", WAYS)
def test_what_is_made_of_a_marked_tensor_is_marked(way: str) -> None:
    told: list[frozenset[str]] = []
    x, other = torch.randn(2, 3), torch.randn(2, 3)
    with Lineage(lambda marks, _: told.append(marks)) as lineage:
        WAYS[way](other)
        assert not told
        lineage.begin(x, "first")
        found = WAYS[way](x)
        assert set(told) == {frozenset({"first"})}
        if isinstance(found, Tensor | tuple):
            told.clear()
            _ = (found if isinstance(found, Tensor) else found[1]) + 1
            assert told == [frozenset({"first"})]


def test_marks_add_up_and_begin_anew() -> None:
    told: list[frozenset[str]] = []
    x, y = torch.randn(2), torch.randn(2)
    with Lineage(lambda marks, _: told.append(marks)) as lineage:
        lineage.begin((x, [y]), "first")
        lineage.begin(y, "second")
        z = x + y
        assert told.pop() == {"first", "second"}
        lineage.begin(z, "third")
        _ = z * 2
        assert told.pop() == {"third"}
        x.add_(z)
        _ = x * 2
        assert told.pop() == {"first", "third"}


def test_what_is_freed_marks_nothing_that_comes_after_it() -> None:
    told: list[frozenset[str]] = []
    with Lineage(lambda marks, _: told.append(marks)) as lineage:
        for _ in range(20):
            lineage.begin(torch.randn(64), "first")
            _ = torch.randn(64) + 1
    assert not told
