"""How far a model's outputs are from a teacher's, as something to train on."""

import torch.nn.functional as F
from torch import Tensor


def soft_divergence(student: Tensor, teacher: Tensor, temperature: float, counted: Tensor | None = None) -> Tensor:
    r"""Divergence of two models' softened choices, in nats, times the square of the temperature.

    .. math:: T^2 \, \frac{1}{N} \sum_n \mathrm{KL}\bigl(\mathrm{softmax}(t_n / T) \,\|\, \mathrm{softmax}(s_n / T)\bigr)

    over the :math:`N` choices that the outputs hold (samples, tokens, pixels), with :math:`s` the student's logits and :math:`t`
    the teacher's; the factor keeps the gradient's size where the temperature changes (Hinton et al., arXiv 1503.02531).
    Computed in float32.

    Args:
        student: logits ``[..., classes]``, of images ``[samples, classes, height, width]``.
        teacher: of the same shape.
        temperature: above 0; larger values show more of what the teacher takes for second best.
        counted: ``[samples, tokens]``, True for tokens that count; None for all.

    Raises:
        ValueError: the shapes differ, or there is nothing to choose from.

    Example:
        >>> import torch
        >>> soft_divergence(torch.tensor([[1.0, -1.0]]), torch.zeros(1, 2), temperature=1.0)
        tensor(0.4338)
    """
    along = 1 if student.dim() > 3 else -1
    if student.shape != teacher.shape:
        raise ValueError(f"the student gives {tuple(student.shape)}, the teacher {tuple(teacher.shape)}")
    if student.dim() < 2 or student.shape[along] < 2:
        raise ValueError(
            f"outputs of shape {tuple(student.shape)} have no classes to choose from: match='values' compares them as numbers"
        )
    student, teacher = _those(student, counted), _those(teacher, counted)
    soft = (student.float() / temperature).log_softmax(along)
    softer = (teacher.float() / temperature).log_softmax(along)
    choices = max(student.numel() // student.shape[along], 1)
    return F.kl_div(soft, softer, reduction="sum", log_target=True) * (temperature**2 / choices)


def squared_distance(student: Tensor, teacher: Tensor, counted: Tensor | None = None) -> Tensor:
    """Mean squared difference of two models' outputs, in float32; arguments as in :func:`soft_divergence`.

    Example:
        >>> import torch
        >>> squared_distance(torch.tensor([[1.0], [2.0]]), torch.tensor([[1.0], [4.0]]))
        tensor(2.)
    """
    if student.shape != teacher.shape:
        raise ValueError(f"the student gives {tuple(student.shape)}, the teacher {tuple(teacher.shape)}")
    return F.mse_loss(_those(student, counted).float(), _those(teacher, counted).float())


def _those(outputs: Tensor, counted: Tensor | None) -> Tensor:
    return outputs if counted is None or outputs.shape[:2] != counted.shape else outputs[counted]
