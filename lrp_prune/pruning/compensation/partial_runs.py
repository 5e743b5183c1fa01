"""Running a model on one batch as far as it is needed: up to a stage's end, or its beginning."""

from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from lrp_prune.engine.batch_layout import BatchLayout
from lrp_prune.engine.uses import WeightUses
from lrp_prune.models.batches import to_device
from lrp_prune.models.padding import counted_tokens
from lrp_prune.pruning.choices import Choices
from lrp_prune.pruning.compensation.stages import Given, Leaving, StageReached, leaving_after
from lrp_prune.pruning.masks import Masks
from lrp_prune.pruning.pairs import PlacedUses
from lrp_prune.pruning.passes import outputs_of, tensors_in


class PartialRuns:
    """Runs of a model on reference batches, each as far as it is needed.

    Args:
        module: the model.
        masks: what is pruned.
        batches: on any device.
        target: what is explained; a function of model and batch is run in the model's place.
        device: where the model is.
    """

    def __init__(
        self, module: nn.Module, masks: Masks, batches: list[Any], target: Any, device: torch.device
    ) -> None:  # fmt: skip
        self.module, self.masks, self.batches, self.target, self.device = module, masks, batches, target, device
        self._layout = BatchLayout()

    def outputs(self, batch: Any, uses: WeightUses, choices: Choices) -> list[Tensor]:
        """What the model gives."""
        return outputs_of(self.module, to_device(batch, self.device), uses, self.target, choices)

    def outputs_after(self, stage: nn.Module, batch: Any) -> list[Tensor]:
        """What a stage gives: what comes behind it is not looked at."""
        found: list[Tensor] = []
        with leaving_after(stage, lambda output: found.extend(tensors_in(output))), suppress(StageReached):
            self.outputs(batch, PlacedUses(self.masks), Choices())
        return found

    def run(
        self, index: int, stage: nn.Module, known: Given, uses: WeightUses | None = None, choices: Choices | None = None,
        leaving: Leaving = leaving_after,
    ) -> Any:  # fmt: skip
        """Run a batch until the stage is done, and return what that gives, or before it what it is given, to be kept."""
        kept: list[Any] = []
        uses = PlacedUses(self.masks) if uses is None else uses
        torch.clear_autocast_cache()  # which may have weights as they were
        with (
            known.standing_in(index),
            leaving(stage, lambda output: kept.append(known.taken(output))),
            suppress(StageReached),
        ):
            self.outputs(self.batches[index], uses, Choices() if choices is None else choices)
        return kept[0] if kept else None

    def layout(self, index: int) -> BatchLayout:
        """Tells which tokens of a batch are no padding, until it is asked for another."""
        self._layout.counted = counted_tokens(self.module, to_device(self.batches[index], self.device), 0)
        return self._layout
