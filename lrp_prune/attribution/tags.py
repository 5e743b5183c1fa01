"""Tags on intermediate tensors: what an activation is, for the rules and units that need to know.

* *gate*: it came out of an activation function (CP-LRP stops it where it multiplies something).
* *pattern*: it came out of a softmax; a product with it is the output of attention heads.
* *heads*: it is the output of attention heads of some width, so the linear layer that reads it is an output projection.
* *hidden*: each of its channels depends on one output channel of some layers only, so the layer that reads it has them
  as hidden units (neurons).

A tag survives views, casts and dropout; ``hidden`` survives elementwise functions and products as well.
"""

from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

_MARK = "_lrp_prune_tag"

KEEPING = frozenset(
    """
    to float half bfloat16 double type type_as contiguous clone view reshape transpose swapaxes permute movedim flatten
    unflatten squeeze unsqueeze dropout alpha_dropout feature_dropout expand expand_as view_as reshape_as __getitem__
    masked_fill nan_to_num clamp chunk split tensor_split split_with_sizes
    """.split()
)
"""Functions that keep a tag: they move or cast entries, or replace some by constants."""

_MOVING = frozenset("transpose swapaxes permute movedim".split())

CHANNELWISE = frozenset(
    """
    batch_norm max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d
    adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d max_pool1d_with_indices
    max_pool2d_with_indices mul multiply div divide abs clamp clamp_min clamp_max square pow
    """.split()
)
"""Functions besides activations that keep channels apart, so that ``hidden`` survives them."""

ELEMENTWISE_COPIES = frozenset("to float half bfloat16 double type type_as contiguous clone detach alias".split())
"""Functions that keep shape and meaning of each entry."""


@dataclass(frozen=True)
class Tag:
    """What is known of a tensor; see the module's docstring."""

    gate: bool = False
    pattern: bool = False
    head_width: int | None = None
    producers: frozenset[tuple[str, int, str]] = frozenset()
    units: int = 0


def tag_of(value: Any) -> Tag | None:
    """The tag of a tensor, if it has one."""
    return getattr(value, _MARK, None) if isinstance(value, Tensor) else None


def set_tag(value: Any, tag: Tag | None) -> None:
    """Tag a tensor, or each tensor of a list; nothing is tagged with nothing."""
    if tag is None:
        return
    if isinstance(value, Tensor):
        setattr(value, _MARK, tag)
    elif isinstance(value, tuple | list):
        for entry in value:
            set_tag(entry, tag)


def clear_tag(value: Any) -> None:
    """Take a tensor's tag off."""
    if tag_of(value) is not None:
        delattr(value, _MARK)


def is_gate(value: Any) -> bool:
    """Whether the tensor came out of an activation function."""
    tag = tag_of(value)
    return tag is not None and tag.gate


def _product(operands: list[Tag | None]) -> Tag | None:
    """The tag of a product of activations: if both sides have as many hidden units, these are one."""
    hidden = [tag for tag in operands if tag is not None and tag.units]
    if len(hidden) != len(operands) or len({tag.units for tag in hidden}) != 1:
        return None
    return Tag(producers=frozenset().union(*(tag.producers for tag in hidden)), units=hidden[0].units)


def after(name: str, kind: str, operands: list[Any], active: list[bool], result: Any) -> Tag | None:
    """The tag of a function's result.

    Args:
        name: the function's name.
        kind: its kind of operation, ``"plain"`` where it has none.
        operands: its operands; for plain functions the first argument.
        active: which of them are activations.
        result: what it returned.
    """
    tags = [tag_of(operand) for operand, is_active in zip(operands, active, strict=True) if is_active]
    first = tags[0] if tags else None
    if kind == "activation":
        return replace(first or Tag(), gate=True, pattern=False, head_width=None)
    if kind == "softmax":
        return Tag(pattern=True)
    if kind == "attention":
        return Tag(head_width=int(result.shape[-1])) if isinstance(result, Tensor) else None
    if kind in ("matmul", "einsum") and len(tags) == 2 and isinstance(result, Tensor):
        if first is not None and first.pattern:
            return Tag(head_width=int(result.shape[-1]))
        return None
    if kind == "product" and len(tags) == 2:
        return _product(tags)
    if (
        kind in ("plain", "dropout", "product", "division", "normalization", "power")
        and len(tags) == 1
        and first is not None
    ):
        stem = name.rstrip("_") or name
        if stem in KEEPING or kind == "dropout":
            return replace(first, producers=frozenset(), units=0) if stem in _MOVING and first.units else first
        if stem in CHANNELWISE:
            return replace(
                first, gate=False, pattern=first.pattern and kind in ("product", "division"), head_width=None
            )
    return None
