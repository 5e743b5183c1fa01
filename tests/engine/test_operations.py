"""The table of operations: what its columns say of a function is true of the function."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lrp_prune.engine.nodes import LINEAR_NODES, NO_GRADIENT_NODES, node_kind
from lrp_prune.engine.operations import OPERATIONS, PLAIN_ROWS, ROWS, channels_of

OWNERS = (torch, Tensor, F, torch._C._nn, torch.special, torch.linalg)
ARGUMENTS: tuple[tuple[Any, ...], ...] = (
    (), (2,), (1,), (0,), (0, 1), ((2, 2),), ((4, 4),), (0, 0, 1), (0, torch.tensor([0])), (torch.float64,), (torch.ones(4, 4),),
    ((4, 4), [1.0, 1.0]), ((1, 1), 0), ((1, 1),),
)  # fmt: skip
INPUTS = (torch.linspace(0.2, 0.9, 16).view(4, 4), torch.linspace(0.2, 0.9, 16).view(1, 1, 4, 4), torch.ones(1, 1, 4))


def function_of(name: str) -> Callable[..., Any] | None:
    own = next((found for owner in OWNERS if (found := getattr(owner, name, None)) is not None), None)
    return own or next((function for function in OPERATIONS if getattr(function, "__name__", "") == name), None)


def results_of(name: str) -> list[Tensor]:
    """Float results of a function for what arguments it takes."""
    function, found = function_of(name), []
    assert function is not None
    for x, arguments in itertools.product(INPUTS, ARGUMENTS):
        try:
            result = function(x.clone().requires_grad_(), *arguments)
        except (TypeError, RuntimeError, ValueError, IndexError, NotImplementedError, AttributeError):
            continue
        first = result[0] if isinstance(result, tuple | list) and result else result
        if isinstance(first, Tensor) and first.grad_fn is not None:
            found.append(first)
    return found


def nodes_of(result: Tensor) -> set[str]:
    nodes, stack = set(), [result.grad_fn]
    while stack:
        node = stack.pop()
        if node is not None:
            nodes.add(node_kind(node))
            stack.extend(parent for parent, _ in node.next_functions)
    return nodes


def test_a_name_has_one_row_and_stands_for_a_function() -> None:
    assert not set(ROWS) & set(PLAIN_ROWS)
    assert [name for name in ROWS if function_of(name) is None] == []
    functions: dict[str, list[Any]] = {}
    for function, operation in OPERATIONS.items():
        functions.setdefault(getattr(function, "__name__", "").rstrip("_"), []).append(operation)
    for name, row in ROWS.items():
        for operation in functions.get(name, []):
            assert operation.kind == row.kind and operation.channels == row.channels, name


def test_what_works_in_place_has_a_twin_and_the_same_row() -> None:
    for function, operation in OPERATIONS.items():
        if operation.functional is not None:
            twin = OPERATIONS[operation.functional]
            assert function.__name__ == f"{operation.functional.__name__}_" and twin == operation._replace(
                functional=None
            )


LINEAR = [name for table in (ROWS, PLAIN_ROWS) for name, row in table.items() if row.linear]


def test_what_is_linear_makes_nodes_that_the_audit_knows() -> None:
    """Or is of a kind, which the audit knows by the function."""
    ran = []
    for name in LINEAR:
        results = results_of(name) if function_of(name) is not None else []
        if results:
            ran.append(name)
        for result in results if name not in ROWS else ():
            assert nodes_of(result) <= LINEAR_NODES | NO_GRADIENT_NODES, name
    assert len(ran) > 90


@pytest.mark.filterwarnings("ignore:.*(degrees of freedom|Implicit dimension)")
@pytest.mark.parametrize("kind", ["activation", "statistic", "softmax", "factors"])
def test_what_is_not_linear_makes_nodes_that_the_audit_does_not_know(kind: str) -> None:
    """All but those whose result is constant, or that pick entries."""
    picking = {"round", "floor", "ceil", "trunc", "fix", "frac", "sign", "heaviside", "hardtanh", "threshold"}
    names = [name for name, row in ROWS.items() if row.kind == kind and name not in picking]
    for name in names:
        assert not row_is_linear(name)
        for result in results_of(name):
            assert nodes_of(result) - LINEAR_NODES or name in ("rrelu", "linalg_norm"), name


def row_is_linear(name: str) -> bool:
    return ROWS[name].linear


@pytest.mark.parametrize("channels", ["copied", "entrywise"])
def test_what_keeps_entries_in_their_places_depends_on_each_alone(channels: str) -> None:
    """Changing one entry of the input changes that entry of the result only."""
    names = [name for table in (ROWS, PLAIN_ROWS) for name, row in table.items() if row.channels == channels]
    tried, random = 0, ("dropout", "rrelu")
    for name in names:
        function = function_of(name)
        if function is None or any(word in name for word in random):
            continue
        x = torch.linspace(0.2, 0.9, 6)
        other = x.clone()
        other[2] += 0.05
        try:
            before, after = function(x), function(other)
        except (TypeError, RuntimeError):
            continue
        if isinstance(before, Tensor) and before.shape == x.shape and before.dtype.is_floating_point:
            tried += 1
            assert set(torch.nonzero(before.nan_to_num(9.0) != after.nan_to_num(9.0)).flatten().tolist()) <= {2}, name
    assert tried >= {"copied": 5, "entrywise": 40}[channels]


def test_functions_without_a_row_are_told_by_the_kind_that_they_were_registered_as() -> None:
    assert channels_of("digamma", "activation") == "entrywise"
    assert channels_of("digamma", "plain") == channels_of("digamma", "softmax") == ""
    assert channels_of("relu", "registered") == "entrywise"
