"""Methods that explain a value which the model computes, by one backward pass for each batch."""

from dataclasses import dataclass
from typing import Any, ClassVar

from lrp_prune.attribution.defaults import best_for
from lrp_prune.engine.composites import composite_of
from lrp_prune.pruning.methods.base import Collects, Method
from lrp_prune.relevance.statistics import OF_RELEVANCE
from lrp_prune.targets import Inferred, checked


@dataclass(frozen=True)
class LRP(Method):
    """Layer-wise relevance propagation: by how much a weight or unit contributes to what the model computes.

    Args:
        composite: the rules, by name (``"epsilon"``, ``"attnlrp"``, ``"cp_lrp"``, ...), as a file (``"mine.yaml"``), as
            ``{kind of operation: rule}``, or as a :class:`~lrp_prune.attribution.Composite`; None for the best measured:
            ``"epsilon"`` for weights, ``"attnlrp"`` for units.
        statistic: how tokens and samples are reduced, see :func:`lrp_prune.attribute`; None for the best measured:
            ``"geometric"`` for weights, ``"abs_token"`` for units.
        target: what is explained, see :func:`lrp_prune.attribute`; None to infer it from the model and its first batch.
        skip_first: how many tokens at the beginning of each sample of a causal language model enter no statistic. Such models use
            the first token as a sink of attention, with activations that dwarf all others.

    Raises:
        FileNotFoundError: there is no such file of a composite.
        ValueError: for a composite, statistic or target that does not exist.

    Example:
        >>> LRP().collects(("weight",))
        Collects(statistic='geometric', composite='epsilon', skip_first=0, explains=True, steps=None)
        >>> str(LRP(composite="cp_lrp"))
        "lrp (composite='cp_lrp')"
    """

    composite: Any = None
    statistic: Any = None
    target: Any = None
    skip_first: int = 0
    name: ClassVar[str] = "lrp"

    def __post_init__(self) -> None:
        if self.composite is not None:
            self._composite()
        check_collected(self.statistic, self.target, self.skip_first)

    def _composite(self) -> Any:
        return composite_of(self.composite)

    def collects(self, kinds: tuple[str, ...]) -> Collects:
        """Relevance by the composite in the statistic."""
        best = best_for(kinds)
        composite = best.composite if self.composite is None else self._composite()
        return Collects(self.statistic or best.statistic, composite, self.skip_first)


@dataclass(frozen=True)
class Gradient(Method):
    """Gradient times weight (or activation), in the statistics of relevance.

    Args:
        statistic, target, skip_first: see :class:`LRP`.

    Raises:
        ValueError: for a statistic or target that does not exist.
    """

    statistic: Any = None
    target: Any = None
    skip_first: int = 0
    name: ClassVar[str] = "gradient"

    def __post_init__(self) -> None:
        check_collected(self.statistic, self.target, self.skip_first)

    def collects(self, kinds: tuple[str, ...]) -> Collects:
        """The gradient, by the composite that has no rule."""
        return Collects(self.statistic or best_for(kinds).statistic, "gradient", self.skip_first)


def check_collected(statistic: Any, target: Any, skip_first: Any) -> None:
    """Refuse at once what no collection could be made with.

    Raises:
        ValueError: likewise.
    """
    if isinstance(statistic, str) and statistic not in OF_RELEVANCE:
        raise ValueError(f"statistic must be one of {OF_RELEVANCE}, got {statistic!r}")
    if target is not None and not isinstance(target, Inferred):
        checked(target)
    if isinstance(skip_first, bool) or not isinstance(skip_first, int) or skip_first < 0:
        raise ValueError(f"skip_first must be an integer of at least 0, got {skip_first!r}")
