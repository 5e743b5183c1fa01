"""Models sharded by ``fully_shard`` in test processes: on the CPU with gloo, or on GPUs with nccl where there are enough."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tests.support.processes import GPUS, run


def device_type(processes: int) -> str:
    """What that many processes run on, and what they are compared with: one GPU is for tests of one card."""
    return "cuda" if max(processes, 2) <= GPUS else "cpu"


def together(function: Callable[[Any], Any], processes: int, directory: Path, limit: float = 300.0) -> list[Any]:
    """Call ``function(mesh)`` in so many processes with a mesh of all of them; see :func:`processes.run`."""

    def call() -> Any:
        with mesh(processes) as made:
            return function(made)

    return results(call, processes, directory, limit)


def results(function: Callable[[], Any], processes: int, directory: Path, limit: float = 300.0) -> list[Any]:
    """Call ``function()`` in so many processes, and raise what one of them raises; see :func:`processes.run`."""
    found = run(function, processes, directory, limit, gpus=device_type(processes) == "cuda")
    for result in found:
        if isinstance(result, Exception):
            raise result
    return found


@contextmanager
def mesh(processes: int) -> Iterator[Any]:
    """A mesh in one dimension of all processes that ``torchrun`` or :mod:`processes` has started."""
    from torch.distributed.device_mesh import init_device_mesh

    torch.set_num_threads(1)
    device = device_type(processes)
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    torch.distributed.init_process_group("nccl" if device == "cuda" else "gloo")
    try:
        yield init_device_mesh(device, (processes,))
    finally:
        torch.distributed.destroy_process_group()


def sharded(model: nn.Module, mesh: Any, layers: Sequence[nn.Module] = (), **options: Any) -> nn.Module:
    """The model with its layers and itself sharded; by default the layers of a Hugging Face decoder."""
    from torch.distributed.fsdp import fully_shard

    model.to(mesh.device_type)
    for layer in layers or model.model.layers:
        fully_shard(layer, mesh=mesh, **options)
    fully_shard(model, mesh=mesh, **options)
    return model


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor that may be divided, on the CPU."""
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().cpu()
