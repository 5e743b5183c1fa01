"""Parameters that look like data by name and shape: a forward shows which are multiplied like weights."""

import logging
from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

from torch import Tensor, nn

from lrp_prune.attribution.candidates import taken_for_data
from lrp_prune.engine.uses import Use
from lrp_prune.progress import is_first
from lrp_prune.relevance.unscored import DATA, described, patterns_of

_logger = logging.getLogger("lrp_prune")


class Beside:
    """What :func:`~lrp_prune.attribution.candidates.candidates` leaves out as data, until it is seen what is done with it.

    What activations are multiplied with in a matrix product is a weight, whatever it is called, unless it is added to
    activations or put beside them as well.

    Args:
        parameters: see :func:`~lrp_prune.attribution.candidates.taken_for_data`.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self.parameters = parameters
        self.multiplied: set[str] = set()
        self.told: dict[str, str] = {}
        """What was left alone, with the reason."""

    def used(self, use: Use) -> None:
        """A product has been made."""
        if use.origin.reason is None and use.origin.name in self.parameters:
            self.multiplied.add(use.origin.name)

    def left(self, data: set[str]) -> list[str]:
        """The names of those that are no weights.

        Args:
            data: parameters that are known to be added to activations, or put beside them.
        """
        return [name for name in self.parameters if name not in self.multiplied or name in data]

    def leave(self, reasons: Mapping[str, str], *tables: MutableMapping[str, Any]) -> None:
        """Take those that are no weights out of what is asked for, and say so.

        What is added to activations, or put beside them, is what it looked like, as is a vector: nothing is said of these.

        Args:
            reasons: why each of them has no relevance.
            *tables: what is asked for, and what is known of it.
        """
        for name in reasons:
            for table in tables:
                table.pop(name, None)
        known = {name for name, why in reasons.items() if why == DATA and name not in self.multiplied}
        told = {name: why for name, why in reasons.items() if name not in known and is_large(self.parameters[name])}
        self.told.update(told)
        if told and is_first():
            _logger.info("left alone, as no weights: %s. include= takes them", described(told))


def tell_tables(names: Sequence[str]) -> None:
    """Say which tables are left alone."""
    if names and is_first():
        tables = ", ".join(patterns_of(names))
        _logger.info("%s: rows are looked up by ids, as of an embedding, and left alone (include= takes them)", tables)


def tell_unseen(model: nn.Module, *which: Any) -> None:
    """Say what a method leaves alone that looks at no samples."""
    told = [name for name, entry in taken_for_data(model, *which).items() if is_large(entry)]
    if told and is_first():
        _logger.info(
            "%s: taken for data by name or shape, without samples, and left alone (include= takes them)",
            ", ".join(patterns_of(told)),
        )


def is_large(parameter: Tensor) -> bool:
    """Whether it is no vector in disguise."""
    return sum(size > 1 for size in parameter.shape) > 1
