"""Where a rule applies: by kind of operation, class and name of the module that runs, and depth."""

from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn

from lrp_prune.engine.operations import KINDS

LAYERS = ("linear", "convolution")
"""Kinds of products of an activation with a weight."""

LAYER = "layer"
"""What an entry is for that is for both."""

_RULELESS = ("embedding", "join")


@dataclass(frozen=True)
class Where:
    """The operations that a rule is for: those that meet all that is asked.

    Args:
        kind: of operation, or ``"layer"`` for products with a weight (``linear`` and ``convolution``); None for all kinds that
            the rule can be for.
        layer: class of the module that runs.
        name: pattern of the canonical name of the module that runs.
        depth: place among the layers of the kind, counted from 0 in the order in which they first run: ``range(3)`` for the
            first three. A layer is a weight; for kinds without one a module. Of ``"layer"`` it is the place among all weights.

    Raises:
        ValueError: for an unknown kind, a layer that is no class, a name that is no text, or a depth that is no range of places.

    Example:
        >>> Where("convolution", depth=range(3)).matches("convolution", "features.0", nn.Conv2d(3, 8, 3), 2)
        True
        >>> Where(name="features.*").matches("linear", "classifier.0", nn.Linear(3, 8), 0)
        False
    """

    kind: str | None = None
    layer: type[nn.Module] | None = None
    name: str | None = None
    depth: range | None = None

    def __post_init__(self) -> None:
        if self.kind not in (None, LAYER, *KINDS):
            why = ": it needs no rule, relevance of lookups and joined tensors follows from the gradient"
            raise ValueError(
                f"unknown kind of operation {self.kind!r}, expected one of {(*KINDS, LAYER)}"
                f"{why if self.kind in _RULELESS else ''}"
            )
        if self.layer is not None and not isinstance(self.layer, type):
            raise ValueError(f"layer must be a class of modules, such as nn.Linear, got {self.layer!r}")
        if self.name is not None and not isinstance(self.name, str):
            raise ValueError(
                f"name must be a pattern such as 'features.*', got {self.name!r}: use an entry for each of several"
            )
        places = self.depth
        if places is not None and not (isinstance(places, range) and places and min(places[0], places[-1]) >= 0):
            raise ValueError(
                f"depth must be a range of places counted from 0, such as range(3) for the first three layers, got {self.depth!r}"
            )

    @property
    def is_placed(self) -> bool:
        """Whether it asks for more than the kind."""
        return self.layer is not None or self.name is not None or self.depth is not None

    def is_for(self, kind: str) -> bool:
        """Whether operations of a kind may be among them."""
        return self.kind in (None, kind) or (self.kind == LAYER and kind in LAYERS)

    def matches(
        self, kind: str, name: str, module: nn.Module | None, depth: int | None, layer_depth: int | None = None
    ) -> bool:
        """Whether an operation of a kind, in a module of a name, is one of those."""
        depth = layer_depth if self.kind == LAYER else depth
        return (
            self.is_for(kind)
            and (self.layer is None or isinstance(module, self.layer))
            and (self.name is None or fnmatchcase(name, self.name))
            and (self.depth is None or depth in self.depth)
        )
