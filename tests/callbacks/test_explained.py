"""What is explained within a training: inferred once, through the module around the model, and refused early."""

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.utils.data import DataLoader

import lrp_prune
from lrp_prune import LRP
from lrp_prune.callbacks import RelevanceCollector, RelevancePruning
from tests.support.labelled_models import CASES, HandsOn


class Trained(HandsOn):
    """Trains the model inside by the loss that it computes."""

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss: Tensor = self(**batch).loss
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.log("val_loss", self(**batch).loss)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.0)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["t5", "bart", "bert token classification", "bert masked", "gpt2"])
def test_the_masks_of_a_training_are_those_of_the_bare_model(
    name: str, make_trainer: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    case = CASES[name]
    model, batch = case.made()
    module = Trained(case.made()[0])
    pruning = RelevancePruning(sparsity=0.5, rounds=2, summary=False)
    loader = DataLoader([batch], batch_size=None)
    with caplog.at_level(logging.INFO, "lrp_prune"):
        make_trainer(callbacks=[pruning], max_epochs=4).fit(module, loader, loader)
    messages = [record.getMessage() for record in caplog.records if record.name == "lrp_prune"]
    assert len(messages) == 1 and f"target={case.target!r}" in messages[0]  # once for both rounds
    assert pruning.masks is not None
    expected = lrp_prune.prune(model, [batch], sparsity=0.5, rounds=2, recalibrate=False)
    assert [weight.removeprefix("model.") for weight in pruning.masks] == list(expected)
    different = sum(
        int((mine != theirs).sum()) for mine, theirs in zip(pruning.masks.values(), expected.values(), strict=True)
    )
    assert different <= 4  # ties within rounding


def test_a_target_for_another_model_is_refused_before_training(make_trainer: Callable[..., Any]) -> None:
    _, batch = CASES["bert token classification"].made()
    module = Trained(CASES["bert token classification"].made()[0])
    steps: list[int] = []
    module.training_step = lambda batch, batch_idx: steps.append(batch_idx)
    loader = DataLoader([batch], batch_size=None)
    pruning = RelevancePruning(sparsity=0.5, method=LRP(target="next_token"))
    with pytest.raises(MisconfigurationException, match="is a token classifier: pass target='token'"):
        make_trainer(callbacks=[pruning], max_epochs=2).fit(module, loader, loader)
    assert not steps


@pytest.mark.parametrize(
    "reference",
    [torch.zeros(2, 3), (torch.zeros(2, 3), torch.zeros(2).long()), [torch.zeros(2, 3), torch.zeros(2).long()]],
)
def test_one_batch_is_no_reference(reference: Any) -> None:
    with pytest.raises(
        MisconfigurationException, match=r"reference must be an iterable of batches, got .*: pass .batch."
    ):
        RelevanceCollector(reference=reference)
