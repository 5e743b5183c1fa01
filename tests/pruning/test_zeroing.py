"""Zeroing by bits is zeroing, in every type and layout."""

import pytest
import torch

from lrp_prune.pruning import keeping
from lrp_prune.pruning.keeping import zero_pruned_


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
    for kept in (keeping._as_bits(mask, tensor), -mask.to(torch.int8)):
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
