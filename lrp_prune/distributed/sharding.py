"""Tensors that are divided among processes, as ``fully_shard`` leaves them: which part is here, and how parts come together.

Parameters of a model that was sharded by FSDP2 are ``DTensor``: each process holds a slice along one dimension.
Whatever is made for them (relevance, masks) is divided in the same way; no process ever holds all of it.
"""

import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from lrp_prune.walks import modules_of

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


class Sharding(NamedTuple):
    """How one tensor is divided among processes, which may be not at all: then each process has the whole as its part.

    Args:
        shape: of the whole tensor.
        mesh: the processes that it lies on together; None for an ordinary tensor, of which nobody else knows.
        placements: for each dimension of the mesh ``Shard(dim)`` or ``Replicate()``.

    Example:
        >>> alone = Sharding((2, 3))
        >>> alone.is_divided, alone.local_shape, alone.part(torch.ones(2, 3)).shape
        (False, (2, 3), torch.Size([2, 3]))
    """

    shape: tuple[int, ...]
    mesh: "DeviceMesh | None" = None
    placements: tuple[Any, ...] = ()

    @property
    def is_divided(self) -> bool:
        """Whether other processes have parts of it that are not here."""
        return self.axis is not None

    @property
    def rank(self) -> int:
        """Which of the parts is here, counted from 0."""
        return 0 if self.mesh is None or self.axis is None else self.mesh.get_local_rank(self.axis)

    @property
    def parts(self) -> int:
        """How many parts there are."""
        return 1 if self.mesh is None or self.axis is None else self.mesh.size(self.axis)

    @property
    def axis(self) -> int | None:
        """The dimension of the mesh along which the tensor is divided; None if each process holds all of it."""
        return next((axis for axis, placement in enumerate(self.placements) if placement.is_shard()), None)

    @property
    def dim(self) -> int | None:
        """The dimension of the tensor that is divided; None if none is."""
        return None if self.axis is None else self.placements[self.axis].dim % len(self.shape)

    @property
    def bounds(self) -> tuple[int, int]:
        """First and last (exclusive) index of this process's part along :attr:`dim`; equal where it is empty."""
        if self.dim is None:
            return 0, self.shape[0] if self.shape else 1
        size = self.shape[self.dim]
        length = -(-size // self.parts)
        start = min(self.rank * length, size)
        return start, min(start + length, size)

    @property
    def local_shape(self) -> tuple[int, ...]:
        """Shape of this process's part."""
        if self.dim is None:
            return self.shape
        start, stop = self.bounds
        return (*self.shape[: self.dim], stop - start, *self.shape[self.dim + 1 :])

    @property
    def numel(self) -> int:
        """Entries of the whole tensor."""
        return math.prod(self.shape)

    @property
    def local_numel(self) -> int:
        """Entries of this process's part."""
        return math.prod(self.local_shape)

    def located(self, coordinates: Sequence[Tensor]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Which entries are in this process's part, and where in it these are.

        Args:
            coordinates: of entries of the whole tensor, ``[entries]`` for each dimension.

        Returns:
            Bool ``[entries]``, and the coordinates in the part of those that are in it.
        """
        if self.dim is None:
            return torch.ones(coordinates[0].shape, dtype=torch.bool, device=coordinates[0].device), tuple(coordinates)
        start, stop = self.bounds
        here = (coordinates[self.dim] >= start) & (coordinates[self.dim] < stop)
        moved = [entry - start if dim == self.dim else entry for dim, entry in enumerate(coordinates)]
        return here, tuple(entry[here] for entry in moved)

    def part(self, whole: Tensor) -> Tensor:
        """This process's part of the whole tensor, or of one that broadcasts to it; a view."""
        if self.dim is None or whole.shape[self.dim] != self.shape[self.dim]:
            return whole
        start, stop = self.bounds
        return whole.narrow(self.dim, start, stop - start)

    def tensor(self, part: Tensor) -> Tensor:
        """The whole as a ``DTensor`` of which this is the part here; an ordinary tensor as it is. Nothing is sent."""
        if self.mesh is None:
            return part
        from torch.distributed.tensor import DTensor

        strides = torch.empty(self.shape, device="meta").stride()
        return DTensor.from_local(
            part, self.mesh, self.placements, run_check=False, shape=torch.Size(self.shape), stride=strides
        )

    def summed(self, partial: Tensor) -> Tensor:
        """This process's part of the sum over all processes of whole tensors: a reduce-scatter."""
        if self.mesh is None:
            return partial
        from torch.distributed.tensor import DTensor, Partial

        everywhere = [Partial()] * self.mesh.ndim
        addend = DTensor.from_local(partial.to(device_of(self.mesh)), self.mesh, everywhere, run_check=False)
        return local_part(addend.redistribute(placements=self.placements))

    def gathered(self, part: Tensor) -> Tensor:
        """The whole tensor, from all parts, on every process."""
        if self.axis is None:
            return part
        part = part.to(device_of(self.mesh))
        # Booleans travel as bytes: not every backend knows them.
        plain = part.view(torch.uint8) if part.dtype == torch.bool else part
        whole: Tensor = self.tensor(plain.contiguous()).full_tensor()  # type: ignore[attr-defined]  # a DTensor
        return whole.view(part.dtype)

    def divided_along(self, dim: int) -> "Sharding":
        """The same tensor, divided along another dimension."""
        from torch.distributed.tensor import Shard

        moved = [Shard(dim) if placement.is_shard() else placement for placement in self.placements]
        return self._replace(placements=tuple(moved))

    def moved(self, part: Tensor, to: "Sharding") -> Tensor:
        """The part here of the same tensor when it is divided as ``to`` says."""
        if to.placements == self.placements:
            return part
        plain = part.view(torch.uint8) if part.dtype == torch.bool else part
        moved = self.tensor(plain.contiguous()).redistribute(placements=to.placements)  # type: ignore[attr-defined]  # a DTensor
        return local_part(moved).contiguous().view(part.dtype)

    def all_reduced(self, tensor: Tensor, operation: str = "SUM") -> Tensor:
        """The reduction over those processes that hold different parts of one tensor."""
        return tensor if self.axis is None else all_reduced(tensor, self.mesh, operation, (self.axis,))

    def summed_up(self, counts: Sequence[int]) -> list[int]:
        """The sums of numbers over those processes."""
        found: list[int] = self.all_reduced(torch.tensor(counts, dtype=torch.int64, device="cpu")).tolist()
        return found


def counted(shardings: Mapping[str, Sharding], counts: Mapping[str, int]) -> dict[str, int]:
    """Numbers of entries of whole tensors, from those of the parts that are here; called in all processes.

    Args:
        shardings: of the tensors, all of those that are divided among the same processes.
        counts: by name.
    """
    divided = [name for name in counts if shardings[name].is_divided]
    sums = shardings[divided[0]].summed_up([counts[name] for name in divided]) if divided else []
    return {**counts, **dict(zip(divided, sums, strict=True))}


def sharding_of(tensor: Tensor, name: str = "the tensor") -> Sharding:
    """How a tensor is divided, which an ordinary one is not.

    Raises:
        ValueError: if it is divided twice, as tensor parallelism together with sharding does.
    """
    if not is_sharded(tensor):
        return Sharding(tuple(tensor.shape))
    placements = tuple(tensor.placements)  # type: ignore[attr-defined]  # a DTensor
    shards = [placement for placement in placements if not placement.is_replicate()]
    if len(shards) > 1 or any(
        not placement.is_shard() or "Strided" in type(placement).__name__ for placement in shards
    ):
        raise ValueError(
            f"{name} is laid out as {placements}: what is divided along more than one dimension of a mesh (tensor "
            "parallelism) is not supported, use fully_shard alone"
        )
    return Sharding(tuple(tensor.shape), tensor.device_mesh, placements)  # type: ignore[attr-defined]


def is_sharded(tensor: Any) -> bool:
    """Whether this is a ``DTensor``."""
    module = sys.modules.get("torch.distributed.tensor")  # not imported: there is none
    return module is not None and isinstance(tensor, module.DTensor)


def local_part(tensor: Tensor) -> Tensor:
    """What of the tensor is in this process, outside of autograd: a view of a ``DTensor``'s part, else the tensor."""
    if not is_sharded(tensor):
        return tensor.detach()
    part: Tensor = tensor.detach().to_local()  # type: ignore[attr-defined]  # a DTensor
    return part


def fsdp_modules(model: nn.Module) -> Iterator[nn.Module]:
    """Every module that ``fully_shard`` was called on, parents first."""
    package = sys.modules.get("torch.distributed.fsdp")
    if package is not None:
        yield from (module for module in modules_of(model) if isinstance(module, package.FSDPModule))


def at_rest(model: nn.Module) -> None:
    """Put the sharded parameters back where a forward left others: FSDP2 leaves its root unsharded after one."""
    for module in fsdp_modules(model):
        module.reshard()  # type: ignore[operator]  # of FSDPModule


def device_of(mesh: "DeviceMesh | None") -> torch.device:
    """Where this process communicates from."""
    if mesh is None or mesh.device_type == "cpu":
        return torch.device("cpu")
    return torch.device(mesh.device_type, torch.get_device_module(mesh.device_type).current_device())


def is_first(mesh: "DeviceMesh | None") -> bool:
    """Whether this process is the first of the mesh, which writes files; None: it is alone."""
    return mesh is None or not any(mesh.get_coordinate() or ())


def all_reduced(
    tensor: Tensor, mesh: "DeviceMesh | None", operation: str = "SUM", axes: Sequence[int] | None = None
) -> Tensor:
    """The reduction of a small tensor over the processes of a mesh, or along some of its dimensions; on its own device."""
    if mesh is None:
        return tensor
    result = tensor.to(device_of(mesh), copy=True)
    for axis in range(mesh.ndim) if axes is None else axes:
        torch.distributed.all_reduce(result, getattr(torch.distributed.ReduceOp, operation), mesh.get_group(axis))
    return result.to(tensor.device)


def all_gathered(value: Any, mesh: "DeviceMesh | None") -> list[Any]:
    """A small plain value of each process of a mesh, in the same order everywhere."""
    values = [value]
    if mesh is None:
        return values
    for axis in reversed(range(mesh.ndim)):
        groups: list[Any] = [None] * mesh.size(axis)
        torch.distributed.all_gather_object(groups, values, mesh.get_group(axis))
        values = [entry for group in groups for entry in group]
    return values


class OtherProcessError(RuntimeError):
    """Another process has an error, so that this one stops as well."""


def agree(error: Exception | None, mesh: "DeviceMesh | None", what: str) -> None:
    """Raise everywhere if one process has an error, so that none waits for one that is gone.

    Raises:
        Exception: this process's own error.
        OtherProcessError: another process's.
    """
    flag = all_reduced(torch.tensor([int(error is not None)], device="cpu"), mesh, "MAX")
    if not int(flag):
        return
    messages = all_gathered(None if error is None else f"{type(error).__name__}: {error}", mesh)
    if error is not None:
        raise error
    rank, message = next((index, message) for index, message in enumerate(messages) if message is not None)
    raise OtherProcessError(f"{what} failed in process {rank}: {message}")


def agreeing(mesh: "DeviceMesh | None", what: str) -> AbstractContextManager[None]:
    """What fails in one process fails in all of a mesh, which would wait for it in the next exchange; None: this one is alone.

    Raises:
        Exception: this process's own error.
        OtherProcessError: another process's.
    """
    return nullcontext() if mesh is None else telling(partial(agree, mesh=mesh, what=what))


@contextmanager
def telling(agree: Callable[[Exception | None], None]) -> Iterator[None]:
    """Tells of the error that came up in the context, or of none; to raise it, here and elsewhere, is up to what is told."""
    failure = None
    try:
        yield
    except Exception as error:
        failure = error
    agree(failure)


def mesh_of(model: nn.Module) -> "DeviceMesh | None":
    """The processes that a sharded model is divided among; None for any other model."""
    at_rest(model)
    sharded = next((parameter for parameter in model.parameters() if is_sharded(parameter)), None)
    return None if sharded is None else sharded.device_mesh  # type: ignore[attr-defined]  # a DTensor


def in_step(batches: Iterable[Any], model: nn.Module) -> Iterator[Any]:
    """The batches; of a sharded model each process must have as many, since none can run the model alone.

    Raises:
        ValueError: everywhere, as soon as one process has no batch left and another has.
    """
    mesh = mesh_of(model)
    if mesh is None:
        yield from batches
        return
    number, source = 0, iter(batches)
    while True:
        batch = next(source, _NO_BATCH)
        left = all_reduced(torch.tensor([int(batch is not _NO_BATCH)], device="cpu"), mesh)
        if not int(left):
            return
        if int(left) < mesh.size():
            raise ValueError(
                f"{mesh.size() - int(left)} of {mesh.size()} processes have {number} batches and the others have more: a sharded "
                "model is run by all processes together, so give each the same number of batches"
            )
        number += 1
        yield batch


_NO_BATCH = object()
