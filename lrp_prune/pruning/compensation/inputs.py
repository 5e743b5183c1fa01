"""What the layers of a stage get: kept from the dense model, and shown by a run behind what is pruned."""

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lrp_prune.engine.batch_layout import BatchLayout
from lrp_prune.engine.call import Call
from lrp_prune.engine.forms import Convolution
from lrp_prune.engine.uses import Product
from lrp_prune.pruning.compensation.repeating import RepeatedUses, Results, Seen
from lrp_prune.pruning.compensation.stages import StageReached
from lrp_prune.pruning.compensation.systems import Taken, taken_of
from lrp_prune.pruning.compensation.weighing import weights_of_rows
from lrp_prune.pruning.masks import Masks
from lrp_prune.pruning.pairs import Part, parts_of
from lrp_prune.pruning.places import Place

ROOM = 4 << 30
"""Bytes for what one stage's layers got in the dense model."""


class DenseInputs:
    """What the layers of a stage get in the dense model, from the one run of it: kept as far as there is room.

    Of what does not fit, inputs of the stage's first layers go, which take least to be computed again.

    Args:
        room: bytes for each batch, on the CPU.
    """

    def __init__(self, room: int) -> None:
        self._room = room
        self._kept: dict[int, dict[Place, list[Taken | None]]] = {}
        self.dropped: set[tuple[int, Place]] = set()
        """Of which batch what does not fit; of processes that work in step, in any of them."""

    def add(self, batch: int, place: Place, taken: Taken | None) -> None:
        """Keep what a layer gets in one more of its uses; None where it cannot be told."""
        kept = self._kept.setdefault(batch, {})
        if (batch, place) in self.dropped:
            return
        kept.setdefault(place, []).append(None if taken is None else taken.on("cpu"))
        while self.left(batch) < 0:
            first = next(iter(kept))
            self.dropped.add((batch, first))
            del kept[first]

    def left(self, batch: int) -> int:
        """Bytes that are left for a batch."""
        kept = self._kept.get(batch, {}).values()
        return self._room - sum(entry.x.nbytes for uses in kept for entry in uses if entry is not None)

    def taken(self, batch: int, place: Place, device: torch.device) -> list[list[Tensor]] | None:
        """The rows of each use, see :attr:`Taken.rows`, after which they are forgotten; None where they were dropped."""
        uses = self._kept.get(batch, {}).pop(place, [])
        if (batch, place) in self.dropped:
            return None
        return [[] if entry is None else entry.on(device).rows for entry in uses]


@dataclass(frozen=True)
class Planned:
    """What a stage did with a batch."""

    uses: Mapping[Hashable, int]
    choices: list[Tensor]
    products: list[Seen]
    results: Results | None
    """What products gave that come out the same from now on; None where computing them again takes less."""


class Inputs(RepeatedUses):
    """Shows what one layer gets, and leaves the forward at its last use, where that is known: what follows is not needed.

    Args:
        masks: what is pruned.
        place: the layer.
        uses: how often it is used in this forward; None to stay in it.
        batch: tells which tokens are no padding.
        weights: of tokens, likewise; None where each counts for one.
        repeated: what is known of earlier forwards, see :class:`RepeatedUses`.

    Raises:
        StageReached: out of the forward.
    """

    def __init__(
        self, masks: Masks, place: Place, uses: int | None, batch: BatchLayout, weights: Tensor | None = None,
        **repeated: Any,
    ) -> None:  # fmt: skip
        super().__init__(**repeated)
        self._masks, self._place, self._uses, self._batch = masks, place, uses, batch
        self._weights = weights
        self.rows: list[list[Tensor]] = []
        """Of each use, see :attr:`Taken.rows`."""
        self.weights: list[Tensor | None] = []
        """Of each use, see :func:`weights_of_rows`."""
        self.unknown = False
        """Whether there was a use whose inputs cannot be laid out as rows."""

    def _already(self, found: Product) -> Tensor | None:
        """What earlier forwards gave; or the forward ends here, before the product, which nobody needs."""
        result = super()._already(found)
        parts = [] if self.seen is None else self.seen.parts
        if len(self.rows) + 1 == self._uses and [(part.place, part.rows) for part in parts] == [(self._place, None)]:
            self._take(found, parts[0], apart=False)
            raise StageReached
        return result

    def _made(self, call: Call, found: Product, result: Tensor) -> None:
        """Note what the layer's weight is multiplied with."""
        super()._made(call, found, result)
        for part in parts_of(found, call, result, self._masks):
            if part.place == self._place:
                self._take(found, part)
                if len(self.rows) == self._uses:
                    raise StageReached

    def _take(self, found: Product, part: Part, apart: bool = True) -> None:
        taken = taken_of(found, part, self._batch, apart)
        self.unknown = self.unknown or taken is None
        self.rows.append([] if taken is None else taken.rows)
        self.weights.append(self._weights_of(found, part))

    def _weights_of(self, found: Product, part: Part) -> Tensor | None:
        if self._weights is None or part.rows is not None:  # which tokens an expert gets, nobody knows here
            return None
        by_place = isinstance(found.form, Convolution)
        return weights_of_rows(self._weights, found.activation, self._batch.counted, by_place)
