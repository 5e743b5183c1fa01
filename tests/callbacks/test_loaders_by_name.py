"""Validation loaders that are given by name, or combined, are gone through as Lightning does."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningDataModule
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import CombinedLoader

from lrp_prune.callbacks import RelevanceCollector, RelevancePruning

GIVEN: list[Any] = [
    lambda first, second: {"first": first, "second": second},
    lambda first, second: {"all": [first, second]},
    lambda first, second: CombinedLoader({"first": first, "second": second}, "sequential"),
]
IDS = ["by name", "nested", "combined"]


@pytest.mark.parametrize("reference", [0, 1, "all"])
@pytest.mark.parametrize("given", GIVEN, ids=IDS)
@pytest.mark.parametrize("options", [{"recalibrate": True}, {"compensation": "exact"}], ids=["scaled", "compensated"])
def test_a_round_is_the_one_of_a_list(
    options: Any, given: Callable[..., Any], reference: Any, make_module, make_loader, make_trainer, same_weights
) -> None:
    made = []
    for form in (lambda first, second: [first, second], given):
        module, loaders = make_module("none"), form(make_loader(seed=2), make_loader(48, seed=3))
        pruning = RelevancePruning(0.6, reference=reference, summary=False, **options)
        torch.manual_seed(0)
        make_trainer(callbacks=[pruning], max_epochs=2).fit(module, make_loader(), loaders)
        made.append(module)
    assert same_weights(*made)


def test_what_a_resume_makes_up_is_collected_by_name(make_module, make_loader, make_trainer, tmp_path: Path) -> None:
    def fit(path: Path | None = None) -> RelevancePruning:
        pruning = RelevancePruning(0.5, summary=False)
        writes = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=4, save_top_k=-1)
        trainer = make_trainer(callbacks=[pruning, writes], enable_checkpointing=True, max_epochs=2)
        trainer.fit(make_module("none"), make_loader(), {"val": make_loader(seed=2)}, ckpt_path=path)
        return pruning

    assert fit().masks == fit(tmp_path / "step=4.ckpt").masks


@pytest.mark.parametrize("given", GIVEN, ids=IDS)
def test_a_data_module_may_name_its_loaders(given: Callable[..., Any], make_module, make_loader, make_trainer) -> None:
    class Data(LightningDataModule):
        def val_dataloader(self) -> Any:
            return given(make_loader(seed=2), make_loader(48, seed=3))

    found, module = RelevanceCollector(reference=Data()), make_module()
    make_trainer(callbacks=[found]).validate(module, make_loader(), verbose=False)
    expected = RelevanceCollector(reference=[*make_loader(seed=2), *make_loader(48, seed=3)])
    make_trainer(callbacks=[expected]).validate(module, make_loader(), verbose=False)
    assert found.relevance.num_samples == 112
    for name, sums in expected.relevance.items():
        torch.testing.assert_close(found.relevance[name], sums)


@pytest.mark.parametrize(("mode", "batches"), [("min_size", 3), ("max_size_cycle", 4), ("max_size", 3)])
def test_loaders_side_by_side_are_one(mode: Any, batches: int, make_module, make_loader, make_trainer) -> None:
    module = make_module("none")
    seen: list[Any] = []

    def target(batch: Any) -> Any:
        seen.append(batch)
        return module(batch["first"][0]).sum() + module(batch["second"][0]).sum()

    module.relevance_target = target
    module.validation_step = lambda batch, batch_idx: None
    sizes = (64, 48) if mode != "max_size" else (48, 48)
    loaders = CombinedLoader({"first": make_loader(sizes[0]), "second": make_loader(sizes[1])}, mode)
    pruning = RelevancePruning(0.5, recalibrate=True, summary=False)
    make_trainer(callbacks=[pruning], max_epochs=2, num_sanity_val_steps=0).fit(module, make_loader(), loaders)
    assert pruning.round == 1
    assert sum(batch is not None for batch in seen) >= batches
    match = re.escape("reference=1, but there is one validation loader")
    with pytest.raises(MisconfigurationException, match=match):
        make_trainer(callbacks=[RelevanceCollector(reference=1)]).validate(module, loaders, verbose=False)
