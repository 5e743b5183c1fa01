r"""What gates are trained to keep.

============  ===============================================================================================
``kl``        :math:`\mathrm{KL}(p_\mathrm{full} \| p_\mathrm{gated})` over the vocabulary (arXiv 2512.10903): all that
              the model does at the answer's position
``answers``   :math:`-\log \big( \sum_{a} e^{z_a} / \sum_{a, d} e^{z} \big)` over answers ``a`` and distractors ``d``: only
              that it tells the ones from the others
============  ===============================================================================================
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from lrp_prune.tasks.metrics import IGNORED, kl_divergence
from lrp_prune.tasks.task import Batch

OBJECTIVES: tuple[str, ...] = ("kl", "answers")


def objective_weights(objective: str | Mapping[str, float]) -> dict[str, float]:
    """The weight of each term, from one name or a mapping.

    Raises:
        ValueError: for an unknown objective, a negative weight, or no positive one.

    Example:
        >>> objective_weights("kl"), objective_weights({"kl": 0.2, "answers": 1})
        ({'kl': 1.0}, {'kl': 0.2, 'answers': 1.0})
    """
    weights = {objective: 1.0} if isinstance(objective, str) else {name: float(w) for name, w in objective.items()}
    for name, weight in weights.items():
        if name not in OBJECTIVES:
            raise ValueError(f"objective must be of {OBJECTIVES}, got {name!r}")
        if not weight >= 0:
            raise ValueError(f"objective {name!r} must have a weight of 0 or more, got {weight}")
    if not any(weights.values()):
        raise ValueError(f"objective needs a positive weight of one of {OBJECTIVES}, got {objective!r}")
    return weights


def objective_value(name: str, logits: Tensor, batch: Batch, full_logits: Tensor) -> Tensor:
    """One objective, the mean over samples.

    Args:
        name: one of :data:`OBJECTIVES`.
        logits: of the gated model, ``[samples, vocabulary]``.
        batch: with ``answers`` and ``distractors``, ``[samples, any]``.
        full_logits: of the model as it is, ``[samples, vocabulary]``.

    Example:
        >>> batch = {"answers": torch.tensor([[0]]), "distractors": torch.tensor([[1, -1]])}
        >>> objective_value("answers", torch.zeros(1, 3), batch, torch.zeros(1, 3))  # log 2
        tensor(0.6931)
    """
    if name == "kl":
        return kl_divergence(full_logits, logits).mean()
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    answers, distractors = (_log_sum(wide, batch[key].to(wide.device)) for key in ("answers", "distractors"))
    return (torch.logaddexp(answers, distractors) - answers).mean()


def _log_sum(logits: Tensor, ids: Tensor) -> Tensor:
    return logits.gather(1, ids.clamp(min=0)).masked_fill(ids == IGNORED, -torch.inf).logsumexp(1)
