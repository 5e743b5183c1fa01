"""A loader that the training goes through may be the reference as well: the training sees all batches, in its order."""

from typing import Any

import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, WeightedRandomSampler

from lrp_prune.callbacks import RelevanceCollector, RelevancePruning, Rounds
from tests.callbacks.conftest import Classifier


class Recording(Classifier):
    """Knows which samples it was trained on."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.seen = [*getattr(self, "seen", []), *batch[0][:, 0].tolist()]
        return super().training_step(batch, batch_idx)


def shuffled(dataset: Any, how: str) -> DataLoader:
    generator = torch.Generator().manual_seed(3)
    if how == "generator":
        return DataLoader(dataset, 16, shuffle=True, generator=generator)
    if how == "sampler":
        return DataLoader(dataset, 16, sampler=WeightedRandomSampler(torch.ones(64), 64, generator=generator))
    if how == "batch sampler":
        return DataLoader(dataset, batch_sampler=BatchSampler(RandomSampler(dataset, generator=generator), 16, False))
    return DataLoader(dataset, 16, shuffle=True, generator=generator, num_workers=1, persistent_workers=True)


@pytest.mark.parametrize(
    "make",
    [
        lambda loader: RelevanceCollector(reference=loader),
        lambda loader: RelevancePruning(0.5, Rounds(2, every_n_steps=3), reference=loader, preview=True),
        lambda loader: RelevancePruning(0.0, Rounds(1, start=0), reference=loader),
    ],
    ids=["collector", "steps", "first epoch"],
)
@pytest.mark.parametrize(
    "how", ["generator", "sampler", "batch sampler", pytest.param("workers", marks=pytest.mark.slow)]
)
def test_the_training_is_the_one_without(make: Any, how: str, make_loader, make_trainer, same_weights) -> None:
    modules = []
    for with_it in (False, True):
        loader, module = shuffled(make_loader().dataset, how), Recording()
        torch.manual_seed(0)
        callbacks = [make(loader)] if with_it else []
        make_trainer(callbacks=callbacks, max_epochs=3).fit(module, loader, make_loader(seed=2))
        modules.append(module)
    plain, pruned = modules
    assert len(plain.seen) == 3 * 64 and plain.seen == pruned.seen and same_weights(plain, pruned)


def test_the_validations_order_is_its_own(make_loader, make_trainer) -> None:
    orders = []
    for callbacks in ([], [RelevancePruning(0.5, Rounds(1, start=0), method="magnitude", recalibrate=True)]):
        seen: list[float] = []
        module = Classifier()
        module.validation_step = lambda batch, batch_idx, seen=seen: seen.extend(batch[0][:, 0].tolist())
        loader = shuffled(make_loader(seed=2).dataset, "generator")
        make_trainer(callbacks=callbacks, max_epochs=2, num_sanity_val_steps=0).fit(module, make_loader(), loader)
        orders.append(seen)
    assert len(orders[0]) == 2 * 64 and orders[0] == orders[1]
