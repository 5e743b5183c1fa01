"""What several processes must agree on: relevance of all samples, and masks."""

from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer

from lrp_prune.pruning import Masks
from lrp_prune.relevance import Relevance


def gathered(trainer: Trainer, value: Any) -> list[Any]:
    """A small plain value of each process, in the order of their ranks."""
    if trainer.world_size == 1:
        return [value]
    values: list[Any] = [None] * trainer.world_size
    torch.distributed.all_gather_object(values, value)
    return values


def merged(trainer: Trainer, relevance: Relevance | None, error: Exception | None) -> Relevance:
    """Relevance of the samples of all processes, from each one's own, as if collected in one; equal on all of them.

    Args:
        trainer: the run.
        relevance: of this process; ``None`` if there was an error, or no batch.
        error: what went wrong here, if something did.

    Raises:
        Exception: this process's error.
        RuntimeError: another process has an error; raised on all of them, so that none waits for one that is gone.
    """
    if trainer.world_size == 1 and relevance is not None:
        return relevance
    names = {name: tuple(tensor.shape) for name, tensor in relevance.sums.items()} if relevance is not None else {}
    samples = relevance.num_samples if relevance is not None else 0
    everyone = gathered(trainer, (names, samples, str(error) if error is not None else None))
    if error is not None:
        raise error
    failed = [(rank, message) for rank, (_, _, message) in enumerate(everyone) if message is not None]
    if failed:
        raise RuntimeError(f"collecting relevance failed on rank {failed[0][0]}: {failed[0][1]}")
    if relevance is None or any(count == 0 for _, count, _ in everyone):
        empty = [rank for rank, (_, count, _) in enumerate(everyone) if count == 0]
        raise MisconfigurationException(
            f"no batch reached the collection on rank {', '.join(map(str, empty))}: each process needs at least one "
            "batch, use a larger validation set, fewer processes, or reference="
        )
    shapes: dict[str, tuple[int, ...]] = {}
    for theirs, _, _ in everyone:
        shapes.update(theirs)
    sums = {}
    for name, shape in shapes.items():
        mine = relevance.sums.get(name)
        device = trainer.strategy.root_device
        total = torch.zeros(shape, device=device) if mine is None else mine.to(device=device, copy=True)
        torch.distributed.all_reduce(total)
        sums[name] = total if mine is None else total.to(mine.device)
    return relevance.with_sums(sums, sum(count for _, count, _ in everyone))


def check_equal(trainer: Trainer, masks: Masks) -> None:
    """Stop if two processes would prune differently.

    Raises:
        RuntimeError: the masks differ; names the ranks.
    """
    if trainer.world_size == 1:
        return
    checksums = gathered(trainer, masks.checksum())
    if len(set(checksums)) > 1:
        raise RuntimeError(f"the ranks selected different masks (checksums {', '.join(checksums)}): nothing was pruned")
