"""The batches that a collection is made of: those of a validation, or reference data."""

from collections.abc import Iterable, Iterator
from itertools import chain, islice
from typing import Any, cast

from lightning.pytorch import LightningDataModule, Trainer

Source = int | Iterable[Any]
"""A set of batches: the index of a validation loader, or batches that can be iterated over again."""


def batches_of(reference: "Iterable[Any] | LightningDataModule | None") -> Iterable[Any]:
    """Reference data as batches."""
    if isinstance(reference, LightningDataModule):
        reference.prepare_data()
        reference.setup("validate")
        loaders = reference.val_dataloader()
        return chain.from_iterable(loaders) if isinstance(loaders, list | tuple) else cast("Iterable[Any]", loaders)
    return reference if reference is not None else ()


def number_of_batches(trainer: Trainer, loader: int | None) -> float:
    """How many batches of a validation are looked at; infinite where its loaders do not tell."""
    batches = trainer.num_val_batches
    return sum(batches) if loader is None else batches[min(loader, len(batches) - 1)]


def validation_batches(trainer: Trainer, loader: int | None) -> Iterator[tuple[Any, int]]:
    """The batches that a validation would see, each with its loader's index."""
    loaders = trainer.val_dataloaders
    for index, found in enumerate(loaders if isinstance(loaders, list | tuple) else [loaders]):
        if loader in (None, index):
            limit = trainer.num_val_batches[index]
            for batch in islice(found, None if limit == float("inf") else int(limit)):
                yield batch, index
