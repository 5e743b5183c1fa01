"""The scope of a selection as one value: what is compared with what, and how."""

from dataclasses import dataclass
from typing import Literal, get_args

from lrp_prune.pruning.methods import Method
from lrp_prune.relevance import NORMALIZATIONS
from lrp_prune.selection.floors import resolved_floor
from lrp_prune.selection.keys import ORDERS, Order
from lrp_prune.selection.scopes import parse_scope

Normalization = Literal["mean", "sum", "max", "total"]
assert get_args(Normalization) == NORMALIZATIONS


@dataclass(frozen=True)
class Scope:
    """What is compared with what when the least relevant is looked for; a string stands for one with all else by default.

    Args:
        compared: ``"global"`` (all tensors), ``"layer"`` (one tensor), ``"row"`` (the inputs of one output), ``"column"`` (the
            outputs of one input), or ``"N:M"`` (of M consecutive inputs N are kept: ``"2:4"``; or ``"N:8"``, of each 8 as many as
            the tensor's sparsity says, which is a multiple of 1/8 then); None for the method's best.
        floor: of ``"global"``, and weights: the share that each tensor keeps of the average density, in [0, 1]. 0 is one ranking
            of all weights, 1 is (up to rounding) ``"layer"``. None for the best, 0.5: no tensor is pruned below half of the
            average density, so that a ranking by relevance cannot empty a layer that a saturated output hardly depends on.
        order: ``"absolute"``, what is closest to zero goes first; or ``"signed"``, what is lowest, the most negative.
        normalize: by what each tensor is divided before it is compared with others: its ``"mean"``, ``"sum"`` or ``"max"`` of
            absolute values, or the ``"total"`` of all tensors; None for nothing.

    Raises:
        ValueError: for an argument that is not possible.

    Example:
        >>> Scope("2:4"), Scope(floor=0.25)
        (Scope('2:4'), Scope(floor=0.25))
    """

    compared: str | None = None
    floor: float | None = None
    order: Order = "absolute"
    normalize: Normalization | None = None

    def __post_init__(self) -> None:
        if self.compared is not None:
            parse_scope(self.compared)
        if self.order not in ORDERS:
            raise ValueError(f"order must be one of {ORDERS}, got {self.order!r}")
        if self.normalize is not None and self.normalize not in NORMALIZATIONS:
            raise ValueError(f"normalize must be None or one of {NORMALIZATIONS}, got {self.normalize!r}")
        # Whatever it is of: an absent scope could still be the one that has floors.
        resolved_floor(self.floor, self.compared or "global", "weight")

    def __repr__(self) -> str:
        given = [] if self.compared is None else [repr(self.compared)]
        for name, usual in (("floor", None), ("order", "absolute"), ("normalize", None)):
            given += [f"{name}={getattr(self, name)!r}"] if getattr(self, name) != usual else []
        return f"Scope({', '.join(given)})"


def scope_of(scope: "str | Scope") -> Scope:
    """The scope that a string stands for, or is given.

    Raises:
        ValueError: if there is no such scope.
    """
    if isinstance(scope, str):
        return Scope(scope)
    if not isinstance(scope, Scope):
        raise ValueError(f"scope must be a name such as 'global', or a Scope, got {scope!r}")
    return scope


def settled(scope: "str | Scope | None", method: Method, kinds: tuple[str, ...]) -> Scope:
    """The scope with the method's best where it leaves something open.

    Args:
        scope: what was asked for.
        method: by which the scores are made.
        kinds: of what: ``("weight",)``, or kinds of units.

    Raises:
        ValueError: if there is no such scope, or its floor does not fit.

    Example:
        >>> from lrp_prune.pruning.methods import LRP, Wanda
        >>> settled(None, Wanda(), ("weight",)), settled("global", Wanda(), ("weight",)), settled(None, LRP(), ("head",))
        (Scope('row', floor=0.0), Scope('global', floor=0.5), Scope('global', floor=0.0))
    """
    asked = Scope() if scope is None else scope_of(scope)
    try:
        Scope(method.scope_for(kinds), method.floor if method.scope_for(kinds) == "global" else None)
    except ValueError as error:
        raise ValueError(f"method {method.name!r}: {error}") from error
    compared = asked.compared or method.scope_for(kinds)
    own = method.floor if (compared, kinds) == ("global", ("weight",)) else None
    floor = resolved_floor(own if asked.floor is None else asked.floor, compared, ",".join(kinds))
    return Scope(compared, floor, asked.order, asked.normalize)
