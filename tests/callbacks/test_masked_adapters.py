"""Adapters beside pruning callbacks: under the masks of several, wherever the model is run, after a step back, in a teacher."""

import logging
import pickle
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint, WeightAveraging
from torch import Tensor, nn

from lrp_prune.callbacks import Distillation, RelevancePruning, RoundQuality, Rounds
from tests.support.resumed import check_resumed_equals_whole


class Adapted(LightningModule):
    """Two layers with an adapter each, of which nothing is zero."""

    def __init__(self, kind: Any = peft.LoraConfig) -> None:
        super().__init__()
        weights = {"init_weights": False} if kind is peft.LoHaConfig else {"init_lora_weights": False}
        config = kind(r=2, target_modules=["0", "2"], **weights)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.model = peft.get_peft_model(nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 4)), config)

    def forward(self, inputs: Tensor) -> Tensor:
        result: Tensor = self.model(inputs)
        return result

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("quality", F.cross_entropy(self(batch[0]), batch[1]))

    test_step = validation_step

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(batch[0])

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW([entry for entry in self.parameters() if entry.requires_grad], lr=0.05)

    def merged(self, inputs: Tensor) -> Tensor:
        """By the weights written down, once it is clear that what is pruned is zero in them."""
        with torch.no_grad():
            result: Tensor = self.model.merge_and_unload()(inputs)
        return result


def prunings(rounds: int = 2) -> list[Callback]:
    """One for each layer."""
    options: dict[str, Any] = {"method": "magnitude", "scope": "global", "summary": False}
    return [
        RelevancePruning(0.5, Rounds(rounds), include=[f"model.{layer}.weight"], name=name, **options)
        for layer, name in (("0", "first"), ("2", "second"))
    ]


def zeros_in_merged(module: Adapted) -> list[int]:
    merged = module.model.merge_and_unload()
    return [int((merged[layer].weight == 0).sum()) for layer in (0, 2)]


@pytest.mark.slow
def test_two_callbacks_mask_their_own_and_say_so_once(
    make_loader, make_trainer, caplog: pytest.LogCaptureFixture
) -> None:
    module = Adapted()
    with caplog.at_level(logging.INFO):
        make_trainer(callbacks=[*prunings(), WeightAveraging()], max_epochs=4).fit(
            module, make_loader(), make_loader(seed=2)
        )
    told = [entry.getMessage() for entry in caplog.records if "the adapters of" in entry.getMessage()]
    assert len(told) == 2 and "model.0.weight are zero" in told[0] and "model.2.weight are zero" in told[1]
    inputs = next(iter(make_loader()))[0]
    outputs = module(inputs).detach()
    torch.testing.assert_close(module.merged(inputs), outputs)


@pytest.mark.slow
def test_a_resumed_training_equals_the_uninterrupted_one(
    make_loader, make_trainer, same_weights, tmp_path: Path
) -> None:
    def callbacks() -> list[Callback]:
        return [*prunings(), WeightAveraging()]

    def loaders() -> Any:
        return make_loader(), make_loader(seed=2)

    check_resumed_equals_whole(make_trainer, Adapted, callbacks, loaders, same_weights, tmp_path / "c")


def test_a_model_from_a_checkpoint_is_run_as_it_was_trained(make_loader, make_trainer, tmp_path: Path) -> None:
    module, data = Adapted(), make_loader(seed=3)
    checkpoint = ModelCheckpoint(dirpath=tmp_path, filename="last")
    trainer = make_trainer(callbacks=[*prunings(1), checkpoint], max_epochs=2, enable_checkpointing=True)
    trainer.fit(module, make_loader(), make_loader(seed=2))
    outputs = torch.cat(trainer.predict(module, data))
    for run in ("validate", "test", "predict"):
        other = Adapted()
        again = make_trainer(callbacks=prunings(1))
        options = {} if run == "predict" else {"verbose": False}
        getattr(again, run)(other, data, ckpt_path=tmp_path / "last.ckpt", **options)
        assert torch.equal(torch.cat([other(batch[0]) for batch in data]), outputs), run


class Planned(Callback):
    def __init__(self) -> None:
        self.outputs: list[Tensor] = []

    def on_validation_epoch_end(self, trainer: Any, module: Any) -> None:
        if not trainer.sanity_checking:
            module.log("planned", float(trainer.current_epoch))

    def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
        inputs = torch.ones(1, 8)
        self.outputs.append(module(inputs).detach())


def test_a_round_of_two_callbacks_is_one_and_is_taken_back_in_both(make_loader, make_trainer) -> None:
    module, planned, quality = Adapted(), Planned(), RoundQuality("planned", limit=1.5)
    both = prunings()
    with pytest.warns(UserWarning, match="the model is back at the end of round 2"):
        make_trainer(callbacks=[*both, planned, quality], max_epochs=4).fit(module, make_loader(), make_loader(seed=2))
    assert [(point.round, point.undone) for point in quality.points] == [(0, False), (2, False), (4, True)]
    assert [entry.round for entry in both] == [1, 1]
    assert torch.equal(module(torch.ones(1, 8)), planned.outputs[1])
    pruned = [entry.masks.num_pruned for entry in both]
    assert zeros_in_merged(module) == pruned and all(pruned)


def test_back_at_the_dense_model_adapters_are_whole_again(make_loader, make_trainer) -> None:
    module, planned, quality = Adapted(), Planned(), RoundQuality("planned", limit=0.5)
    with pytest.warns(UserWarning, match="the model is back at the end of the dense training"):
        make_trainer(callbacks=[*prunings(), planned, quality], max_epochs=3).fit(
            module, make_loader(), make_loader(seed=2)
        )
    assert torch.equal(module(torch.ones(1, 8)), planned.outputs[0])


def test_what_a_round_could_not_mask_is_refused_before_the_first_step(make_loader, make_trainer) -> None:
    merged = Adapted()
    merged.model.merge_adapter()
    for module, message in ((Adapted(peft.LoHaConfig), "another kind than LoRA"), (merged, "merged already")):
        before = pickle.dumps(module.state_dict())
        with pytest.raises(MisconfigurationException, match=rf"model\.0\.weight.*{message}.*exclude="):
            make_trainer(callbacks=prunings(), max_epochs=4).fit(module, make_loader(), make_loader(seed=2))
        assert pickle.dumps(module.state_dict()) == before


def test_with_adapters_the_teacher_is_the_dense_model_to_the_last_bit(make_loader, make_trainer) -> None:
    """Base weights are frozen: what is kept of them are the pruned values, and of the adapters all."""
    module, distillation = Adapted(), Distillation(0.9)
    inputs = next(iter(make_loader()))[0]
    dense = module.model(inputs).detach()
    early = RelevancePruning(
        0.5, Rounds(2, start=0), method="magnitude", scope="global", include=["model.0.weight", "model.2.weight"]
    )
    make_trainer(callbacks=[early, distillation], max_epochs=3).fit(module, make_loader())
    with torch.no_grad(), distillation._teaching(module, module.model) as teacher:
        assert torch.equal(teacher(inputs), dense)
    assert not torch.allclose(module.model(inputs), dense, rtol=1e-2)
    assert set(distillation.state_dict()["earlier"]["whole"]) == {
        name for name, entry in module.named_parameters() if entry.requires_grad
    }
    assert early.masks.sparsity == 0.5
