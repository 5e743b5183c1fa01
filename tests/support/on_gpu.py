"""Functions that run on a GPU, each in a process of its own: tests that fork would fail in one that has started CUDA."""

import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.processes import GPUS, run

needs_a_gpu = pytest.mark.skipif(not GPUS, reason="needs a GPU")


def on_a_gpu(function: Callable[[], Any], directory: Path, limit: float = 300.0) -> Any:
    """What a function gives in a new process, with float32 products that are not rounded to fewer bits."""

    def call() -> Any:
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        warnings.simplefilter("ignore")
        try:
            return function()
        except Exception:
            return AssertionError(traceback.format_exc())

    (result,) = run(call, 1, directory, limit, gpus=True)
    if isinstance(result, Exception):
        raise result
    return result


def moved(batch: Any, device: str = "cuda") -> Any:
    """A batch on a device."""
    return torch.utils._pytree.tree_map(lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf, batch)
