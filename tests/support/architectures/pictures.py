"""Images for a model, in each of the layouts that models take them in."""

import math
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from tests.support.architectures.batches import Batch


def pictures(batch: "Batch") -> list[dict[str, Any]]:
    """What may be given to a model for its images, the likeliest first; nothing if it takes none."""
    if batch.takes("flattened_patches"):
        return [_flattened(batch)]
    if batch.takes("pixel_values_videos") and not batch.takes("pixel_values"):
        return [{"pixel_values_videos": batch.normal(batch.samples, 2, *_shape(batch))}]
    if not batch.takes("pixel_values"):
        return []
    shape = _shape(batch)
    whole = batch.normal(batch.samples, *shape)
    several = batch.normal(batch.samples, 1, *shape)
    found: list[dict[str, Any]] = []
    if batch.takes("image_grid_thw"):
        found += _patches(batch)
    if batch.takes("spatial_shapes"):
        found += _rows(batch)
    if batch.takes("image_sizes"):
        sizes = torch.tensor([shape[1:]] * batch.samples)
        tiles = batch.normal(batch.samples, 5, *shape)
        found += [
            {"pixel_values": pixels, "image_sizes": sizes} for pixels in (whole, tiles[:, :2], tiles[:, :3], tiles)
        ]
    if batch.takes("aspect_ratio_ids"):
        found.append(_tiles(batch, shape))
    if batch.takes("target_sizes"):
        found += _strips(batch)
    if batch.takes("pixel_values_local"):
        found.append({"pixel_values": whole})
    if batch.takes("image_embeds_position_mask"):
        found.append(_at_positions(batch, whole))
    if batch.takes("high_res_pixel_values"):
        found.append({"pixel_values": whole, "high_res_pixel_values": batch.normal(batch.samples, *shape)})
    if batch.takes("image_grid_thw"):
        return found
    if batch.takes("image_attention_mask"):
        found.append({"pixel_values": several, "image_attention_mask": torch.ones(batch.samples, batch.tokens, 1)})
    found += [{"pixel_values": whole}, {"pixel_values": several}]
    if batch.takes("pixel_attention_mask"):
        seen = torch.ones(batch.samples, 1, *shape[1:], dtype=torch.bool)
        found += [{"pixel_values": several, "pixel_attention_mask": seen}]
        found += [{"pixel_values": whole, "pixel_attention_mask": torch.ones(batch.samples, 1, dtype=torch.bool)}]
        found += [{"pixel_values": several, "pixel_attention_mask": torch.ones(batch.samples, 1, dtype=torch.bool)}]
    return found


def _shape(batch: "Batch") -> tuple[int, int, int]:
    """Channels, height, width."""
    size = batch.setting("image_size", "img_size", default=64)
    if isinstance(size, dict):
        size = (size["height"], size["width"])
    sides = (size, size) if isinstance(size, int) else tuple(size)
    channels = batch.setting("num_channels", "in_channels", "in_chans", default=3)
    return (channels if isinstance(channels, int) and channels < 10 else 3, *(int(side) for side in sides[-2:]))


def _patches(batch: "Batch") -> list[dict[str, Any]]:
    """Rows of pixels, one for each patch, and the grid that they are of."""
    size = batch.setting("patch_size", default=4)
    frames = batch.setting("temporal_patch_size", default=1)
    merge = batch.setting("spatial_merge_size", "merge_size", default=2)
    side = 2 * (merge if isinstance(merge, int) else 2)
    grid = torch.tensor([[1, side, side]] * batch.samples)
    found: list[dict[str, Any]] = []
    for depth in dict.fromkeys((frames, 1, 2)):
        rows = batch.normal(batch.samples * side * side, 3 * depth * size * size)
        extra = {"image_merge_sizes": torch.full((batch.samples,), 2)} if batch.takes("image_merge_sizes") else {}
        found.append({"pixel_values": rows, "image_grid_thw": grid, **extra})
        found.append(
            {"pixel_values": rows.view(-1, 3, size, size * depth)[..., :size], "image_grid_thw": grid, **extra}
        )
    return found


def _rows(batch: "Batch") -> list[dict[str, Any]]:
    """Rows of pixels of each sample, with how many there are in height and width."""
    size = batch.setting("patch_size", default=4)
    patches = batch.setting("num_patches", default=64)
    side = math.isqrt(min(patches, 64))
    return [
        {
            "pixel_values": batch.normal(batch.samples, side * side, 3 * size * size),
            "spatial_shapes": torch.tensor([[side, side]] * batch.samples),
            "pixel_attention_mask": torch.ones(batch.samples, side * side, dtype=torch.long),
        }
    ]


def _tiles(batch: "Batch", shape: tuple[int, int, int]) -> dict[str, Any]:
    """Images that are cut into tiles."""
    tiles = batch.setting("max_num_tiles", default=4)
    return {
        "pixel_values": batch.normal(batch.samples, 1, tiles, *shape),
        "aspect_ratio_ids": torch.ones(batch.samples, 1, dtype=torch.long),
        "aspect_ratio_mask": torch.ones(batch.samples, 1, tiles, dtype=torch.long),
        "cross_attention_mask": torch.ones(batch.samples, batch.tokens, 1, tiles, dtype=torch.long),
    }


def _strips(batch: "Batch") -> list[dict[str, Any]]:
    """All patches of all images side by side, with how many there are in height and width."""
    size, side = batch.setting("patch_size", default=4), 8
    strip = batch.normal(1, 3, size, batch.samples * side * side * size)
    return [{"pixel_values": strip, "target_sizes": torch.tensor([[side, side]] * batch.samples)}]


def _flattened(batch: "Batch") -> dict[str, Any]:
    """Rows of a row's number, a column's number and pixels."""
    size, side = batch.setting("patch_size", default=4), 4
    places = torch.cartesian_prod(torch.arange(1, side + 1), torch.arange(1, side + 1)).double()
    pixels = batch.normal(batch.samples, side * side, 3 * size * size)
    entries: dict[str, Any] = {
        "flattened_patches": torch.cat([places.expand(batch.samples, -1, -1).to(pixels.dtype), pixels], -1)
    }
    if batch.takes("width"):
        entries |= {name: torch.full((batch.samples,), side) for name in ("width", "height")}
    if batch.takes("image_embeds_position_mask"):
        entries |= _position_mask(batch)
    return entries


def _position_mask(batch: "Batch") -> dict[str, Any]:
    places = batch.setting("latent_query_num", default=4)
    text = batch.ids(batch.samples, places + batch.tokens)
    mask = torch.zeros_like(text)
    mask[:, 1 : 1 + places] = 1
    return {"image_embeds_position_mask": mask, "input_ids": text}


def _at_positions(batch: "Batch", pixels: torch.Tensor) -> dict[str, Any]:
    return {"pixel_values": pixels, **_position_mask(batch)}
