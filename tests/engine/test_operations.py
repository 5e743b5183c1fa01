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

_ROWS, _FIRST = torch.arange(4).repeat(4, 1), torch.tensor([0])


def _images(x: Tensor) -> Tensor:
    return x.reshape(1, 1, *x.shape)


def _complex(x: Tensor) -> Tensor:
    return torch.complex(x, x)


CALLS: dict[str, Callable[[Tensor], Any]] = {
    **{
        name: lambda x, name=name: getattr(torch, name)([x, x])
        for name in "cat concat concatenate stack hstack vstack dstack row_stack column_stack".split()
    },
    **{name: lambda x, name=name: getattr(x.double(), name)() for name in ("float", "half", "bfloat16", "contiguous")},
    **{name: lambda x, name=name: getattr(_complex(x), name)() for name in ("conj", "conj_physical")},
    **{name: lambda x, name=name: getattr(torch, name)(_complex(x)) for name in ("real", "imag", "view_as_real")},
    "index_add": lambda x: x.index_add(0, _FIRST, x[:1]),
    "scatter_add": lambda x: x.scatter_add(0, _ROWS, x),
    "scatter": lambda x: x.scatter(0, _ROWS, x),
    "scatter_reduce": lambda x: x.scatter_reduce(0, _ROWS, x, "sum"),
    "index_reduce": lambda x: x.index_reduce(0, _FIRST, x[:1], "mean"),
    "where": lambda x: torch.where(x.detach() > 0.5, x, -x),
    "index_put": lambda x: x.index_put((_FIRST,), x[:1]),
    "index_copy": lambda x: x.index_copy(0, _FIRST, x[:1]),
    "index_fill": lambda x: x.index_fill(0, _FIRST, 0.0),
    "masked_fill": lambda x: x.masked_fill(x.detach() > 0.5, 0.0),
    "masked_scatter": lambda x: x.masked_scatter(x.detach() > 0.5, x),
    "masked_select": lambda x: x.masked_select(x.detach() > 0.5),
    "select_scatter": lambda x: torch.select_scatter(x, x[0], 0, 1),
    "diagonal_scatter": lambda x: torch.diagonal_scatter(x, x[0]),
    "max_unpool2d": lambda x: F.max_unpool2d(_images(x), _images(torch.arange(16).view(4, 4)), 2),
    "max_unpool3d": lambda x: F.max_unpool3d(_images(x)[None], _images(torch.arange(16).view(4, 4))[None], (1, 2, 2)),
    "take": lambda x: x.take(_ROWS),
    "put": lambda x: x.put(_FIRST, x[0, :1]),
    "double": lambda x: x.double(),
    "type_as": lambda x: x.type_as(torch.ones((), dtype=torch.float64)),
    "permute": lambda x: x.permute(1, 0),
    "unflatten": lambda x: x.unflatten(0, (2, 2)),
    "gather": lambda x: x.gather(0, _ROWS),
    "take_along_dim": lambda x: x.take_along_dim(_ROWS, 0),
    "flip": lambda x: x.flip(0),
    "atleast_1d": lambda x: torch.atleast_1d(x.sum()),
    "atleast_2d": lambda x: torch.atleast_2d(x[0]),
    "im2col": lambda x: torch._C._nn.im2col(_images(x), (2, 2), (1, 1), (0, 0), (1, 1)),
    "col2im": lambda x: F.fold(x[:, :1], 2, 2),
    "view_as_complex": lambda x: torch.view_as_complex(torch.stack([x, x], -1)),
    "upsample_linear1d": lambda x: torch._C._nn.upsample_linear1d(x[None], [8], False),
    "upsample_bilinear2d": lambda x: torch._C._nn.upsample_bilinear2d(_images(x), [8, 8], False),
    "upsample_bicubic2d": lambda x: torch._C._nn.upsample_bicubic2d(_images(x), [8, 8], False),
    "upsample_trilinear3d": lambda x: torch._C._nn.upsample_trilinear3d(_images(x)[None], [2, 8, 8], False),
    "upsample_nearest3d": lambda x: torch._C._nn.upsample_nearest3d(_images(x)[None], [2, 8, 8]),
    "cholesky": lambda x: torch.cholesky(x @ x.mT + torch.eye(4)),
    "linalg_cholesky": lambda x: torch.linalg.cholesky(x @ x.mT + torch.eye(4)),
    "linalg_cholesky_ex": lambda x: torch.linalg.cholesky_ex(x @ x.mT + torch.eye(4)).L,
    "prelu": lambda x: F.prelu(x, torch.tensor([0.2])),
    "_softmax": lambda x: torch._softmax(x, 0, False),
}
"""Functions whose arguments do not fit into the pattern above."""
NOT_RUN = frozenset(
    """alias avg_pool1d_with_indices avg_pool2d_with_indices avg_pool3d_with_indices adaptive_avg_pool1d_with_indices
    adaptive_avg_pool2d_with_indices adaptive_avg_pool3d_with_indices zero fft_r2c fft_c2c fft_c2r nested_tensor_from_mask detach
    requires_grad_ segment_reduce embedding_bag _upsample_nearest_exact3d _upsample_bilinear2d_aa
    _upsample_bicubic2d_aa""".split()
)
"""Names of operators that no function is called by, of what makes no node, and of what takes more than a line to call."""
IN_ROWS_WITH_NODES_OF_THEIR_OWN = frozenset("quantile nanquantile trapezoid trapz cumulative_trapezoid nanmean".split())
"""Linear, or in proportion, by the function's account; made of a product with constants, of which only the function knows."""


def function_of(name: str) -> Callable[..., Any] | None:
    own = next((found for owner in OWNERS if (found := getattr(owner, name, None)) is not None), None)
    return own or next((function for function in OPERATIONS if getattr(function, "__name__", "") == name), None)


def results_of(name: str) -> list[Tensor]:
    """Float results of a function for what arguments it takes."""
    if name in CALLS:
        made = CALLS[name](INPUTS[0].clone().requires_grad_())
        assert made.grad_fn is not None, name
        return [made]
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
    for name in LINEAR:
        results = results_of(name) if name in CALLS or function_of(name) is not None else []
        assert bool(results) is (name not in NOT_RUN), name
        if name not in IN_ROWS_WITH_NODES_OF_THEIR_OWN:
            assert all(nodes_of(result) <= LINEAR_NODES | NO_GRADIENT_NODES for result in results), name


@pytest.mark.filterwarnings("ignore:.*(degrees of freedom|Implicit dimension)")
@pytest.mark.parametrize("kind", ["activation", "statistic", "softmax", "factors"])
def test_what_is_not_linear_makes_nodes_that_the_audit_does_not_know(kind: str) -> None:
    """All but those whose result is constant, or that pick entries."""
    picking = {"round", "floor", "ceil", "trunc", "fix", "frac", "sign", "heaviside", "hardtanh", "threshold"}
    names = [name for name, row in ROWS.items() if row.kind == kind and name not in picking]
    for name in names:
        assert not row_is_linear(name)
        assert results_of(name), name
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
