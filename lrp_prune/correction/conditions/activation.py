"""A condition on an activation: it holds where a hidden state lies far enough along a direction."""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from lrp_prune.correction.conditions.condition import Condition, first_tensor
from lrp_prune.correction.conditions.discriminant import discriminant, strictest
from lrp_prune.correction.conditions.states import states_before

UNDESIRED = "undesired"
"""What the set that a condition is to hold in is called."""


class ActivationAbove(Condition):
    r"""Holds at tokens (or samples) whose hidden state has :math:`\langle h, d \rangle > \theta`.

    Args:
        at: canonical name of a module whose output is ``[samples, tokens, width]`` or ``[samples, width]``; the first of several
            outputs counts.
        threshold: :math:`\theta`.
        direction: :math:`d`, ``[width]``; products are taken in float32.
        shares: what is known of it: the share of the places of each set at which it holds.

    Raises:
        ValueError: for a direction that is no vector of finite numbers; on a call, for an output of another width.

    Example:
        >>> import torch
        >>> condition = ActivationAbove("layers.3", 0.5, torch.tensor([1.0, 0.0]))
        >>> condition.holds((), torch.tensor([[[1.0, 9.0], [0.0, 9.0]]]))
        tensor([[ True, False]])
    """

    name = "activation above"

    def __init__(self, at: str, threshold: float, direction: Tensor, shares: Mapping[str, float] | None = None) -> None:
        if direction.dim() != 1 or not direction.is_floating_point() or not bool(direction.isfinite().all()):
            raise ValueError(
                f"direction must be a vector of finite numbers [width], got shape {tuple(direction.shape)}"
            )
        self.at, self.threshold = at, float(threshold)
        self.direction = direction.detach().float().cpu()
        self.shares = dict(shares or {})

    @classmethod
    def learned(
        cls,
        model: nn.Module,
        at: str,
        undesired: Iterable[Mapping[str, Any]],
        general: Mapping[str, Iterable[Mapping[str, Any]]],
        allowed: Mapping[str, float] | float = 0.02,
        shrinkage: float = 0.1,
    ) -> "ActivationAbove":
        r"""Learn where a causal language model is about to misbehave, and hardly ever otherwise.

        The hidden states from which labelled tokens are predicted are taken. The direction is Fisher's,
        :math:`((1 - \lambda) \Sigma + \lambda\,\bar\sigma I)^{-1} (\mu_u - \mu_g)` with the covariance :math:`\Sigma` within
        sets, its mean variance :math:`\bar\sigma` and the mean :math:`\mu_g` of the general sets' means: each counts alike. The
        threshold is the lowest at which the condition holds in no general set at more of the places than is ``allowed``.

        Args:
            model: the model, wrapped or not; it comes out as it went in.
            at: canonical name of the module that is looked at.
            undesired: batches with ``labels`` for tokens that should not be said, -100 elsewhere.
            general: batches of each set, by name, with ``labels`` where the condition is not to hold: right repetitions, say.
            allowed: a share in [0, 1) for each set, or shares by name or pattern: ``{"*": 0.02, "copying": 0.0}``.
            shrinkage: :math:`\lambda`, in (0, 1].

        Raises:
            KeyError: if the model has no such module.
            ValueError: for an argument out of range, or a set that has nothing labelled.

        Returns:
            The condition, whose :attr:`shares` say at how many places of each set it holds, those of ``"undesired"`` too.
        """
        sets = {name: states_before(model, at, batches, name) for name, batches in general.items()}
        return cls.between(at, states_before(model, at, undesired, UNDESIRED), sets, allowed, shrinkage)

    @classmethod
    def between(
        cls,
        at: str,
        undesired: Tensor,
        general: Mapping[str, Tensor],
        allowed: Mapping[str, float] | float = 0.02,
        shrinkage: float = 0.1,
    ) -> "ActivationAbove":
        """The same of hidden states that were taken before.

        Args:
            at: canonical name of the module that they are from.
            undesired: ``[places, width]``.
            general: likewise, by the name of the set.
            allowed: see :meth:`learned`.
            shrinkage: see :meth:`learned`.
        """
        direction = discriminant(undesired, list(general.values()), shrinkage)
        threshold = strictest({name: states @ direction for name, states in general.items()}, allowed)
        found = {UNDESIRED: undesired, **general}
        shares = {name: float((states @ direction > threshold).double().mean()) for name, states in found.items()}
        return cls(at, threshold, direction, shares)

    def holds(self, inputs: tuple[Any, ...], output: Any) -> Tensor:
        """Where the first output lies above the threshold, in the shape of its leading dimensions."""
        hidden = first_tensor(output)
        if hidden.shape[-1] != len(self.direction):
            raise ValueError(
                f"the condition at {self.at!r} is on states of {len(self.direction)} numbers, got shape {tuple(hidden.shape)}: "
                "it was made for another model"
            )
        return hidden.detach().float() @ self.direction.to(hidden.device) > self.threshold

    def options(self) -> dict[str, Any]:
        """The module, the threshold and what is known of it."""
        return {"at": self.at, "threshold": self.threshold, "shares": self.shares}

    def tensors(self) -> dict[str, Tensor]:
        """The direction."""
        return {"direction": self.direction}
