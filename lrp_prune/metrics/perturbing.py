"""Replacing parts of what a model is given: embeddings of tokens, patches of images, features and time steps."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from lrp_prune.attribution.inputs import names_of_lookups
from lrp_prune.models.profile import parameters_of

BASELINES = ("zero", "mean", "blur")
_BLUR = 4
"""An image is blurred over a quarter of its height and width."""


class Replacing(TorchFunctionMode):
    """Replaces positions where token ids are looked up, and notes which arguments were.

    Args:
        given: what the forward is given, by name.
        masks: argument -> positions that are replaced, bool ``[samples, positions]``.
        baseline: what with.
        counted: argument -> positions that a mean is of; None for all.
    """

    def __init__(
        self,
        given: Mapping[str, Tensor],
        masks: Mapping[str, Tensor],
        baseline: str | float,
        counted: Mapping[str, Tensor],
    ) -> None:
        super().__init__()
        self.given, self.masks, self.baseline, self.counted = given, masks, baseline, counted
        self._lookups: list[Tensor | None] = []
        self.looked_up: dict[str, None] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func not in (F.embedding, torch.embedding):
            return result
        place = 0 if func is F.embedding else 1
        ids = args[place] if len(args) > place else (kwargs or {})["input" if place == 0 else "indices"]
        self._lookups.append(ids)
        name = names_of_lookups(self._lookups, self.given)[-1]
        if name is None:
            return result
        self.looked_up[name] = None
        mask = self.masks.get(name)
        return result if mask is None else replaced(result, mask, self.baseline, self.counted.get(name))


def replaced(
    values: Tensor, mask: Tensor, baseline: str | float, counted: Tensor | None = None, patch: int = 1
) -> Tensor:
    """Values with a baseline at some positions.

    Args:
        values: ``[samples, channels, height, width]``, ``[samples, positions, features]`` or ``[samples, features]``.
        mask: bool ``[samples, positions]``; of images a position is a patch, row by row.
        baseline: ``"zero"``, ``"mean"`` (of the sample: over its counted positions, of each channel over its pixels; of features
            over the samples), ``"blur"`` (images), or a number.
        counted: positions that a mean is of.
        patch: pixels along a side of a patch.

    Raises:
        ValueError: if there is no such baseline for such values.

    Example:
        >>> replaced(torch.tensor([[1.0, 2.0], [3.0, 6.0]]), torch.tensor([[True, False], [False, True]]), "mean")
        tensor([[2., 2.],
                [3., 4.]])
    """
    if values.dim() == 4:
        rows, columns = grid(values, patch)
        pixels = mask.view(len(values), rows, columns).repeat_interleave(patch, 1).repeat_interleave(patch, 2)
        where = pixels[:, None, : values.shape[2], : values.shape[3]]
    else:
        where = mask.view(*mask.shape, *[1] * (values.dim() - 2))
    return torch.where(where, _baseline(values, baseline, counted), values)


def _baseline(values: Tensor, baseline: str | float, counted: Tensor | None) -> Tensor:
    if not isinstance(baseline, str):
        return torch.full_like(values, baseline)
    if baseline == "zero":
        return torch.zeros_like(values)
    if baseline == "blur":
        if values.dim() != 4:
            raise ValueError("baseline 'blur' is for images [samples, channels, height, width]: use 'zero' or 'mean'")
        return _blurred(values)
    if values.dim() == 2:
        if len(values) == 1:
            raise ValueError(
                "baseline 'mean' of features is their mean over samples, and there is one: use 'zero', or more samples"
            )
        return values.mean(0, keepdim=True)
    if values.dim() == 4:
        return values.mean((2, 3), keepdim=True)
    weights = torch.ones(values.shape[:2], device=values.device) if counted is None else counted.to(values.device)
    weights = weights.to(values.dtype)[..., None]
    return (values * weights).sum(1, keepdim=True) / weights.sum(1, keepdim=True).clamp(min=1)


def _blurred(images: Tensor) -> Tensor:
    """A mean over a window of a quarter of the image, twice, so that edges of the window are not seen."""
    for _ in range(2):
        height, width = (max(size // _BLUR // 2, 1) for size in images.shape[2:])
        wider = F.pad(images, (width, width, height, height), mode="replicate")
        images = F.avg_pool2d(wider, (2 * height + 1, 2 * width + 1), stride=1)
    return images


def grid(images: Tensor, patch: int) -> tuple[int, int]:
    """How many patches images have from top to bottom, and from left to right; the last ones may be cut off."""
    return -(-images.shape[2] // patch), -(-images.shape[3] // patch)


def by_position(relevance: Tensor, values: Tensor, patch: int, name: str) -> Tensor:
    """Relevance of each position ``[samples, positions]``: as it is, or summed over channels, features and pixels of patches.

    Raises:
        ValueError: if it fits neither.
    """
    if not values.is_floating_point() or values.dim() == 2:
        wanted = tuple(values.shape)
    else:
        patches = grid(values, patch) if values.dim() == 4 else (values.shape[1],)
        wanted = (len(values), int(torch.tensor(patches).prod()))
    if tuple(relevance.shape) == wanted:
        return relevance
    if relevance.shape == values.shape and values.dim() == 4:
        rows, columns = grid(values, patch)
        short = (columns * patch - values.shape[3], rows * patch - values.shape[2])
        padded = F.pad(relevance.sum(1, keepdim=True), (0, short[0], 0, short[1]))
        return F.avg_pool2d(padded, patch, divisor_override=1).flatten(1)
    if relevance.dim() > 2 and relevance.shape[:2] == wanted:
        return relevance.flatten(2).sum(-1)
    raise ValueError(
        f"relevance of {name!r} must be {list(wanted)}, one for each position, or have the input's shape "
        f"{list(values.shape)}, got {list(relevance.shape)}"
    )


@contextmanager
def replaced_arguments(
    module: nn.Module, masks: Mapping[str, Tensor], baseline: str | float, counted: Mapping[str, Tensor], patch: int
) -> Iterator[None]:
    """Replace positions of the floating-point arguments of a module's forward."""

    def hook(called: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        names = [name for name in parameters_of(called) if name != "self"]
        named = [names[index] if index < len(names) else str(index) for index in range(len(args))]
        changed = tuple(one(name, value) for name, value in zip(named, args, strict=True))
        return changed, {name: one(name, value) for name, value in kwargs.items()}

    def one(name: str, value: Any) -> Any:
        mask = masks.get(name)
        if mask is None or not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        return replaced(value, mask, baseline, counted.get(name), patch)

    handle = module.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
