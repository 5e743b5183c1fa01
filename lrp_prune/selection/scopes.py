"""What is compared with what: how a scope divides a parameter into groups of entries."""

import math
import re
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from lrp_prune.names import matches

SCOPES: tuple[str, ...] = ("global", "layer", "row", "column", "N:M")
LAYOUTS: tuple[str, ...] = (
    "linear",
    "transposed",
    "stacked",
    "stacked_transposed",
    "convolution",
    "transposed_convolution",
)


class Structure(NamedTuple):
    """N:M sparsity: of each ``size`` consecutive inputs of an output, ``kept`` are kept; None: as many as a sparsity says."""

    kept: int | None
    size: int

    @property
    def name(self) -> str:
        """As it is written."""
        return f"{'N' if self.kept is None else self.kept}:{self.size}"

    def pruned(self, sparsity: float) -> int:
        """How many of ``size`` go."""
        return round(sparsity * self.size) if self.kept is None else self.size - self.kept


def parse_scope(scope: str) -> str | Structure:
    """A scope's name, or what ``"N:M"`` says.

    Example:
        >>> parse_scope("row"), parse_scope("2:4"), parse_scope("N:8")
        ('row', Structure(kept=2, size=4), Structure(kept=None, size=8))
    """
    if scope in SCOPES[:-1]:
        return scope
    if isinstance(scope, str) and (match := re.fullmatch(r"(\d+|N):(\d+)", scope)):
        structure = Structure(None if match[1] == "N" else int(match[1]), int(match[2]))
        if structure.size > 1 if structure.kept is None else 0 < structure.kept <= structure.size:
            return structure
    raise ValueError(
        f"scope must be 'global', 'layer', 'row', 'column' or 'N:M' with 0 < N <= M ('2:4', say; or 'N:8' for as many as the "
        f"sparsity says), got {scope!r}"
    )


def check_reachable(scope: str | Structure, sparsity: float) -> None:
    """Refuse a sparsity that is not the one of an ``N:M`` scope, or no whole number of M."""
    if not isinstance(scope, Structure):
        return
    if scope.kept is None:
        if not math.isclose(sparsity, scope.pruned(sparsity) / scope.size, abs_tol=1e-6):
            raise ValueError(
                f"sparsity {sparsity} is no multiple of 1/{scope.size}, which scope '{scope.name}' prunes: round it, as "
                f"Budget.in_steps({scope.size}) of lrp_prune.pruning.budgets does"
            )
    elif not math.isclose(sparsity, 1 - scope.kept / scope.size, abs_tol=1e-6):
        raise ValueError(
            f"sparsity {sparsity} is unreachable with scope '{scope.name}', which prunes exactly "
            f"{1 - scope.kept / scope.size:.6g}: use sparsity={1 - scope.kept / scope.size:.6g} or another scope"
        )


def check_units_scope(granularity: str, scope: str) -> None:
    """Refuse a scope that compares weights where units are compared."""
    if granularity != "weight" and parse_scope(scope) not in ("global", "layer"):
        raise ValueError(
            f"scope {scope!r} compares single weights, but the relevance is about {granularity}s: use 'global' or 'layer'"
        )


def check_selectable(
    layouts: Mapping[str, str | None],
    shapes: Mapping[str, tuple[int, ...]],
    sparsity: float | Mapping[str, float],
    scope: str,
    granularity: str = "weight",
) -> None:
    """Refuse, before anything is scored, what a selection would refuse whatever the scores are.

    Args:
        layouts: of each weight that is to be scored (or group of units), None where it is not known.
        shapes: of these weights.
        sparsity: what is to be pruned, in all or by pattern of names.
        scope: what is compared with what.
        granularity: what is scored.

    Raises:
        ValueError: a pattern matches nothing, or the scope does not fit the granularity, the sparsity or a weight's shape.

    Example:
        >>> check_selectable({"head.weight": "linear"}, {"head.weight": (4, 15)}, 0.5, "2:4")
        Traceback (most recent call last):
        ...
        ValueError: head.weight has 15 inputs, which 4 does not divide, as scope '2:4' needs: pass exclude=['head.weight']
    """
    parsed = parse_scope(scope)
    check_units_scope(granularity, scope)
    for _, names, rate in groups_by_pattern(list(layouts), sparsity):
        check_reachable(parsed, rate)
        for name in names if granularity == "weight" and parsed not in ("global", "layer") else ():
            layout = layouts[name]
            if layout is not None:
                as_rows(torch.empty(shapes[name], device="meta"), layout, parsed, name)


def number_to_prune(sparsity: float, entries: int) -> int:
    """How many of ``entries`` a sparsity means: the nearest integer (to the even one from the middle), in every scope.

    The same convention as :mod:`torch.nn.utils.prune`. Rounding down would turn 0.29 of 100 into 28.

    Example:
        >>> number_to_prune(0.5, 576), number_to_prune(0.29, 100), number_to_prune(0.5, 5)
        (288, 29, 2)
    """
    return round(sparsity * entries)


def check_sparsity(sparsity: float, what: str = "sparsity") -> float:
    """Refuse what is no fraction in [0, 1)."""
    if isinstance(sparsity, bool) or not isinstance(sparsity, int | float) or not 0 <= sparsity < 1:
        raise ValueError(f"{what} must be a number in [0, 1), got {sparsity!r}")
    return float(sparsity)


def groups_by_pattern(
    names: list[str], sparsity: float | Mapping[str, float]
) -> list[tuple[str | None, list[str], float]]:
    """The names that are selected together, with their pattern and sparsity; a name belongs to the first that matches it.

    A pattern that is a tensor's name means this one alone, whatever characters it has: a budget's keys are names.

    Raises:
        ValueError: if a pattern matches no name, or a sparsity is out of range.

    Example:
        >>> groups_by_pattern(["a.weight", "b.weight", "c.weight"], {"a": 0.5, "[ab].weight": 0.7})
        [('a', ['a.weight'], 0.5), ('[ab].weight', ['b.weight'], 0.7)]
    """
    if not isinstance(sparsity, Mapping):
        return [(None, names, check_sparsity(sparsity))]
    if not sparsity:
        raise ValueError("sparsity has no pattern: give a number in [0, 1) or {pattern: number}")
    groups: dict[str, list[str]] = {pattern: [] for pattern in sparsity}
    known = set(names)

    def meant(pattern: str, name: str) -> bool:
        return name == pattern if pattern in known else matches(name, [pattern])

    for name in names:
        pattern = next((pattern for pattern in sparsity if meant(pattern, name)), None)
        if pattern is not None:
            groups[pattern].append(name)
    for pattern, rate in sparsity.items():
        check_sparsity(rate, f"sparsity[{pattern!r}]")
        if not any(meant(pattern, name) for name in names):
            raise ValueError(
                f"sparsity[{pattern!r}] matches no tensor of the relevance, which has {', '.join(names[:3])}, ..."
            )
        if not groups[pattern]:
            raise ValueError(
                f"sparsity[{pattern!r}] matches only tensors that earlier patterns took: put it before them"
            )
    return [(pattern, groups[pattern], float(rate)) for pattern, rate in sparsity.items()]


def layout_of(shape: tuple[int, ...]) -> str:
    """The layout that a shape suggests: 2 dimensions a linear layer, 3 stacked ones (experts), more a convolution."""
    return {2: "linear", 3: "stacked"}.get(len(shape), "convolution") if len(shape) > 1 else "vector"


def as_rows(tensor: Tensor, layout: str, scope: str | Structure, name: str) -> Tensor:
    """A view whose first two dimensions number the groups and whose other dimensions are a group's entries.

    | layout | shape | row | column | N:M along |
    |---|---|---|---|---|
    | ``linear`` | ``[out, in]`` | ``out`` | ``in`` | ``in`` |
    | ``transposed`` (``Conv1D`` of GPT-2) | ``[in, out]`` | ``out`` | ``in`` | ``in`` |
    | ``stacked`` (experts) | ``[stack, out, in]`` | ``stack, out`` | ``stack, in`` | ``in`` |
    | ``stacked_transposed`` | ``[stack, in, out]`` | ``stack, out`` | ``stack, in`` | ``in`` |
    | ``convolution`` | ``[out, in, *kernel]`` | ``out`` | ``in`` | ``in`` |
    | ``transposed_convolution`` (not in groups) | ``[in, out, *kernel]`` | ``out`` | ``in`` | ``in`` |
    | ``vector`` | ``[n]`` | the whole | none | ``n`` |

    Raises:
        ValueError: if the tensor has too few dimensions for its layout or scope, or an input dimension that M does not
        divide.
    """
    if tensor.dim() < 2:
        if scope == "column":
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}: scope 'column' needs matrices, exclude it or use 'layer'"
            )
        view = tensor.reshape(1, 1, -1)
    else:
        stacked = layout.startswith("stacked")
        if tensor.dim() < 2 + stacked or (not layout.endswith("convolution") and tensor.dim() != 2 + stacked):
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, which is not {layout}")
        view = tensor if stacked else tensor.unsqueeze(0)
        if "transposed" in layout:
            view = view.transpose(1, 2)
        if scope == "column":
            view = view.transpose(1, 2)
    if isinstance(scope, Structure):
        view = view.movedim(2, -1)
        if view.shape[-1] % scope.size:
            raise ValueError(
                f"{name} has {view.shape[-1]} inputs, which {scope.size} does not divide, as scope "
                f"'{scope.name}' needs: pass exclude=[{name!r}]"
            )
    return view


def input_dim(layout: str) -> int:
    """The dimension that lies along a layer's inputs."""
    return {"vector": 0, "transposed": 0, "transposed_convolution": 0, "stacked": 2}.get(layout, 1)


def row_dims(layout: str, scope: str | Structure) -> list[int]:
    """The dimensions that number the groups of :func:`as_rows`: no group has two indices along one of them.

    Example:
        >>> row_dims("linear", "row"), row_dims("linear", "column"), row_dims("stacked", "column")
        ([0], [1], [2, 0])
    """
    if layout == "vector":
        return []
    inputs = input_dim(layout)
    stacked = layout.startswith("stacked")
    outputs = 1 + 2 - inputs if stacked else 1 - inputs
    return [inputs if scope == "column" else outputs, *([0] if stacked else [])]
