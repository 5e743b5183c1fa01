"""A target for models that predict numbers."""

from typing import Any

from torch import Tensor, nn

from lrp_prune.models.outputs import answer_of
from lrp_prune.models.profile import profile_of
from lrp_prune.targets.alignment import aligned, padded, shape_of


class PredictedValues:
    r"""The size of the predicted values, :math:`\sum_i |f_i(x)|`: each with weight 1, whatever its sign.

    For a single output this is the value itself or its negative, whose relevance differs in sign only; of several, or of
    several samples, none cancels another. What is explained is the deviation from zero, so that a model whose values are
    centred is explained relative to the mean (Letzgus et al. 2022, arXiv 2112.11407, on the reference of an explained
    prediction). Values of padded tokens are left out.

    Labels are not needed. Where there are some, their shape must be that of the outputs, or ``[samples]`` for ``[samples, 1]``:
    a loss would otherwise compare each with each.

    Raises:
        ValueError: on a call, for labels of another shape.

    Example:
        >>> import torch
        >>> PredictedValues()(nn.Identity(), torch.tensor([[2.0], [-3.0]]))
        tensor(5.)
    """

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        values, labels = answer_of(model, batch)
        profile = profile_of(model)
        if labels is not None and aligned(values, labels, profile) is None:
            raise ValueError(
                f"target 'regression' needs labels of the outputs' shape, or [samples] for outputs [samples, 1], got outputs "
                f"{shape_of(values)} and labels {shape_of(labels)}"
            )
        padding = padded(model, batch, profile, values)
        return values.abs().sum() if padding is None else values.abs().masked_fill(padding, 0.0).sum()
