"""What fits together: relevance of the same entries, whole or divided alike."""

from typing import TYPE_CHECKING

from torch import Tensor

from lrp_prune.relevance.contributions import INPUTS

if TYPE_CHECKING:
    from lrp_prune.relevance.relevance import Relevance


def check_same_entries(first: "Relevance", second: "Relevance", action: str) -> None:
    """Refuse relevance of other things or of other tensors.

    Raises:
        ValueError: likewise.
    """
    if first.granularity != second.granularity:
        raise ValueError(f"cannot {action} relevance of {first.granularity}s and of {second.granularity}s")
    difference = sorted(set(first) ^ set(second))
    if difference:
        raise ValueError(f"cannot {action} relevance of different tensors: {difference[0]!r} is in one of them only")
    check_shapes(first, second, action)


def check_rules(first: "Relevance", second: "Relevance", action: str) -> None:
    """Refuse relevance that composites of one name and other rules have propagated. What is not known is not compared.

    Raises:
        ValueError: likewise.
    """
    if first.rules and second.rules and first.rules != second.rules:
        mine, theirs = first.rules.splitlines(), second.rules.splitlines()
        only = (
            [line.strip() for line in mine if line not in theirs],
            [line.strip() for line in theirs if line not in mine],
        )
        differ = " and ".join(", ".join(lines) for lines in only if lines) or "their order"
        raise ValueError(
            f"cannot {action} relevance by two composites that are both named {first.composite!r}, and differ in {differ}"
        )


def check_shapes(first: "Relevance", second: "Relevance", action: str) -> None:
    """Refuse tensors of the same name that have other shapes, or are divided in another way.

    Raises:
        ValueError: likewise.
    """
    for name in first:
        keys = (name, name + INPUTS)
        if name in second and any(first.shardings.get(key) != second.shardings.get(key) for key in keys):
            raise ValueError(f"cannot {action} {name!r}: it is divided among processes in another way, or in one only")
        if name in second and first.sums[name].shape != second.sums[name].shape:
            raise ValueError(
                f"cannot {action} {name!r}: shapes {tuple(first.sums[name].shape)} and {tuple(second.sums[name].shape)}"
            )


def summed(mine: Tensor | None, theirs: Tensor | None) -> Tensor:
    """The sum of two sums; one that is absent is zero."""
    if mine is None or theirs is None:
        present = mine if mine is not None else theirs
        assert present is not None
        return present.clone()
    return mine + theirs.to(mine.device)
