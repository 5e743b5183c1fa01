"""Corrections of a ``LightningModule`` that has no ``forward``: what is run is the model that it holds."""

from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from torch.utils.data import DataLoader

from lrp_prune import LRP
from lrp_prune.callbacks import ContrastiveCorrection
from lrp_prune.correction import Automatic, Learned
from lrp_prune.metrics import Suite, side_effects
from lrp_prune.wrapper.module import CorrectedModule
from tests.support.small_models import batch_for, build

METHOD = LRP(composite="attnlrp", target="next_token", skip_first=1)
TOKENS = torch.randint(3, 50, (4, 12), generator=torch.Generator().manual_seed(5))
SUITE = Suite({"first": TOKENS[:2], "second": TOKENS[2:]}, allowed=10.0)


class Holding(LightningModule):
    """Calls the model that it holds in its steps alone."""

    def __init__(self) -> None:
        super().__init__()
        self.held = build("llama")

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.held(**batch)


def loader(shift: int) -> DataLoader:
    ids = batch_for("llama")["input_ids"] + shift
    return DataLoader([{"input_ids": ids, "labels": ids}], batch_size=None)


def corrected(make_trainer: Any, module: Any, **options: Any) -> ContrastiveCorrection:
    correction = ContrastiveCorrection(behaviour="example", method=METHOD, **options)
    make_trainer(callbacks=[correction]).validate(CorrectedModule(module), [loader(0), loader(2)], verbose=False)
    assert correction.patch is not None
    return correction


def size(model: Any) -> float:
    return float(sum(parameter.detach().abs().sum() for parameter in model.parameters()))


def test_side_effects_are_those_of_the_model_inside() -> None:
    assert str(side_effects(Holding(), Holding(), SUITE)) == str(side_effects(build("llama"), build("llama"), SUITE))


@pytest.mark.parametrize(
    "options",
    [
        {"amount": 50, "suite": SUITE},
        {"amount": Automatic(1e-6, 10.0, amounts=[20]), "undesired_metric": size, "general_metric": SUITE},
        {"amount": 50, "condition": Learned("model.layers.0", 0.5)},
    ],
    ids=["suite", "search", "condition"],
)
def test_the_patch_is_that_of_the_model_inside(make_trainer: Any, options: dict[str, Any]) -> None:
    expected, found = corrected(make_trainer, build("llama"), **options), corrected(make_trainer, Holding(), **options)
    assert found.patch == expected.patch and found.patch is not None and found.patch.num_entries > 0
    assert str(found.side_effects) == str(expected.side_effects)
