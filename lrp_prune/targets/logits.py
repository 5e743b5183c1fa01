"""The logit of one answer for each sample."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lrp_prune.models.batches import entry
from lrp_prune.models.outputs import logits_for
from lrp_prune.models.profile import profile_of
from lrp_prune.targets.tokens import answers_by_token, last_logits, places_answered


class Logit:
    r"""The logit of an answer at each sample's last attended token, or of a classifier: :math:`\sum z_T(a)`.

    Of a model that tells a class for each pixel it is the class's mean over all pixels.

    Args:
        answers: one token (or class) id for all samples, or one per sample. A string names an entry of the batch.

    Raises:
        ValueError: for what is no integer; on a call, for another number of answers than samples, or one that is no class.

    Example:
        >>> Logit(1)(nn.Identity(), torch.tensor([[1.0, 3.0], [2.0, 0.0]]))
        tensor(3.)
        >>> Logit([1, 0]).values(nn.Identity(), torch.tensor([[1.0, 3.0], [2.0, 0.0]]))
        tensor([3., 2.])
    """

    def __init__(self, answers: int | Sequence[int] | Tensor | str) -> None:
        if not isinstance(answers, str):
            kind = torch.as_tensor(answers).dtype
            if kind == torch.bool or kind.is_floating_point or kind.is_complex:
                raise ValueError(f"answers must be ids of classes or tokens, integers, got {answers!r}")
        self.answers = answers

    def __repr__(self) -> str:
        given = self.answers.tolist() if isinstance(self.answers, Tensor) else self.answers
        return f"Logit({given!r})"

    def values(self, model: nn.Module, batch: Any) -> Tensor:
        """The explained value of each sample: ``[samples]``."""
        logits = last_logits(model, batch)
        given = entry(batch, self.answers) if isinstance(self.answers, str) else self.answers
        if given is None:
            raise ValueError(f"the batch has no entry {self.answers!r} to take answers from")
        ids = torch.as_tensor(given, device=logits.device).long().reshape(-1)
        if len(ids) not in (1, len(logits)):
            raise ValueError(f"{len(ids)} answers for {len(logits)} samples: give one, or one per sample")
        wrong = ids[(ids < 0) | (ids >= logits.shape[-1])]
        if len(wrong):
            raise ValueError(f"answer {int(wrong[0])} is none of the model's {logits.shape[-1]} classes or tokens")
        return logits.gather(1, ids.expand(len(logits))[:, None])[:, 0]

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        return self.values(model, batch).sum()


def predicted(model: nn.Module, batch: Any) -> Logit:
    """The logit of what the model says now, whatever it says when its input is changed.

    Raises:
        ValueError: if the model says something at several places, and neither its kind nor the batch tells which is meant.

    Example:
        >>> predicted(nn.Identity(), torch.tensor([[1.0, 3.0], [2.0, 0.0]]))
        Logit([1, 0])
    """
    with torch.no_grad():
        found = Logit(last_logits(model, batch).argmax(-1))
        _check_place(model, batch)
    return found


def _check_place(model: nn.Module, batch: Any) -> None:
    profile = profile_of(model)
    if profile.kind is None or (profile.kind.targets and not answers_by_token(profile)):
        return
    if places_answered(model, batch) is not None or logits_for(model, batch).dim() < 3:
        return
    asked = "give labels [samples, tokens], -100 where it is not asked, or " if answers_by_token(profile) else ""
    raise ValueError(
        f"{profile.name}, a {profile.kind.task}, says something at each of several places, and nothing tells which is to be "
        f"explained: {asked}pass target=, a function of model and batch that returns the value"
    )


def explaining(target: Any) -> Any:
    """What explanations take for a target besides a target: ids of answers; None and ``"last_token"`` are what is predicted.

    Returns:
        None for what the model predicts, which is known once it has run; else the target.

    Example:
        >>> explaining(3), explaining([3, 5]), explaining("last_token")
        (Logit(3), Logit([3, 5]), None)
    """
    if target is None or target == "last_token":
        return None
    answers = isinstance(target, int | Tensor) or (
        isinstance(target, list | tuple) and all(isinstance(answer, int) for answer in target)
    )
    return Logit(target) if answers else target


def values_of(target: Any, model: nn.Module, batch: Any) -> Tensor:
    """The explained value of each sample ``[samples]`` where the target knows them, else that of the batch ``[1]``."""
    found: Tensor = target.values(model, batch) if hasattr(target, "values") else target(model, batch).reshape(1)
    return found
