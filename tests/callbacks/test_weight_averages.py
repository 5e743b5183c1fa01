"""Beside Lightning's averages of weights: what is pruned are the trained weights, and the averages are pruned with them."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint, StochasticWeightAveraging
from torch import nn

import lrp_prune.pruning.scorers as scorers
from lrp_prune import circuits
from lrp_prune.callbacks import CircuitDiscovery, RelevanceCollector, RelevancePruning, Rounds
from tests.support.circuit_tasks import small_task
from tests.support.small_models import build

pytestmark = pytest.mark.slow

ENTRIES = 8 * 24 + 24 * 16 + 16 * 4


def ema() -> Callback:
    return pytest.importorskip("lightning.pytorch.callbacks.weight_averaging").EMAWeightAveraging(decay=0.9)


@pytest.mark.parametrize("average", ["swa", "ema"])
def test_zeros_survive_weight_averaging(make_module, make_loader, make_trainer, count_zeros, tmp_path, average) -> None:
    module = make_module()
    pruning = RelevancePruning(sparsity=0.5, rounds=Rounds(start=2), scope="global")
    averaging = {
        "swa": lambda: StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=1),
        "ema": ema,
    }[average]()
    trainer = make_trainer(callbacks=[pruning, averaging], max_epochs=4)
    trainer.fit(module, make_loader(), make_loader(seed=2))
    assert count_zeros(module) == ENTRIES // 2
    assert module.zeros_after_step[:16] == [0] * 8 + [ENTRIES // 2] * 8  # SWA adds an epoch for batch normalization
    trainer.save_checkpoint(tmp_path / "file.ckpt")
    twin = make_module()
    # With torch 2.6 the scheduler of SWA keeps a function in its own state.
    saved = torch.load(tmp_path / "file.ckpt", weights_only=average != "swa")
    twin.load_state_dict({name: value for name, value in saved["state_dict"].items() if name in twin.state_dict()})
    assert count_zeros(twin) == ENTRIES // 2


class OwnAverage(Callback):
    """An average of one's own, which does not know of masks, and replaces the weights at the very end."""

    def __init__(self, way: str) -> None:
        self.way = way

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.kept = {name: nn.Parameter(entry.detach().clone()) for name, entry in pl_module.named_parameters()}

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        for name, entry in pl_module.named_parameters():
            self.kept[name].data.lerp_(entry.detach(), 0.1)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        if self.way == "module":
            replaced = copy.deepcopy(pl_module.net)
            pl_module.net = replaced
        pl_module.load_state_dict(self.kept, strict=False, assign=self.way == "assigned")


@pytest.mark.parametrize("first", [True, False], ids=["before", "after"])
@pytest.mark.parametrize("way", ["copied", "assigned", "module"])
def test_what_another_average_brings_back_is_zero_at_the_end_and_told(
    make_module, make_loader, make_trainer, count_zeros, first, way
) -> None:
    module, pruning = make_module(), RelevancePruning(sparsity=0.5, rounds=Rounds(start=1))
    average = OwnAverage(way)
    trainer = make_trainer(callbacks=[average, pruning] if first else [pruning, average], max_epochs=3)
    with pytest.warns(UserWarning, match="pruning: after the last step something wrote to pruned weights of net"):
        trainer.fit(module, make_loader(), make_loader(seed=2))
    assert count_zeros(module) == ENTRIES // 2
    kept = pruning.masks["net.0.weight"]  # type: ignore[index]
    assert torch.equal(module.net[0].weight, average.kept["net.0.weight"].detach() * kept)


@pytest.mark.parametrize("first", [True, False], ids=["before the average", "after the average"])
@pytest.mark.parametrize("reference", [True, False], ids=["reference", "validation"])
def test_relevance_is_that_of_the_trained_weights(make_module, make_loader, make_trainer, first, reference) -> None:
    """Whichever callback comes first; and the average is as it would have been."""
    seen: list[Any] = []

    class Before(Callback):
        def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
            seen.append(copy.deepcopy(pl_module))

    data = make_loader(seed=2)
    collector = RelevanceCollector(reference=data if reference else 0)
    finals = []
    for ours in ([collector], []):
        callbacks = [*ours, ema()] if first else [ema(), *ours]
        module = make_module()
        torch.manual_seed(1)
        trainer = make_trainer(callbacks=[Before(), *callbacks], max_epochs=2, num_sanity_val_steps=0)
        trainer.fit(module, make_loader(), data)
        finals.append(module)
        if ours:
            scorer = scorers.scorer("lrp", seen[-1])
            for batch in data:
                scorer.update(batch)
            expected = scorer.compute()
            for name, tensor in expected.items():
                torch.testing.assert_close(collector.relevance[name], tensor)
    assert all(torch.equal(one, two) for one, two in zip(finals[0].parameters(), finals[1].parameters(), strict=True))


def test_the_validated_average_is_pruned_from_the_round_on(make_module, make_loader, make_trainer, count_zeros) -> None:
    zeros = []

    class Watch(Callback):
        def on_validation_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            zeros.append(count_zeros(pl_module))

    pruning = RelevancePruning(sparsity=0.5, rounds=Rounds(start=2), scope="global")
    trainer = make_trainer(callbacks=[pruning, ema(), Watch()], max_epochs=4, num_sanity_val_steps=0)
    trainer.fit(make_module(), make_loader(), make_loader(seed=2))
    assert zeros == [0] * 8 + [ENTRIES // 2] * 8


def test_resume_beside_an_average_equals_the_uninterrupted_run(
    make_module, make_loader, make_trainer, same_weights, tmp_path
) -> None:
    class Reseed(Callback):
        def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
            torch.manual_seed(trainer.global_step)

    def callbacks() -> list[Any]:
        checkpoint = ModelCheckpoint(dirpath=tmp_path, save_top_k=-1, filename="{epoch}")
        return [RelevancePruning(sparsity=0.7, rounds=2), ema(), checkpoint, Reseed()]

    whole = make_module()
    make_trainer(callbacks=callbacks(), max_epochs=4, enable_checkpointing=True).fit(
        whole, make_loader(), make_loader(seed=2)
    )
    for path in sorted(Path(tmp_path).glob("*.ckpt"))[:3]:
        module = make_module(seed=9)
        make_trainer(callbacks=callbacks(), max_epochs=4, enable_checkpointing=True).fit(
            module, make_loader(), make_loader(seed=2), ckpt_path=path
        )
        assert same_weights(whole, module), path


@pytest.mark.parametrize("first", [True, False], ids=["before the average", "after the average"])
def test_circuits_are_those_of_the_trained_weights(make_trainer, first) -> None:
    class Module(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = build("llama")

        def training_step(self, batch: torch.Tensor, batch_idx: int) -> Any:
            return self.model(input_ids=batch, labels=batch).loss

        def validation_step(self, batch: torch.Tensor, batch_idx: int) -> None:
            pass

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.5)

    trained: list[Any] = []

    class Before(Callback):
        def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
            trained.append(copy.deepcopy(pl_module.model))

    tokens = torch.randint(3, 50, (8, 6), generator=torch.Generator().manual_seed(0))
    loader = torch.utils.data.DataLoader(tokens, batch_size=2)
    discovery = CircuitDiscovery(small_task(), "head", method="attribution_patching", size=2, held_out=small_task())
    callbacks = [discovery, ema()] if first else [ema(), discovery]
    trainer = make_trainer(callbacks=[Before(), *callbacks], max_epochs=2, num_sanity_val_steps=0)
    trainer.fit(Module(), loader, loader)
    expected = circuits.discover(trained[-1], small_task(), "head", "attribution_patching")
    for name, scores in expected.scores.items():
        torch.testing.assert_close(discovery.ranking.scores[name], scores)
