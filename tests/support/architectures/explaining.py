"""One scalar that a model's output says about a batch."""

from typing import Any

import torch
from torch import Tensor, nn

from lrp_prune.models import run
from lrp_prune.models.outputs import logits_in

_LOGITS = ("logits", "start_logits", "end_logits", "class_queries_logits", "masks_queries_logits", "prediction_logits")


def explained(model: nn.Module, batch: Any) -> Tensor:
    """The largest logit of each sample, of the last token where there are tokens, or the mean over places; summed up."""
    return sum((_largest(logits) for logits in logits_of(model, batch)), torch.zeros((), dtype=torch.float64))


def logits_of(model: nn.Module, batch: Any) -> list[Tensor]:
    """What a model puts out, without boxes and losses."""
    output = run(model, batch)
    named = [getattr(output, name) for name in _LOGITS if isinstance(getattr(output, name, None), Tensor)]
    if not named:
        found = logits_in(output)
        if found is None:
            raise ValueError(f"no logits in {type(output).__name__} with {', '.join(dict(output))}")
        named = [found]
    return named


def _largest(logits: Tensor) -> Tensor:
    if logits.dim() == 2:
        return logits.amax(-1).sum()
    if logits.dim() == 3:
        return logits[:, -1].amax(-1).sum()
    return logits.amax(1).flatten(1).mean(1).sum()
