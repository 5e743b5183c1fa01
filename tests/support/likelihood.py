"""How likely labels are, as targets have it, written with torch's own functions."""

import torch
from torch import Tensor


def how_likely(logits: Tensor, labels: Tensor, ignored: int = -100) -> Tensor:
    """Log-probabilities of labels with a quarter of log-odds, summed, with classes in the last dimension."""
    counted = labels != ignored
    scores, chosen = logits[counted], labels[counted][:, None]
    others = scores.scatter(-1, chosen, -torch.inf).logsumexp(-1)
    margin = scores.gather(-1, chosen)[:, 0] - others
    value: Tensor = (margin + 3 * margin.sigmoid().log()).sum() / 4
    return value


def how_likely_in_channels(logits: Tensor, labels: Tensor) -> Tensor:
    """The same with classes in the second dimension."""
    return how_likely(torch.movedim(logits, 1, -1), labels)
