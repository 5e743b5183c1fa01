"""Tags on intermediate tensors: what an activation is, for the rules that need to know.

* *gate*: it came out of an activation function (CP-LRP stops it where it multiplies something).
* *pattern*: it came out of a softmax; a product with it is the output of attention heads.
* *statistic*: it is a square root, a norm, a deviation or a reciprocal (it scales what it multiplies, and is no factor).
* *decay*: it is an exponential, by which a state is multiplied in each step of a scan (it scales it, likewise).

A tag survives views, casts, dropout and what works within a channel; a gate also what scales it and what picks its entries, as
routers of experts do.
"""

from dataclasses import dataclass, replace
from typing import Any

from lrp_prune.engine.facts import Fact
from lrp_prune.engine.operations import channels_of

DECAYS = frozenset({"exp", "exp2"})
"""Functions that make a decay."""

_PUT_CONSTANTS = frozenset("masked_fill nan_to_num clamp where".split())
"""Functions that replace some entries by constants, and leave the others what they are."""

_PICKING = frozenset("topk sort take".split())
"""Functions that pick entries of a gate."""

_REDUCING = frozenset("mean sum amax amin".split())
"""Functions of a statistic whose result is one."""


@dataclass(frozen=True)
class Tag:
    """What is known of a tensor; see the module's docstring."""

    gate: bool = False
    pattern: bool = False
    statistic: bool = False
    decay: bool = False


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


def is_decay(value: Any) -> bool:
    """Whether the tensor is by how much a state decays."""
    tag = tag_of(value)
    return tag is not None and tag.decay


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
        return Tag(gate=True, decay=name in DECAYS)
    if kind == "softmax":
        return Tag(pattern=channels_of(name, kind) != "reduced")
    if kind == "product" and len(tags) == 2:  # scales multiply to a scale
        scales = [tag for tag in tags if tag is not None and (tag.statistic or tag.decay)]
        if len(scales) < 2:
            return None
        return Tag(statistic=all(tag.statistic for tag in scales), decay=any(tag.decay for tag in scales))
    if first is None or len(tags) > (2 if kind == "division" else 1):  # of a quotient the dividend tells
        return None
    if name in _PUT_CONSTANTS:
        return first
    # With constants: one minus a gate is a gate, a deviation plus a small number a deviation.
    if kind in ("sum", "join"):
        return _if_any(Tag(gate=first.gate, statistic=first.statistic, decay=first.decay))
    channels = channels_of(name, kind)
    if channels in ("copied", "moved"):
        return first
    if kind == "product":
        return _if_any(first)
    if kind == "division":
        # Gates that share what they let through are gates; an exponential in its share of all of them is a pattern of some kind.
        normalized = len(tags) == 2 and tags[1] is not None and tags[1].statistic
        return _if_any(replace(first, gate=first.gate and not normalized, decay=first.decay and len(tags) == 1))
    if channels in ("entrywise", "pooled") or name == "batch_norm":
        return _if_any(Tag(statistic=first.statistic))
    if name in _PICKING:
        return _if_any(Tag(gate=first.gate))
    return Tag(statistic=True) if first.statistic and name in _REDUCING else None


def _if_any(tag: Tag) -> Tag | None:
    """None where there is nothing to be known."""
    return tag if tag.gate or tag.pattern or tag.statistic or tag.decay else None
