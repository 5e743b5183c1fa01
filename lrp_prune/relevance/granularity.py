"""What relevance is about: single weights, or units that own several entries."""

from collections.abc import Sequence
from typing import Literal

Granularity = Literal["weight", "neuron", "head", "block", "embedding"]
GRANULARITIES: tuple[str, ...] = ("weight", "neuron", "head", "block", "embedding")


def granularities_of(granularity: str | Sequence[str]) -> tuple[str, ...]:
    """One granularity, or several kinds of units, given one by one or joined by commas.

    Raises:
        ValueError: if one is unknown, or several are not all of units.

    Example:
        >>> granularities_of("head,neuron"), granularities_of(["weight"])
        (('head', 'neuron'), ('weight',))
    """
    kinds = tuple(granularity.split(",")) if isinstance(granularity, str) else tuple(granularity)
    unknown = [kind for kind in kinds if kind not in GRANULARITIES]
    if unknown or not kinds:
        wrong = repr(granularity if len(kinds) != 1 or not unknown else unknown[0])
        raise ValueError(f"granularity must be one of {GRANULARITIES}, or a list of kinds of units, got {wrong}")
    if len(kinds) > 1 and (len(set(kinds)) < len(kinds) or {"weight", "embedding"} & set(kinds)):
        raise ValueError(
            f"several granularities are different kinds of units ('block', 'head', 'neuron'), got {list(kinds)}: collect "
            "weights and embeddings by themselves"
        )
    return kinds
