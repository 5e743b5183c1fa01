"""How labels lie on a model's outputs."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lrp_prune.models.batches import IGNORED, tensors
from lrp_prune.models.kinds import SEGMENTATION
from lrp_prune.models.padding import attended_labels
from lrp_prune.models.profile import Profile


def classes_last(logits: Tensor, labels: Tensor, profile: Profile, class_dim: int | None = None) -> Tensor | None:
    """The logits with their classes along the last dimension, one row for each label; None if they do not fit the labels.

    Args:
        logits: ``[*labels, classes]`` or ``[samples, classes, *positions]``.
        labels: ``[samples, *positions]``.
        profile: of the model; the logits of a semantic segmentation are enlarged to its labels, as it does itself.
        class_dim: -1 or 1 for one of the two; None for what the shapes say.

    Raises:
        ValueError: if the shapes say both.

    Example:
        >>> from lrp_prune.models import profile_of
        >>> profile = profile_of(nn.Identity())
        >>> tuple(classes_last(torch.zeros(2, 3, 4, 5), torch.zeros(2, 4, 5), profile).shape)
        (2, 4, 5, 3)
    """
    if logits.dim() != labels.dim() + 1 or labels.dim() < 2:
        return None
    segments = profile.kind == SEGMENTATION
    if segments and logits.dim() == 4 and class_dim != -1 and logits.shape[2:] != labels.shape[1:]:
        logits = enlarged(logits, labels)
    last = class_dim != 1 and logits.shape[:-1] == labels.shape
    first = class_dim != -1 and (logits.shape[0], *logits.shape[2:]) == tuple(labels.shape)
    if last and first and class_dim is None:
        if profile.kind is None:
            raise ValueError(
                f"logits {per_sample(logits)} have their classes along dimension 1 or along the last one, labels "
                f"{per_sample(labels)} fit both: pass target=TokenLabel(class_dim=1) or TokenLabel(class_dim=-1)"
            )
        last = not segments
    if last:
        return logits
    return logits.movedim(1, -1) if first else None


def positions_first(logits: Tensor, batch: Any) -> Tensor:
    """Outputs ``[samples, positions, classes]`` of a model for a batch, also where it tells the classes first.

    Positions are what the batch has as many of: labels or tokens ``[samples, positions]``, or else the steps of signals
    ``[samples, steps, features]`` or ``[samples, channels, steps]``. Where it does not tell, or both would do, they come first.

    Example:
        >>> signals = torch.zeros(2, 3, 30)
        >>> tuple(positions_first(torch.zeros(2, 5, 30), signals).shape)
        (2, 30, 5)
    """
    first, second = logits.shape[1:]
    given = [tensor for tensor in tensors(batch) if tensor.dim() in (2, 3) and len(tensor) == len(logits)]
    for tensor in sorted(given, key=lambda tensor: (tensor.dim(), tensor.is_floating_point())):
        lengths = [length for length in tensor.shape[1:] if length > 1]
        if first in lengths or second in lengths:
            return logits if first in lengths else logits.transpose(1, 2)
    return logits


def enlarged(logits: Tensor, labels: Tensor) -> Tensor:
    """Logits ``[samples, classes, height, width]`` at the size of the labels ``[samples, height, width]``, bilinearly."""
    return F.interpolate(logits, size=tuple(labels.shape[1:]), mode="bilinear", align_corners=False)


def without_ignored(labels: Tensor, profile: Profile, ignored: int | None = None) -> Tensor:
    """The labels with :data:`IGNORED` where they are ``ignored``, by default what a semantic segmentation leaves out."""
    if ignored is None and profile.kind == SEGMENTATION:
        ignored = getattr(profile.config, "semantic_loss_ignore_index", None)
    return labels if ignored is None else labels.masked_fill(labels == ignored, IGNORED)


def check_range(labels: Tensor, classes: int, target: str) -> None:
    """Refuse labels that are no classes.

    Raises:
        ValueError: names the label, and how to leave one out.
    """
    wrong = (labels != IGNORED) & ((labels < 0) | (labels >= classes))
    if bool(wrong.any()):
        raise ValueError(
            f"target {target!r} got label {int(labels[wrong][0])}, but the model has {classes} outputs (0 to {classes - 1}): "
            f"labels of {IGNORED} are left out, others by target=TokenLabel(ignored=...)"
        )


def aligned(logits: Tensor, labels: Tensor, profile: Profile) -> Tensor | None:
    """The outputs in the shape of the labels, where each label is about one output; None if they do not fit.

    Shapes are equal, or differ by a last dimension of one; of a segmentation with one class also by its size.
    """
    if logits.shape == labels.shape:
        return logits
    if logits.dim() == labels.dim() + 1 and logits.shape[:-1] == labels.shape and logits.shape[-1] == 1:
        return logits.squeeze(-1)
    if labels.dim() == logits.dim() + 1 and labels.shape[:-1] == logits.shape and labels.shape[-1] == 1:
        return logits.unsqueeze(-1)
    if profile.kind == SEGMENTATION and logits.dim() == 4 and logits.shape[1] == 1 and labels.dim() == 3:
        return enlarged(logits, labels).squeeze(1)
    return None


def padded(model: nn.Module, batch: Any, profile: Profile, values: Tensor) -> Tensor | None:
    """Which of the values, one or several a token, are about padding, in a shape that broadcasts to theirs; None for none."""
    attended = attended_labels(model, batch)
    classifies = profile.kind is None or "class" in profile.kind.targets
    if attended is None or values.shape[:2] != attended.shape or (values.dim() == 2 and classifies):
        return None
    return ~attended.view(*attended.shape, *[1] * (values.dim() - 2)).to(values.device)


def per_sample(tensor: Tensor) -> str:
    """A tensor's shape for any number of samples.

    Example:
        >>> per_sample(torch.zeros(4, 3))
        '[samples, 3]'
    """
    return f"[{', '.join(['samples', *map(str, tensor.shape[1:])])}]"


def shape_of(tensor: Any) -> str:
    """A tensor's shape and type in words, ``none`` if there is none."""
    return f"{tuple(tensor.shape)} of {tensor.dtype}" if isinstance(tensor, torch.Tensor) else "none"
