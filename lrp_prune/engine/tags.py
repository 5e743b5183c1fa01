"""Tags on intermediate tensors: what an activation is, for the rules that need to know.

* *gate*: it came out of an activation function (CP-LRP stops it where it multiplies something).
* *pattern*: it came out of a softmax; a product with it is the output of attention heads.
* *statistic*: it is a square root, a norm, a deviation or a reciprocal (it scales what it multiplies, and is no factor).

A tag survives views, casts, dropout and what works within a channel.
"""

from dataclasses import dataclass
from typing import Any

from lrp_prune.engine.facts import Fact
from lrp_prune.engine.operations import channels_of

_PUT_CONSTANTS = frozenset("masked_fill nan_to_num clamp".split())
"""Functions that replace some entries by constants, and leave the others what they are."""

_REDUCING = frozenset("mean sum amax amin".split())
"""Functions of a statistic whose result is one."""


@dataclass(frozen=True)
class Tag:
    """What is known of a tensor; see the module's docstring."""

    gate: bool = False
    pattern: bool = False
    statistic: bool = False


_FACT: Fact[Tag] = Fact("tag")
tag_of = _FACT.of


def clear_tag(value: Any) -> None:
    """Take a tensor's tag off."""
    _FACT.note(value, None)


def set_tag(value: Any, tag: Tag | None) -> None:
    """Tag a tensor, or each tensor of a list; nothing is tagged with nothing."""
    if tag is None:
        return
    for entry in value if isinstance(value, tuple | list) else (value,):
        _FACT.note(entry, tag)


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
    channels = channels_of(name, kind)
    if channels in ("copied", "moved") or name in _PUT_CONSTANTS:
        return first
    if channels in ("entrywise", "pooled") or kind in ("product", "division") or name == "batch_norm":
        return Tag(pattern=first.pattern and kind in ("product", "division"), statistic=first.statistic)
    return Tag(statistic=True) if first.statistic and name in _REDUCING else None
