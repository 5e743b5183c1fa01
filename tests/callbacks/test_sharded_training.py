"""Trainings on sharded weights: the same relevance, masks, zeros and resumes as in one process."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy

from lrp_prune.callbacks import RelevanceCollector, RelevancePruning
from tests.robustness.resumable_training import Classifier
from tests.support.sharding import results, whole
from tests.support.still import Still, Uneven, loader
from tests.support.trainers import sharded_trainer as trainer

pytestmark = pytest.mark.processes


class Zeros(Callback):
    """Counts, after each step, pruned weights, gradients and moments that are not zero."""

    def __init__(self, pruning: RelevancePruning) -> None:
        self.pruning, self.wrong, self.checked = pruning, 0, 0

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: Any, optimizer: Any) -> None:
        self._count(pl_module, [parameter.grad for parameter in self._parameters(pl_module)])

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        parameters = self._parameters(pl_module)
        self._count(pl_module, parameters)
        moments = [trainer.optimizers[0].state.get(parameter, {}).get("exp_avg") for parameter in parameters]
        self._count(pl_module, moments)

    def _parameters(self, pl_module: Any) -> list[Any]:
        return [pl_module.get_parameter(name) for name in self.pruning.masks or {}]

    def _count(self, pl_module: Any, tensors: list[Any]) -> None:
        for name, tensor in zip(self.pruning.masks or {}, tensors, strict=True):
            if tensor is not None:
                here = tensor.to_local() if hasattr(tensor, "to_local") else tensor
                self.wrong += int(here[~self.pruning.masks.local(name)].count_nonzero())
                self.checked += 1


def collected_and_pruned(processes: int, directory: Path, **pruning: Any) -> Any:
    data = pruning.get("reference", 0)
    collector = RelevanceCollector(reference=data)
    pruner = RelevancePruning(sparsity=0.5, rounds=2, summary=False, **pruning)
    trainer(processes, directory, max_epochs=3, callbacks=[collector, pruner]).fit(Still(), loader(), loader(seed=2))
    assert abs(pruner.masks.sparsity - 0.5) < 1e-3
    relevance = {name: whole(tensor) for name, tensor in collector.relevance.items()}
    masks = pruner.masks.gathered()
    return relevance, collector.relevance.num_samples, masks.state_dict(), pruner.round


@pytest.mark.parametrize("options", [{}, {"scope": "row"}, {"granularity": "neuron"}, {"reference": True}], ids=str)
def test_sharded_trainings_prune_what_one_process_prunes(tmp_path: Path, options: dict[str, Any]) -> None:
    if "reference" in options:
        options = {"reference": loader(16, seed=5)}
    (expected,) = results(lambda: collected_and_pruned(1, tmp_path / "one", **options), 1, tmp_path / "one")
    for processes in (2, 3) if not options else (2,):
        directory = tmp_path / str(processes)

        def call(processes: int = processes, directory: Path = directory) -> Any:
            return collected_and_pruned(processes, directory, **options)

        for relevance, samples, masks, done in results(call, processes, directory):
            assert (samples, done) == (expected[1], expected[3])
            for name, tensor in expected[0].items():
                torch.testing.assert_close(relevance[name], tensor, rtol=1e-2, atol=1e-4)  # products may be bfloat16
            different = sum(int((masks["bits"][n] != bits).sum()) for n, bits in expected[2]["bits"].items())
            assert different == 0


def recalibrated(processes: int, directory: Path, strategy: str | None = None, **options: Any) -> Any:
    """What a round leaves."""
    found: dict[str, torch.Tensor] = {}

    class Seen(Callback):
        def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if pruner.round == 1 and not found:
                found.update({name: whole(value).clone() for name, value in pl_module.state_dict().items()})

    pruner = RelevancePruning(sparsity=0.6, summary=False, recalibrate=True, **options)
    arguments = {} if strategy is None else {"strategy": strategy}
    made = trainer(processes, directory, max_epochs=2, callbacks=[pruner, Seen()], **arguments)
    module = Uneven()
    dense = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    made.fit(module, loader(), loader(seed=2))
    masks = pruner.masks.gathered()
    assert all(not found[name][~mask].any() for name, mask in masks.items())
    kept = [found[name][mask] / dense[name][mask] for name, mask in masks.items()]
    assert any((scale - 1).abs().max() > 1e-3 for scale in kept)
    return {name: value for name, value in found.items() if "num_batches" not in name}


@pytest.mark.parametrize("options", [{"method": "magnitude", "reference": True}, {}], ids=str)
def test_sharded_trainings_recalibrate_as_others_do(tmp_path: Path, options: dict[str, Any]) -> None:
    """With reference data as one process, with a validation's batches as processes with a whole model each."""
    given = {**options, "reference": loader(64, seed=5)} if "reference" in options else options
    if "reference" in options:
        expected = results(lambda: recalibrated(1, tmp_path / "one", **given), 1, tmp_path / "one")[0]
    else:
        expected = results(lambda: recalibrated(2, tmp_path / "ddp", "ddp", **given), 2, tmp_path / "ddp")[0]
    for found in results(lambda: recalibrated(2, tmp_path / "two", **given), 2, tmp_path / "two"):
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=1e-4, msg=name)


def test_recalibrating_after_a_validation_in_inference_mode(tmp_path: Path) -> None:
    """A method without data goes through the model for the first time when it recalibrates."""

    def call() -> bool:
        data = loader(32, seed=5)
        pruner = RelevancePruning(0.6, method="magnitude", reference=data, summary=False, recalibrate=True)
        made = trainer(2, tmp_path, max_epochs=2, callbacks=[pruner], num_sanity_val_steps=0)
        module = Uneven()
        made.validate(module, loader(seed=2), verbose=False)
        made.fit(module, loader(), loader(seed=2))
        before, masks = dict(Uneven().named_parameters()), pruner.masks.gathered()
        return any(not torch.equal(whole(module.get_parameter(name)), before[name] * masks[name]) for name in masks)

    assert results(call, 2, tmp_path) == [True, True]


@pytest.mark.parametrize(("precision", "accumulate"), [("32-true", 2), ("bf16-mixed", 1), ("bf16-true", 1)])
def test_zeros_stay_in_weights_gradients_and_moments(tmp_path: Path, precision: str, accumulate: int) -> None:
    def train() -> Any:
        pruning = RelevancePruning(sparsity=0.7, scope="global", summary=False)
        zeros = Zeros(pruning)
        made = trainer(
            2,
            tmp_path,
            precision=precision,
            accumulate_grad_batches=accumulate,
            max_epochs=3,
            gradient_clip_val=0.1,
            gradient_clip_algorithm="norm",
            callbacks=[pruning, zeros],
        )
        module = Classifier()
        made.fit(module, loader(), loader(seed=2))
        pruned = sum(int((whole(module.get_parameter(name)) == 0).sum()) for name in pruning.masks)
        return zeros.wrong, zeros.checked, pruned, pruning.masks.num_pruned

    for wrong, checked, pruned, expected in results(train, 2, tmp_path):
        assert wrong == 0 and checked > 20
        assert pruned >= expected == round(0.7 * (8 * 24 + 24 * 16 + 16 * 4))


def test_collecting_leaves_a_training_as_it_is(tmp_path: Path) -> None:
    """A validation in the middle of accumulation windows."""

    def train(collect: bool) -> Any:
        callbacks = [RelevanceCollector(), RelevanceCollector(granularity="neuron")] if collect else []
        made = trainer(2, tmp_path, max_epochs=2, accumulate_grad_batches=4, val_check_interval=3, callbacks=callbacks)
        module = Classifier()
        torch.manual_seed(1)
        made.fit(module, loader(), loader(seed=2))
        return [whole(parameter) for parameter in module.parameters()]

    (plain, _), (collected, _) = (results(lambda on=on: train(on), 2, tmp_path / str(on)) for on in (False, True))
    assert all(torch.equal(first, second) for first, second in zip(plain, collected, strict=True))


def test_validating_alone_leaves_inference_mode(tmp_path: Path) -> None:
    def validate(processes: int, **options: Any) -> Any:
        collector = RelevanceCollector(**options)
        trainer(processes, tmp_path, callbacks=[collector]).validate(Still(), loader(seed=2), verbose=False)
        collector.relevance.save(tmp_path / f"{processes}.safetensors")
        return {name: whole(tensor) for name, tensor in collector.relevance.items()}, collector.relevance.num_samples

    for options in ({}, {"reference": loader(8, seed=5)}):
        (expected,) = results(lambda options=options: validate(1, **options), 1, tmp_path)
        for found in results(lambda options=options: validate(2, **options), 2, tmp_path):
            assert found[1] == expected[1]
            for name, tensor in expected[0].items():
                torch.testing.assert_close(found[0][name], tensor, rtol=1e-2, atol=1e-4)


class Diary(Callback):
    """What is pruned when a training begins, and when it writes a checkpoint, after which it stops."""

    def __init__(self, pruning: RelevancePruning, file: Path | None) -> None:
        self.pruning, self.file, self.begun, self.written = pruning, file, None, None

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        if self.pruning.masks is not None:
            bits = sum(self.pruning.masks.bits(name).numel() for name in self.pruning.masks)
            self.begun = (self.pruning.round, self.pruning.masks.checksum(), bits)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        if self.file is not None and trainer.current_epoch == 1:
            trainer.save_checkpoint(self.file)
            self.written = (self.pruning.round, self.pruning.masks.checksum())
            trainer.should_stop = True


@pytest.mark.parametrize("whole_file", [True, False], ids=["full", "sharded"])
def test_a_checkpoint_resumes_on_any_number_of_processes(tmp_path: Path, whole_file: bool) -> None:
    entries = 8 * 24 + 24 * 16 + 16 * 4

    def fit(processes: int, resume: Path | None, file: Path | None = None) -> Any:
        pruning = RelevancePruning(sparsity=0.6, rounds=3, scope="global", summary=False)
        diary = Diary(pruning, file)
        saving = {"save_distributed_checkpoint": not whole_file}
        arguments = {"saving": saving} if processes > 1 else {}
        made = trainer(processes, tmp_path, max_epochs=4, callbacks=[pruning, diary], **arguments)
        module = Classifier()
        made.fit(module, loader(), loader(seed=2), ckpt_path=resume, weights_only=True)
        masks = pruning.masks.gathered()
        zeros = sum(int((whole(module.get_parameter(name)) == 0).sum()) for name in masks)
        return diary.begun, diary.written, pruning.round, zeros >= masks.num_pruned

    file = tmp_path / "half.ckpt"
    (begun, written, *_), _ = results(lambda: fit(2, None, file), 2, tmp_path / "first")
    assert begun is None and written[0] == 1
    for processes in (1, 2, 3) if whole_file else (2, 3):
        found = results(lambda n=processes: fit(n, file), processes, tmp_path / f"on{processes}")
        for begun, _, done, zeros in found:
            assert begun[:2] == written
            assert done == 3 and zeros
        assert sum(begun[2] for begun, *_ in found) <= entries / 8 + 3 * processes  # each has its own part's bits only


def test_different_masks_stop_the_run_and_are_named(tmp_path: Path) -> None:
    def fit(processes: int, **arguments: Any) -> Any:
        class Wrong(RelevancePruning):
            def _prune(self, trainer: Trainer, pl_module: Any, log: bool) -> None:
                masks = self._pruner.state.pending
                if trainer.global_rank == 1:
                    masks._pruned["net.4.weight"] = 7
                    masks._bits["net.4.weight"] = ~masks._bits["net.4.weight"]
                super()._prune(trainer, pl_module, log)

        pruning = Wrong(sparsity=0.5, summary=False)
        with pytest.raises(RuntimeError) as error:
            trainer(processes, tmp_path, max_epochs=2, callbacks=[pruning], **arguments).fit(
                Still(), loader(), loader(seed=2)
            )
        return str(error.value)

    for arguments in ({}, {"strategy": "ddp"}):
        for message in results(lambda arguments=arguments: fit(2, **arguments), 2, tmp_path):
            assert "'net.4.weight' is the first that differs" in message and "7 of (16, 24) pruned" in message


def test_other_ways_of_sharding_are_refused_by_name(tmp_path: Path) -> None:
    def refused(callback: Any, strategy: Any) -> str:
        with pytest.raises(MisconfigurationException) as error:
            trainer(2, tmp_path, max_epochs=1, callbacks=[callback], strategy=strategy).fit(Still(), loader(), loader())
        return str(error.value)

    def call() -> str:
        return refused(RelevancePruning(), ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=2))

    for message in results(call, 2, tmp_path):
        assert "ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)" in message


def test_fsdp1_and_deepspeed_are_refused_in_setup() -> None:
    from types import SimpleNamespace

    from lightning.pytorch.strategies import DeepSpeedStrategy

    for kind in (FSDPStrategy, DeepSpeedStrategy):
        strategy = kind.__new__(kind)
        strategy._launcher = None
        pretended = SimpleNamespace(strategy=strategy, world_size=2)
        for callback in (RelevancePruning(), RelevanceCollector()):
            with pytest.raises(MisconfigurationException, match=r"ModelParallelStrategy\(.*fully_shard"):
                callback.setup(pretended, Still(), "fit")
