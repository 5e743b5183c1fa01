"""What is done to the weights that masks keep: nothing, recalibration of channels, or compensation weight by weight."""

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from torch import nn

from lrp_prune.distributed.sharding import mesh_of
from lrp_prune.models.subject import subject_of
from lrp_prune.progress import number_of
from lrp_prune.pruning.compensation import Compensation, compensate_, compensation_of
from lrp_prune.pruning.masks import Masks
from lrp_prune.pruning.recalibration import IncomparableError, Recalibration, enough
from lrp_prune.pruning.recalibration import recalibrate as measure
from lrp_prune.pruning.restoring import remembered
from lrp_prune.pruning.zeroed import values_under

_logger = logging.getLogger("lrp_prune")
_NO_BATCHES = "{} needs batches: pass some, or {}"

Undo = list[Callable[[], None]]
"""Where it is noted what puts values back, before they change."""


class Adjusting:
    """How what is kept is adjusted, as it was asked for.

    Args:
        recalibrate: True, False, or None for wherever there are batches and nothing else is done.
        compensation: how kept weights are updated; None: they are not.
        reference: the reference samples.

    Raises:
        ValueError: something is asked for that is none of these, that takes batches where there are none, or both are.
    """

    def __init__(self, recalibrate: bool | None, compensation: str | Compensation | None, reference: Any) -> None:
        self._compensation = compensation_of(compensation)
        empty = number_of(reference) == 0
        self._recalibrating = recalibrates(recalibrate, reference)
        self._asked = recalibrate is True
        self._told: list[str] = []
        check_alone(self._compensation, self._asked)
        if self._compensation is not None:
            if empty:
                raise ValueError(_NO_BATCHES.format("compensation", "compensation=None"))
            self._recalibrating = False

    @property
    def active(self) -> bool:
        """Whether kept weights change."""
        return self._recalibrating or self._compensation is not None

    def again(self, reference: Iterable[Any]) -> Iterable[Any]:
        """Reference samples that can be gone through once more, as far as they are looked at."""
        if not self.active or not isinstance(reference, Iterator):
            return reference
        return _Remembering(reference) if self._compensation is None else list(reference)

    def apply_(
        self, model: nn.Module, masks: Masks, reference: Iterable[Any], compared: Any, undo: Undo | None, progress: bool
    ) -> str | None:
        """Zero what is pruned and adjust what is kept; what was done, in words, if anything.

        Args:
            model: dense.
            masks: what is pruned.
            reference: samples.
            compared: what is explained.
            undo: where it is noted what puts values back; None if all of the model is kept already.
            progress: show a progress bar.
        """
        if self._compensation is not None:

            def changing(parameters: Sequence[nn.Parameter]) -> None:
                if undo is not None:
                    undo.append(remembered(model, parameters))

            done = compensate_(model, masks, reference, self._compensation, compared, progress, changing)
            for remark in done.remarks:
                if remark not in self._told:
                    _logger.warning(remark)
            self._told = done.remarks
            return str(done)
        found = self._measured(model, masks, reference, compared, progress) if self._recalibrating else None
        self._recalibrating = found is not None
        _apply(model, masks, found, undo)
        return None if found is None else str(found)

    def _measured(
        self, model: nn.Module, masks: Masks, reference: Iterable[Any], compared: Any, progress: bool
    ) -> Recalibration | None:
        """The recalibration; None where there is nothing to compare, and it was not asked for."""
        batches = enough(reference)
        if not batches and mesh_of(model) is None:  # of several processes one may have some
            if self._asked:
                raise ValueError(_NO_BATCHES.format("recalibrate=True", "recalibrate=False"))
            return None
        try:
            return measure(model, masks, batches, compared, progress=progress)
        except IncomparableError as error:
            if self._asked:
                raise
            _logger.warning("not recalibrated: %s", error)
            return None


def check_alone(compensation: Compensation | None, recalibrate: bool) -> None:
    """Refuse a compensation where recalibration is asked for as well.

    Raises:
        ValueError: and says why.
    """
    if compensation is not None and recalibrate:
        raise ValueError(
            "recalibrate=True and a compensation: the least squares of all kept weights have scale and offset of each channel in "
            "them, so leave recalibrate as it is"
        )


def recalibrates(asked: bool | None, reference: Any) -> bool:
    """Whether to recalibrate, which takes batches.

    Raises:
        ValueError: if it is asked for and cannot be.
    """
    if asked not in (None, True, False) or isinstance(asked, int) != isinstance(asked, bool):
        raise ValueError(f"recalibrate must be True, False, or None for wherever there are batches, got {asked!r}")
    if asked and number_of(reference) == 0:
        raise ValueError(_NO_BATCHES.format("recalibrate=True", "recalibrate=False"))
    return asked is not False and number_of(reference) != 0


def _apply(model: nn.Module, masks: Masks, found: Recalibration | None, undo: Undo | None) -> None:
    """Zero what is pruned and scale what is kept; before anything changes it is noted what puts it back."""
    if undo is not None:
        undo.append(values_under(model, masks))
    masks.apply_(model)
    if found is not None:
        module = subject_of(model).module
        if undo is not None:
            undo.append(remembered(module, found.changed(module)))
        found.apply_(module)


class _Remembering:
    """Batches that can be gone through once, of which those are kept that recalibration looks at."""

    def __init__(self, batches: Iterator[Any]) -> None:
        self._batches = batches
        self.kept: list[Any] | None = None

    def __iter__(self) -> Iterator[Any]:
        if self.kept is None:
            self.kept = enough(self._batches)
            yield from self.kept
            yield from self._batches
        else:
            yield from self.kept
