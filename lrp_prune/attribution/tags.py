"""Tags on intermediate tensors: what an activation is, for the rules that need to know.

* *gate*: it came out of an activation function (CP-LRP stops it where it multiplies something).
* *pattern*: it came out of a softmax; a product with it is the output of attention heads.
* *statistic*: it is a square root, a norm, a deviation or a reciprocal (it scales what it multiplies, and is no factor).

A tag survives views, casts, dropout and what works within a channel.
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

_MARK = "_lrp_prune_tag"

KEEPING = frozenset(
    """
    to float half bfloat16 double type type_as contiguous clone view reshape transpose swapaxes permute movedim flatten
    unflatten squeeze unsqueeze dropout alpha_dropout feature_dropout expand expand_as view_as reshape_as __getitem__
    masked_fill nan_to_num clamp chunk split tensor_split split_with_sizes narrow select unbind index_select flip roll
    repeat repeat_interleave tile
    """.split()
)
"""Functions that keep a tag: they move, cast, select or repeat entries, or replace some by constants."""

CHANNELWISE = frozenset(
    """
    batch_norm max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d
    adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d max_pool1d_with_indices
    max_pool2d_with_indices mul multiply div divide abs clamp clamp_min clamp_max square pow
    """.split()
)
"""Functions besides activations that work within a channel: what comes out is no gate any more, but may be a pattern."""

_REDUCING = frozenset("mean sum amax amin".split())
"""Functions of a statistic whose result is one."""

ELEMENTWISE_COPIES = frozenset("to float half bfloat16 double type type_as contiguous clone detach alias".split())
"""Functions that keep shape and meaning of each entry."""


@dataclass(frozen=True)
class Tag:
    """What is known of a tensor; see the module's docstring."""

    gate: bool = False
    pattern: bool = False
    statistic: bool = False


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


def is_statistic(value: Any) -> bool:
    """Whether the tensor scales what it multiplies."""
    tag = tag_of(value)
    return tag is not None and tag.statistic


def stem(function: Any) -> str:
    """A function's name, that of its twin if it works in place: ``silu_`` is ``silu``, ``__getitem__`` stays."""
    name: str = getattr(function, "__name__", "")
    return name if name.endswith("__") else name.rstrip("_") or name


def after(name: str, kind: str, operands: list[Any], active: list[bool]) -> Tag | None:
    """The tag of a function's result.

    Args:
        name: the function's :func:`stem`.
        kind: its kind of operation, ``"plain"`` where it has none.
        operands: its operands; for plain functions the first argument.
        active: which of them are activations, or were until a rule stopped them.
    """
    tags = [tag_of(operand) for operand, is_active in zip(operands, active, strict=True) if is_active]
    first = tags[0] if tags else None
    if kind == "activation":
        return Tag(gate=True)
    if kind == "softmax":
        return Tag(pattern=True)
    if kind == "product" and len(tags) == 2:  # statistics multiply to a statistic
        return Tag(statistic=True) if all(tag is not None and tag.statistic for tag in tags) else None
    if first is None or len(tags) > (2 if kind == "division" else 1):  # of a quotient the dividend tells
        return None
    # With constants: one minus a gate is a gate, a deviation plus a small number a deviation.
    if kind in ("sum", "join"):
        return Tag(gate=first.gate, statistic=first.statistic) if first.gate or first.statistic else None
    if name in KEEPING or kind == "dropout":
        return first
    if name in CHANNELWISE:
        return Tag(pattern=first.pattern and kind in ("product", "division"), statistic=first.statistic)
    return Tag(statistic=True) if first.statistic and name in _REDUCING else None
