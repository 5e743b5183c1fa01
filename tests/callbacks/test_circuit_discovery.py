"""Discovery in a validation: the same as without Lightning, nothing changes, and two processes agree."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.utils.data import DataLoader

from lrp_prune import LRP, Magnitude, circuits
from lrp_prune.callbacks.circuit_discovery import CircuitDiscovery
from lrp_prune.tasks import TableTask
from tests.support.circuit_tasks import numbers, small_task
from tests.support.small_models import build
from tests.support.trainers import forked
from tests.support.trainers import quiet_trainer as trainer


class Module(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model = build("llama")

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> Any:
        return self.model(input_ids=batch, labels=batch).loss

    def validation_step(self, batch: torch.Tensor, batch_idx: int) -> None:
        self.log("loss", self.model(input_ids=batch, labels=batch).loss)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def loader() -> Any:
    return DataLoader(torch.randint(3, 50, (4, 6), generator=torch.Generator().manual_seed(0)), batch_size=2)


def held_out() -> TableTask:
    row = {"clean": "25 6 7 8 9", "counterfactual": "5 6 17 28 9", "answers": " 13", "distractors": " 14"}
    return TableTask(numbers, [row])


@pytest.mark.slow
def test_epochs_that_never_come_are_warned_about(tmp_path: Path) -> None:
    callback = CircuitDiscovery(small_task(), "head", held_out=held_out(), every_n_epochs=2)
    with pytest.warns(UserWarning, match=r"CircuitDiscovery\(every_n_epochs=2\) finds nothing in this training"):
        trainer(tmp_path, callbacks=[callback], max_epochs=1).fit(Module(), loader(), loader())


@pytest.mark.slow
def test_a_validation_finds_what_discovery_finds(tmp_path: Path) -> None:
    module = Module()
    callback = CircuitDiscovery(small_task(), "head", method="attribution_patching", size=2, held_out=held_out())
    with pytest.raises(RuntimeError, match="no circuit was discovered"):
        callback.circuit  # noqa: B018
    run = trainer(tmp_path, callbacks=[callback])
    run.validate(module, loader(), verbose=False)
    ranking = circuits.discover(module.model, small_task(), "head", "attribution_patching")
    assert callback.circuit == ranking.at(2) and callback.circuit.size == 2
    expected = circuits.evaluate(module.model, ranking, held_out(), [2])
    assert float(callback.result.faithfulness[-1]) == pytest.approx(float(expected.faithfulness))
    assert float(run.callback_metrics["circuit/cpr"]) == pytest.approx(callback.result.cpr)


@pytest.mark.slow
def test_training_goes_on_as_without_it(tmp_path: Path) -> None:
    states = []
    for callbacks in ([], [CircuitDiscovery(small_task(), "head", held_out=held_out(), every_n_epochs=2)]):
        torch.manual_seed(0)
        module = Module()
        trainer(tmp_path, max_epochs=2, callbacks=callbacks, accumulate_grad_batches=2, val_check_interval=1).fit(
            module, loader(), loader()
        )
        states.append(module.state_dict())
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


@pytest.mark.slow
def test_weights_and_a_single_size(tmp_path: Path) -> None:
    callback = CircuitDiscovery(
        small_task(), "weight", size=0.5, sizes=(), ablation="zero", held_out=held_out(), batch_size=1
    )
    run = trainer(tmp_path, callbacks=[callback])
    run.validate(Module(), loader(), verbose=False)
    assert callback.circuit.granularity == "weight"
    assert "circuit/faithfulness" in run.callback_metrics and "circuit/cpr" not in run.callback_metrics


@pytest.mark.processes
@pytest.mark.slow
def test_two_processes_agree(tmp_path: Path) -> None:
    callback = CircuitDiscovery(small_task(), "head", size=3, held_out=held_out())

    class Save(Callback):
        def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            callback.circuit.save(tmp_path / f"{trainer.global_rank}.safetensors")

    run = trainer(tmp_path, max_epochs=1, callbacks=[callback, Save()], strategy=forked(), devices=2)
    run.fit(Module(), loader(), loader())
    first, second = (circuits.Circuit.load(tmp_path / f"{rank}.safetensors") for rank in (0, 1))
    assert first == second and first.size == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ablation": "noise"}, "ablation must be one of .* got 'noise'"),
        ({"method": "magic"}, "method must be one of .* got 'magic'"),
        ({"granularity": "x"}, "granularity must be .* got 'x'"),
        ({"granularity": 3}, "not iterable"),
        ({"granularity": "weight"}, "weights have no activations to replace"),
        ({"granularity": "weight", "ablation": "zero", "method": "gate_ig"}, "scores units, not weights"),
        ({"every_n_epochs": 0}, "every_n_epochs must be an integer of at least 1, got 0"),
        ({"size": 2.0}, r"size must be a number in \[0, 1\], got 2.0"),
        ({"size": float("nan")}, "size must be .* got nan"),
        ({"size": -1}, "size must be an integer of at least 0, got -1"),
        ({"size": True}, "size must be .* got True"),
        ({"size": "all"}, "size must be .* got 'all'"),
        ({"sizes": (0.5, 3.0)}, r"each of sizes must be a number in \[0, 1\], got 3.0"),
        ({"sizes": "all"}, "each of sizes must be .* got 'a'"),
        ({"sizes": 0.5}, "not iterable"),
        ({"method": circuits.AttributionPatching(statistic="geometric")}, "statistic must be one of"),  # of weights
        ({"method": LRP(target="next_token")}, "what is explained is the task's"),
        ({"method": Magnitude()}, "has no scores of a circuit's units"),
        ({"density": 1.0}, r"density must be a number in \(0, 1\), got 1.0"),
        ({"density": "half"}, "density must be .* got 'half'"),
        ({"order": "ascending"}, "order must be one of"),
        ({"normalize": "median"}, "normalize must be one of"),
        ({"rounds": 0}, "rounds must be an integer of at least 1, got 0"),
        ({"rounds": 1.5}, "rounds must be .* got 1.5"),
        ({"batch_size": 0}, "batch_size must be an integer of at least 1, got 0"),
        ({"metric": "loss"}, "metric 'loss' cannot be explained"),
        ({"include": "mlp"}, "include must be a list of name patterns .* got 'mlp'"),
        ({"exclude": [1]}, r"exclude must be a list of name patterns .* got \[1\]"),
        ({"allow_untested": 1}, "allow_untested must be True or False, got 1"),
        ({"held_out": "ioi"}, "held_out must be a task .* got 'ioi'"),
        ({"task": "ioi"}, "task must be a task such as .* got 'ioi'"),
    ],
)
def test_wrong_arguments_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(MisconfigurationException, match=message):
        CircuitDiscovery(**{"task": small_task(), "held_out": held_out(), **options})
