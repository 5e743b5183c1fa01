"""What several processes must agree on: relevance of all samples, and masks."""

import hashlib
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, NoReturn

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer

from lrp_prune.distributed.sharding import OtherProcessError, telling
from lrp_prune.pruning import Masks
from lrp_prune.relevance import Relevance
from lrp_prune.targets import in_words


def gathered(trainer: Trainer, value: Any) -> list[Any]:
    """A small plain value of each process, in the order of their ranks."""
    if trainer.world_size == 1:
        return [value]
    values: list[Any] = [None] * trainer.world_size
    torch.distributed.all_gather_object(values, value)
    return values


def agree(trainer: Trainer, error: Exception | None) -> None:
    """Let all processes know of an error that one of them has, before they begin what needs all of them.

    Args:
        trainer: the run.
        error: what went wrong in this process, if something did.

    Raises:
        Exception: this process's error.
        OtherProcessError: another process has one; raised on all of them, so that none waits for one that is gone.
    """
    messages = gathered(trainer, f"{type(error).__name__}: {error}" if error is not None else None)
    if error is not None:
        raise error
    failed = [(rank, message) for rank, message in enumerate(messages) if message is not None]
    if failed:
        raise OtherProcessError(
            f"rank {failed[0][0]} failed, so this one stops as well, with nothing changed: {failed[0][1]}"
        )


def agreeing(trainer: Trainer) -> AbstractContextManager[None]:
    """What fails in one process fails in all of them: :func:`agree` on what comes up in the context."""
    return telling(partial(agree, trainer))


def merged(trainer: Trainer, relevance: Relevance | None, error: Exception | None) -> Relevance:
    """Relevance of the samples of all processes, from each one's own, as if collected in one; equal on all of them.

    Args:
        trainer: the run.
        relevance: of this process; ``None`` if there was an error, or no batch.
        error: what went wrong here, if something did.

    Raises:
        Exception: this process's error.
        OtherProcessError: another process has an error; see :func:`agree`.
        MisconfigurationException: no process had a batch, or they explained different things.
    """
    agree(trainer, error)
    if relevance is not None and (trainer.world_size == 1 or relevance.shardings):
        return relevance  # of a sharded model it is that of all processes already
    names = {name: tuple(tensor.shape) for name, tensor in relevance.sums.items()} if relevance is not None else {}
    samples_here, target = (relevance.num_samples, relevance.target) if relevance is not None else (0, None)
    everyone = gathered(trainer, (names, samples_here, target))
    samples = sum(count for _, count, _ in everyone)
    if samples == 0:
        raise MisconfigurationException(
            "no batch reached the collection on any rank: use a larger validation set, or another reference="
        )
    check_targets([target for _, _, target in everyone])
    shapes: dict[str, tuple[int, ...]] = {}
    for theirs, _, _ in everyone:
        shapes.update(theirs)
    described = relevance
    if described is None or any(set(theirs) != set(shapes) for theirs, _, _ in everyone):
        described = _described(trainer, relevance)
    sums = {}
    for name, shape in shapes.items():
        mine = relevance.sums.get(name) if relevance is not None else None
        device = trainer.strategy.root_device
        total = torch.zeros(shape, device=device) if mine is None else mine.to(device=device, copy=True)
        torch.distributed.all_reduce(total)
        sums[name] = total if mine is None else total.to(mine.device)
    return described.with_sums(sums, samples)


def check_targets(targets: list[str | None]) -> None:
    """Refuse to sum relevance of different things: each process infers the target from its own first batch."""
    first = next((target for target in targets if target is not None), None)
    for rank, target in enumerate(targets):
        if target not in (None, first):
            raise MisconfigurationException(
                f"rank {targets.index(first)} explained {in_words(first or '')} ({first!r}), and rank {rank} "
                f"{in_words(target)} ({target!r}), each as it took its own first batch: pass target= with the one that is meant"
            )


def _described(trainer: Trainer, relevance: Relevance | None) -> Relevance:
    """What the relevance of all processes is about, without its sums: one may have had no batch, or not reached a tensor."""
    mine = relevance.with_sums({}, 1) if relevance is not None else None
    theirs = [other for other in gathered(trainer, mine) if other is not None]
    whole = theirs[0] if mine is None else mine
    for other in theirs:
        whole = whole + other
    return whole


def check_equal(trainer: Trainer, masks: Masks) -> None:
    """Stop if two processes would prune differently.

    Of masks that are divided, those processes are compared that hold the same part, and what all know of the whole.

    Raises:
        RuntimeError: the masks differ; names the first tensor that does, and the ranks.
    """
    if trainer.world_size == 1:
        return
    entries = {name: _digests(masks, name) for name in sorted(masks)}
    parts: dict[str, Any] = {"all": hashlib.sha256()}
    for name, (shared, part, own) in entries.items():
        parts["all"].update(f"{name}, {shared};".encode())
        parts.setdefault(part, hashlib.sha256()).update(own.encode())
    everyone = gathered(trainer, {part: digest.hexdigest() for part, digest in parts.items()})
    seen: dict[str, set[str]] = {}
    for theirs in everyone:
        for part, digest in theirs.items():
            seen.setdefault(part, set()).add(digest)
    if any(len(digests) > 1 for digests in seen.values()):
        _raise_first_difference(gathered(trainer, entries))


def _digests(masks: Masks, name: str) -> tuple[str, str, str]:
    """What is equal in all processes; which part this one has; what is equal in all that have the same part."""
    sharding = masks.sharding(name)
    part = f"part {sharding.rank}" if sharding.is_divided else "whole"
    shared = f"{masks.pruned_in(name)} of {masks.shapes[name]} pruned"
    return shared, part, hashlib.sha256(masks.bits(name).numpy().tobytes()).hexdigest()


def _raise_first_difference(everyone: list[dict[str, tuple[str, str, str]]]) -> NoReturn:
    for name in sorted(set().union(*everyone)):
        first: dict[str, tuple[int, str]] = {}
        for rank, entries in enumerate(everyone):
            shared, part, own = entries.get(name, ("no mask", "whole", ""))
            for key, value in (("all", shared), (part, own)):
                other, known = first.setdefault(key, (rank, value))
                if known != value:
                    raise RuntimeError(
                        f"the ranks selected different masks: {name!r} is the first that differs, on rank {other} "
                        f"({everyone[other].get(name, ('no mask',))[0]}) and rank {rank} ({shared}). Nothing was pruned: check "
                        "that all ranks have the same weights and the same reference data"
                    )
    raise RuntimeError("the ranks selected different masks: nothing was pruned")
