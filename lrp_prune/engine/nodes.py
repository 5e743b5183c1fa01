"""Autograd nodes: which of them are linear, by the table of operations."""

import re
from typing import Any

from lrp_prune.engine.operations import PLAIN_ROWS, ROWS

_OTHER_NODES = """
    AccumulateGrad UnsafeView ReshapeAlias Slice SelectBackwardAutogradNestedTensor ToCopy CopyBackwards CopySlices Copy
    AsStrided Lift LiftFresh SplitCopy Clamp ClampMin ClampMax PackPaddedSequence MkldnnAdaptiveAvgPool2D MkldnnMaxPool2D
    MkldnnMaxPool3D
""".split()
"""Autograd nodes that go by other names than functions do, or are part of one; a clip picks the entry or a bound."""


def _node(name: str) -> str:
    """What autograd calls a function's node: ``max_pool2d`` is ``MaxPool2D``."""
    return re.sub(r"(?:^_?|_|(?<=\d))([a-z])", lambda found: found[1].upper(), name)


LINEAR_NODES = frozenset(
    {_node(name) for table in (ROWS, PLAIN_ROWS) for name, row in table.items() if row.linear}.union(_OTHER_NODES)
)
"""Autograd nodes that are linear in their input, or pick from it: their plain gradient times input is the relevance."""

MOVING_NODES = frozenset(
    {_node(name) for name, row in PLAIN_ROWS.items() if row.channels in ("copied", "moved")}.union(
        "UnsafeView ReshapeAlias Slice Select Index ToCopy".split()
    )
)
"""Autograd nodes after which entries are what they were, if elsewhere."""

NO_GRADIENT_NODES = frozenset({"WarnNotImplemented", "NotImplemented"})
"""Autograd nodes of operations without a gradient, such as quantized ones: nothing comes out of them."""


def node_kind(node: Any) -> str:
    """``MulBackward0`` -> ``Mul``, ``DiagonalBackward0_copy`` -> ``Diagonal``."""
    name: str = node.name().rpartition("::")[2].removesuffix("_copy")
    stem = name.rstrip("0123456789")
    return stem.removesuffix("Backward") or stem
