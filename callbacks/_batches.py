"""The batches that a collection is made of: those of a validation, or reference data."""

import copy
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice
from typing import Any, cast

import torch
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.utilities import CombinedLoader
from torch.utils._pytree import tree_map
from torch.utils.data import DataLoader, Sampler

from lrp_prune.wrapper.internals import mode_of, validation_loaders

Source = int | Iterable[Any]
"""A set of batches: the index of a validation loader, or batches that can be iterated over again."""


def batches_of(reference: "Iterable[Any] | LightningDataModule | None") -> Iterable[Any]:
    """Reference data as batches, apart from a training that goes through the same loader."""
    if isinstance(reference, LightningDataModule):
        reference.prepare_data()
        reference.setup("validate")
        loaders = reference.val_dataloader()
        if not isinstance(loaders, CombinedLoader):
            found = [_apart(loader) for loader in CombinedLoader(loaders, "sequential").flattened]
            return cast("Iterable[Any]", found[0]) if len(found) == 1 else chain.from_iterable(found)
        return (batch for batch, _ in _gone_through(loaders, [float("inf")] * len(loaders.flattened), None))
    return _apart(reference) if reference is not None else ()


def _apart(loader: Any) -> Any:
    """The same loader, with an iterator and with generators of random numbers of its own, at the state of the other's.

    A loader with ``persistent_workers`` has one iterator, which would begin anew in the middle of a training's epoch; one with a
    ``generator`` would give the training another order.
    """
    if not isinstance(loader, DataLoader):
        return loader
    found = copy.copy(loader)
    own = vars(found)  # a loader lets nothing be set
    own["_iterator"] = None
    made: dict[int, Any] = {}
    for name in ("sampler", "batch_sampler", "generator"):
        own[name] = _copied(own.get(name), made)
    return found


def _copied(value: Any, made: dict[int, Any]) -> Any:
    """A generator, or a sampler with those inside, of its own; the same thing once."""
    if isinstance(value, torch.Generator):
        if id(value) not in made:
            made[id(value)] = torch.Generator(value.device).set_state(value.get_state())
        return made[id(value)]
    if not isinstance(value, Sampler) or not hasattr(value, "__dict__"):
        return value
    if id(value) not in made:
        made[id(value)] = copy.copy(value)
        for name, entry in vars(value).items():
            vars(made[id(value)])[name] = _copied(entry, made)
    return made[id(value)]


def _together_apart(loaders: CombinedLoader, mode: Any) -> CombinedLoader:
    return CombinedLoader(tree_map(_apart, loaders.iterables), mode)


def batches_by_loader(trainer: Trainer) -> list[float]:
    """How many batches of each validation loader are looked at; loaders that are gone through side by side are one."""
    loaders = validation_loaders(trainer)
    return list(trainer.num_val_batches) if loaders is None else _numbers(loaders, trainer.num_val_batches)


def number_of_batches(trainer: Trainer, loader: int | None) -> float:
    """How many batches of a validation are looked at; infinite where its loaders do not tell."""
    batches = batches_by_loader(trainer)
    return sum(batches) if loader is None else batches[min(loader, len(batches) - 1)]


def validation_batches(trainer: Trainer, loader: int | None) -> Iterator[tuple[Any, int]]:
    """The batches that a validation would see, each with its loader's index."""
    loaders = validation_loaders(trainer)
    return iter(()) if loaders is None else _gone_through(loaders, trainer.num_val_batches, loader)


def _numbers(loaders: CombinedLoader, limits: Sequence[float]) -> list[float]:
    mode = mode_of(loaders)
    return list(limits) if mode == "sequential" or not limits else [min(limits) if mode == "min_size" else max(limits)]


def _gone_through(loaders: CombinedLoader, limits: Sequence[float], loader: int | None) -> Iterator[tuple[Any, int]]:
    """The batches of all loaders, or of one of them, as Lightning's loops go through them, each with its loader's index."""
    mode: Any = mode_of(loaders)
    one_by_one: list[Iterable[Any]] = [_apart(loader) for loader in loaders.flattened]
    if mode != "sequential":
        one_by_one = [_side_by_side(loaders, mode)]
    for index, (found, limit) in enumerate(zip(one_by_one, _numbers(loaders, limits), strict=True)):
        if loader in (None, index):
            for batch in islice(found, None if limit == float("inf") else int(limit)):
                yield batch, index


def _side_by_side(loaders: CombinedLoader, mode: Any) -> Iterator[Any]:
    # In one of its own: Lightning may be within the other.
    yield from (batch for batch, _, _ in _together_apart(loaders, mode))
