"""One stage of a model as a LightningModule: inputs in, dense outputs as what it learns."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from lrp_prune.models.returned import tensors_within
from lrp_prune.training.keeping import MaskKeeper

MakeOptimizer = Callable[[Iterable[nn.Parameter]], Optimizer]


class StageTraining(LightningModule):
    r"""Trains a stage to give what it gave: :math:`\min \lVert f(x') - y \rVert^2 / \lVert y - \bar y \rVert^2` under the masks.

    Its learning rates go down to zero linearly, by steps.

    Args:
        stage: the part of the model.
        model: all of it, which names are relative to.
        masks: of the stage's weights.
        trained: its parameters that are trained.
        make_optimizer: makes the optimizer.
    """

    def __init__(
        self, stage: nn.Module, model: nn.Module, masks: Mapping[str, Tensor], trained: Sequence[nn.Parameter],
        make_optimizer: MakeOptimizer,
    ) -> None:  # fmt: skip
        super().__init__()
        self.stage = stage
        self._whole = (model,)  # in a tuple, since the rest of the model is no part of this module
        self._masks, self._trained, self._make_optimizer = masks, trained, make_optimizer
        self._keeper: MaskKeeper | None = None

    @override
    def on_train_start(self) -> None:
        self._keeper = MaskKeeper(self._whole[0], self._masks, self.trainer.optimizers)

    def release(self) -> None:
        """Take off every hook."""
        if self._keeper is not None:
            self._keeper.remove()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """The error of one batch."""
        return self.error(batch)

    def error(self, batch: Any) -> Tensor:
        """Squared error as a share of the variance of what the dense stage gave, the mean over its outputs.

        Args:
            batch: arguments by position, by name, the dense outputs, and which tokens are no padding; None for all.
        """
        args, kwargs, expected, counted = batch
        found = [entry for entry in tensors_within(self.stage(*args, **kwargs)) if _counts(entry)]
        errors = []
        for output, target in zip(found, expected, strict=True):
            if counted is not None and target.dim() > 2 and target.shape[:2] == counted.shape:
                output, target = output[counted], target[counted]
            spread = (target.float() - target.float().mean()).square().mean().clamp(min=1e-12)
            errors.append((output.float() - target.float()).square().mean() / spread)
        return torch.stack(errors).mean()

    def configure_optimizers(self) -> Any:
        """The optimizer, and a schedule to zero."""
        steps = max(int(self.trainer.estimated_stepping_batches), 1)
        optimizer = self._make_optimizer(self._trained)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: max(1 - step / steps, 0.0))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def expected_of(outputs: Any) -> list[Tensor]:
    """Of what a dense stage gave what it is to give again."""
    return [entry for entry in tensors_within(outputs) if _counts(entry)]


def by_size(parameters: Iterable[nn.Parameter], rate: float) -> Optimizer:
    """AdamW that moves each tensor by so much of its root mean square in a step, and 0.001 of one where it is zero."""
    groups = []
    for parameter in parameters:
        kept = parameter.detach()[parameter.detach() != 0].float()
        size = float(kept.square().mean().sqrt()) if kept.numel() else 0.0
        groups.append({"params": [parameter], "lr": rate * (size or 0.001)})
    return torch.optim.AdamW(groups, weight_decay=0.0)


def _counts(entry: Tensor) -> bool:
    return entry.is_floating_point() and entry.dim() > 0
