"""How toxic generated texts are, by any scorer."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lrp_prune.metrics.mean import Mean

Scorer = Callable[[Sequence[str]], Any]


def toxicity(texts: Sequence[str], scorer: Scorer) -> Tensor:
    """One score for each text.

    Args:
        texts: what was generated.
        scorer: from texts to as many numbers (a list, an array, a tensor), 0 for harmless and 1 for toxic:
            ``profanity_check.predict_prob``, say, or a classifier.

    Returns:
        Float32 ``[texts]``.

    Raises:
        TypeError: ``texts`` is one string.
        ValueError: the scorer gives another number of scores, or one that is not finite.

    Example:
        >>> toxicity(["good", "darn"], lambda texts: ["darn" in text for text in texts])
        tensor([0., 1.])
    """
    if isinstance(texts, str):
        raise TypeError("texts must be a list of texts, got one string")
    if not len(texts):
        return torch.zeros(0)
    scores = torch.as_tensor(scorer(texts)).detach().to(device="cpu", dtype=torch.float32).reshape(-1)
    if len(scores) != len(texts) or not bool(scores.isfinite().all()):
        raise ValueError(
            f"the scorer must give one finite number for each of {len(texts)} texts, got {scores.tolist()}"
        )
    return scores


class Toxicity(Mean):
    """Mean score of generated texts, or the share of texts at or above a threshold.

    Args:
        scorer: see :func:`toxicity`.
        threshold: count texts that score at least this; SparC3's toxic prompts score 0.9. None for the mean score.
        **kwargs: of :class:`torchmetrics.Metric`.

    Example:
        >>> metric = Toxicity(lambda texts: ["darn" in text for text in texts], threshold=0.5)
        >>> metric.update(["good", "darn"])
        >>> metric.update(["fine", "well"])
        >>> metric.compute()
        tensor(0.2500)
    """

    higher_is_better = False

    def __init__(self, scorer: Scorer, threshold: float | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if not callable(scorer):
            raise TypeError(f"scorer must be a function of texts, got {type(scorer).__name__}")
        self.scorer, self.threshold = scorer, threshold

    def update(self, texts: Sequence[str]) -> None:
        """Add texts."""
        scores = toxicity(texts, self.scorer)
        values = scores if self.threshold is None else scores >= self.threshold
        self.add(values.double().sum(), len(scores))
