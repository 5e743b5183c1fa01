"""A batch that fits a model, by the names of its forward's parameters and by its configuration."""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tests.support.architectures.shrinking import WORDS

SAMPLES, TOKENS, FRAMES = 2, 9, 64


class Batch:
    """Makes the entries of a batch for one model; random ones always the same."""

    def __init__(self, mapping: str, model: nn.Module) -> None:
        self.mapping, self.model, self.config = mapping, model, model.config
        self.generator = torch.Generator().manual_seed(2)
        self.parameters = [
            name
            for name, parameter in inspect.signature(model.forward).parameters.items()
            if parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
        ]

    def made(self) -> dict[str, Any]:
        """The batch."""
        entries: dict[str, Any] = {}
        for name in self.parameters:
            make = ENTRIES.get(name)
            value = None if make is None else make(self)
            if value is not None:
                entries[name] = value
        label(self, entries)
        return entries

    def ids(self, *shape: int) -> Tensor:
        """Ordinary tokens."""
        return torch.randint(WORDS.start, WORDS.stop, shape or (SAMPLES, TOKENS), generator=self.generator)

    def normal(self, *shape: int) -> Tensor:
        """Numbers in float64."""
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def below(self, limit: int, *shape: int) -> Tensor:
        """Integers from zero on."""
        return torch.randint(limit, shape, generator=self.generator)

    def takes(self, *names: str) -> bool:
        """Whether the forward has one of these parameters."""
        return any(name in self.parameters for name in names)

    def setting(self, *names: str, default: Any = None) -> Any:
        """The first of these attributes that the configuration, or one inside of it, has."""
        for config in nested(self.config):
            for name in names:
                value = getattr(config, name, None)
                if value is not None:
                    return value
        return default


def nested(config: Any) -> list[Any]:
    """A configuration and those inside of it, of images and sounds first."""
    inner = [value for value in vars(config).values() if hasattr(value, "to_dict")]
    inner.sort(key=lambda value: "text" in type(value).__name__.lower())
    return [config, *(found for value in inner for found in nested(value))]


def batch_for(mapping: str, model: nn.Module) -> dict[str, Any]:
    """Inputs and labels for a tiny model."""
    return Batch(mapping, model).made()


def _input_ids(batch: Batch) -> Tensor | None:
    return None if batch.mapping in ("image-classification",) and batch.takes("pixel_values") else batch.ids()


def _decoder_ids(batch: Batch) -> Tensor | None:
    """Those of an encoder-decoder whose decoder is given something of its own."""
    return batch.ids() if batch.mapping in ("seq-to-seq", "speech-seq-to-seq", "image-text-to-text") else None


def _pixels(batch: Batch) -> Tensor:
    size = batch.setting("image_size", "img_size", default=64)
    sides = (size, size) if isinstance(size, int) else tuple(size)
    channels = batch.setting("num_channels", "in_channels", "in_chans", default=3)
    return batch.normal(SAMPLES, channels if isinstance(channels, int) else 3, *sides[-2:])


def _waves(batch: Batch) -> Tensor:
    if batch.setting("num_mel_bins") and batch.setting("max_length"):  # a spectrogram after all
        return batch.normal(SAMPLES, batch.config.max_length, batch.config.num_mel_bins)
    strides = batch.setting("conv_stride", default=(320,))
    length = 6
    for stride in strides:
        length *= stride
    return batch.normal(SAMPLES, min(length + 80, 4000))


def _features(batch: Batch) -> Tensor:
    bins = batch.setting("num_mel_bins", "feature_projection_input_dim", "input_feat_per_channel", "n_mels", default=80)
    if batch.setting("max_source_positions"):
        return batch.normal(SAMPLES, bins, 2 * batch.setting("max_source_positions"))
    return batch.normal(SAMPLES, FRAMES, bins)


def _boxes(batch: Batch) -> Tensor:
    """Of words on a page: left, top, right, bottom."""
    corners = batch.below(20, SAMPLES, TOKENS, 2)
    return torch.cat([corners, corners + 1 + batch.below(20, SAMPLES, TOKENS, 2)], -1)


ENTRIES: dict[str, Callable[[Batch], Any]] = {
    "input_ids": _input_ids,
    "decoder_input_ids": _decoder_ids,
    "pixel_values": _pixels,
    "input_values": _waves,
    "input_features": _features,
    "bbox": _boxes,
}
"""Name of a parameter of forwards -> what is given for it; None for nothing."""


def label(batch: Batch, entries: dict[str, Any]) -> None:
    """Add what the samples' labels are, as a training has them."""
    ids = entries.get("input_ids")
    if batch.mapping in ("causal-lm", "masked-lm", "image-text-to-text") and ids is not None:
        entries["labels"] = ids
    elif batch.mapping in ("seq-to-seq", "speech-seq-to-seq"):
        entries["labels"] = entries.get("decoder_input_ids", ids)
    elif batch.mapping.endswith("-classification") and batch.mapping != "token-classification":
        entries["labels"] = torch.arange(SAMPLES) % 2
    elif batch.mapping == "token-classification" and ids is not None:
        entries["labels"] = torch.arange(ids.numel()).view(ids.shape) % 2
    elif batch.mapping == "question-answering":
        entries["start_positions"], entries["end_positions"] = torch.tensor([2, 3]), torch.tensor([4, 5])
