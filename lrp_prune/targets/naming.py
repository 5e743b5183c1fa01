"""Targets by name, in words, and for which models they are."""

from collections.abc import Callable
from typing import Any, Protocol, cast, runtime_checkable

from torch import Tensor, nn

from lrp_prune.models.profile import profile_of
from lrp_prune.targets.classes import ClassLabel, MultiLabel
from lrp_prune.targets.spans import AnswerSpan
from lrp_prune.targets.tokens import LastToken, NextToken, TokenLabel
from lrp_prune.targets.values import PredictedValues


@runtime_checkable
class Target(Protocol):
    """Runs the model on a batch and returns the explained value, summed over the batch's samples."""

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        """A scalar tensor."""


TARGETS: dict[str, Callable[[], Target]] = {
    "next_token": NextToken,
    "token": TokenLabel,
    "last_token": LastToken,
    "class": ClassLabel,
    "multi_label": MultiLabel,
    "regression": PredictedValues,
    "span": AnswerSpan,
}
"""The targets that have a name."""

_WORDS = {
    "next_token": "how likely tokens are given those before: labels shifted by one, or an encoder-decoder's as they are",
    "token": "how likely labels are, one a token (or pixel), not shifted",
    "last_token": "the largest logit at each sample's last token",
    "class": "the logit of each sample's class",
    "multi_label": "the logits of labels that are set, minus those of labels that are not",
    "regression": "the size of the predicted values",
    "span": "the logits of each answer's first and last token",
    "": "nothing (the method looks at no output)",
}


def in_words(description: str) -> str:
    """What a :attr:`~lrp_prune.Relevance.target` stands for; of a function of one's own its name.

    Example:
        >>> in_words("token")
        'how likely labels are, one a token (or pixel), not shifted'
    """
    return _WORDS.get(description, description)


def named(description: str) -> str | None:
    """The name of the target that is described, whatever its options; None if it has none.

    Example:
        >>> named("class"), named("ClassLabel(odds=1)"), named("my_own_target")
        ('class', 'class', None)
    """
    kinds = {kind.__name__: name for name, kind in TARGETS.items()}
    return description if description in TARGETS else kinds.get(description.partition("(")[0])


def describe(target: Any) -> str:
    """A target's name, by which relevance of the same target is recognised."""
    named = next((name for name, kind in TARGETS.items() if type(target) is kind), None)
    plain = named is not None and vars(target) == vars(TARGETS[named]())
    return (named if plain else None) or getattr(target, "__qualname__", None) or repr(target)


def target_called(name: str) -> Target:
    """The target of that name.

    Raises:
        ValueError: if there is none.
    """
    if name not in TARGETS:
        raise ValueError(
            f"target must be one of {tuple(TARGETS)}, a Target or a function of model and batch, got {name!r}"
        )
    return TARGETS[name]()


def checked(target: Any) -> Target:
    """A target that was given by its name, or as it is.

    Raises:
        ValueError: for an unknown name, or what cannot be called.
    """
    if isinstance(target, str):
        return target_called(target)
    if not callable(target):
        raise ValueError(f"target must be a name or a function target(model, batch) -> scalar tensor, got {target!r}")
    return cast(Target, target)


def check_suits(target: Any, model: nn.Module) -> None:
    """Refuse a target that is for other models, as far as it is known what the model was made for.

    Raises:
        ValueError: names the target to pass.
    """
    profile = profile_of(model)
    name = next((name for name, kind in TARGETS.items() if type(target) is kind), None)
    if name is None or profile.kind is None or not profile.kind.targets or not profile.decides_alone:
        return
    if name not in profile.kind.targets:
        usual = profile.kind.targets[0]
        raise ValueError(
            f"target {name!r} explains {in_words(name)}, and {profile.known_as}: pass target={usual!r} ({in_words(usual)}), or "
            "leave it out"
        )
