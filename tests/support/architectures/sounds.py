"""Sounds for a model, as waves or as spectrograms, in each of the layouts that models take them in."""

import math
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from tests.support.architectures.batches import Batch

FRAMES = 64
_MASKS = ("input_features_mask", "feature_attention_mask", "input_values_mask", "padding_mask")


def sounds(batch: "Batch") -> list[dict[str, Any]]:
    """What may be given to a model for its sounds, the likeliest first; nothing if it takes none or has images as well."""
    if batch.takes("pixel_values"):
        return []
    if batch.takes("input_features") and not batch.takes("input_values"):
        return _spectrograms(batch)
    if batch.takes("input_values"):
        return _waves(batch)
    return []


def _waves(batch: "Batch") -> list[dict[str, Any]]:
    bins, frames = batch.setting("num_mel_bins"), batch.setting("max_length")
    found = []
    if bins and isinstance(frames, int) and not batch.setting("conv_stride"):  # a spectrogram after all
        found.append({"input_values": batch.normal(batch.samples, frames, bins)})
    length = 6 * math.prod(batch.setting("conv_stride", default=(320,))) + 80
    waves = batch.normal(batch.samples, min(length, 4000))
    return [*found, *_masked(batch, "input_values", waves, waves.shape[1]), {"input_values": waves[:, None]}]


def _spectrograms(batch: "Batch") -> list[dict[str, Any]]:
    names = "num_mel_bins feature_size input_feat_per_channel n_mels feature_projection_input_dim input_dim mel_bins".split()
    sizes = dict.fromkeys(size for name in names if isinstance(size := batch.setting(name), int))
    positions = batch.setting("max_source_positions", default=FRAMES // 2)
    found = []
    for bins in dict.fromkeys((*sizes, 80, 320)):
        for frames in dict.fromkeys((2 * positions, FRAMES)):
            found += _masked(batch, "input_features", batch.normal(batch.samples, bins, frames), frames)
            found += _masked(batch, "input_features", batch.normal(batch.samples, frames, bins), frames)
    return found


def _masked(batch: "Batch", name: str, sound: torch.Tensor, frames: int) -> list[dict[str, Any]]:
    """With a mask that hides nothing, where there is one, and without."""
    masks = [mask for mask in _MASKS if batch.takes(mask)]
    seen = {mask: torch.ones(batch.samples, frames, dtype=torch.long) for mask in masks}
    return [{name: sound, **seen}, {name: sound}] if masks else [{name: sound}]
