"""A target that sets one answer against others."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lrp_prune.models.batches import entry
from lrp_prune.targets.tokens import last_logits


class LogitDifference:
    r"""Answer's logit minus the distractors' mean logit, at the last attended token or the logits of a classifier.

    Args:
        answers: one token (or class) id for all samples, or one per sample. A string names an entry of the batch.
        distractors: one id or a list of ids for all samples; a tensor ``[samples, ids]`` or an entry of the batch (one per
            sample, or several) for each sample's own.

    Example:
        >>> LogitDifference(answers=5, distractors=[7, 9])
        LogitDifference(answers=5, distractors=[7, 9])
    """

    def __init__(
        self, answers: int | Sequence[Any] | Tensor | str, distractors: int | Sequence[Any] | Tensor | str
    ) -> None:
        self.answers, self.distractors = answers, distractors

    def __repr__(self) -> str:
        return f"LogitDifference(answers={self.answers!r}, distractors={self.distractors!r})"

    def values(self, model: nn.Module, batch: Any) -> Tensor:
        """The explained value of each sample: ``[samples]``."""
        logits = last_logits(model, batch)
        answers = self._ids(self.answers, batch, logits, single=True)
        distractors = self._ids(self.distractors, batch, logits, single=False)
        return logits.gather(1, answers).mean(1) - logits.gather(1, distractors).mean(1)

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        return self.values(model, batch).sum()

    def _ids(self, given: Any, batch: Any, logits: Tensor, single: bool) -> Tensor:
        value = entry(batch, given) if isinstance(given, str) else given
        if value is None:
            raise ValueError(f"the batch has no entry {given!r} to take token ids from")
        ids = torch.as_tensor(value, device=logits.device)
        if ids.dim() == 0:
            ids = ids.expand(len(logits), 1)
        elif ids.dim() == 1:
            per_sample = single or isinstance(given, str)
            ids = ids[:, None] if per_sample else ids.expand(len(logits), -1)
        if len(ids) != len(logits):
            raise ValueError(f"{len(ids)} token ids for {len(logits)} samples: give one id, or one per sample")
        return ids
