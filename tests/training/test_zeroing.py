"""Zeroing by bits is zeroing, in every type and layout."""

import pytest
import torch

from lrp_prune.training.zeroing import as_bits, flat, some_pruned, zero_pruned_


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128]
)
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "strided", "channels_last", "large"])
def test_zeroing_equals_indexing(dtype: torch.dtype, layout: str) -> None:
    tensor = {
        "contiguous": lambda: torch.randn(7, 5),
        "transposed": lambda: torch.randn(5, 7).t(),
        "strided": lambda: torch.randn(7, 10)[:, ::2],
        "channels_last": lambda: torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "large": lambda: torch.randn(300, 301),
    }[layout]().to(dtype)
    tensor.reshape(-1)[0] = float("nan")
    mask = torch.rand(tensor.shape) > 0.5
    mask.view(-1)[0] = False
    expected = tensor.clone()
    expected[~mask] = 0
    for kept in (as_bits(mask, tensor), -mask.to(torch.int8)):
        changed = tensor.as_strided(tensor.shape, tensor.stride())
        changed = (
            changed.clone(memory_format=torch.preserve_format)
            if layout != "strided"
            else torch.randn(7, 10).to(dtype)[:, ::2]
        )
        changed.copy_(tensor)
        zero_pruned_(changed, kept)
        assert torch.equal(
            changed.nan_to_num(99.0) if not dtype.is_complex else torch.view_as_real(changed),
            expected.nan_to_num(99.0) if not dtype.is_complex else torch.view_as_real(expected),
        )


@pytest.mark.parametrize("shape", [(), (3,), (40, 40), (512, 512)])
@pytest.mark.parametrize("pruned", ["none", "one", "few", "rows", "half", "all"])
def test_a_sample_of_what_is_pruned_is_pruned_and_from_everywhere(shape: tuple[int, ...], pruned: str) -> None:
    torch.manual_seed(0)
    mask = torch.ones(shape, dtype=torch.bool)
    entries = mask.view(-1)
    number = {"none": 0, "one": 1, "few": 26, "rows": entries.numel() // 4, "all": entries.numel()}
    if pruned == "half":
        entries[torch.rand(entries.shape) > 0.5] = False
    elif pruned == "few":
        entries[torch.randperm(entries.numel())[:26]] = False
    else:
        entries[: number[pruned]] = False
    found = some_pruned(as_bits(mask, torch.empty(shape)))
    there = (~entries).nonzero()[:, 0]
    assert found.numel() <= 1024 and found.unique().numel() == found.numel() and not entries[found].any()
    assert found.numel() >= min(there.numel(), 512)
    if there.numel() > 2048:
        span = (there.max() - there.min()) / 10
        assert found.min() < there.min() + span and found.max() > there.max() - span


def test_a_sample_is_of_places_in_memory() -> None:
    weight = torch.randn(2, 3, 40, 50).to(memory_format=torch.channels_last)
    mask = torch.ones(weight.shape, dtype=torch.bool)
    mask[1, 2] = False
    found = some_pruned(as_bits(mask, weight))
    assert found.numel() == 1000  # every second one of 2000
    zero_pruned_(weight, as_bits(mask, weight))
    assert not flat(weight)[found].any()
