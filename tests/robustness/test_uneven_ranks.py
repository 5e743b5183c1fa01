"""Processes with different numbers of batches give the relevance of all samples, or all refuse; none waits forever."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lrp_prune import LRP
from lrp_prune.callbacks import RelevanceCollector, RelevancePruning
from tests.robustness.resumable_training import Classifier as Sharded
from tests.support.processes import run
from tests.support.trainers import QUIET

pytestmark = pytest.mark.processes


class Classifier(LightningModule):
    """With buffers, which DDP sends around."""

    def __init__(self, allow_empty: bool = True) -> None:
        super().__init__()
        self.allow_zero_length_dataloader_with_multiple_devices = allow_empty
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Linear(8, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 4))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.net(inputs)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.log("val_loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=0.01)


def samples(count: int, seed: int = 1) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(count, 8, generator=generator)
    return TensorDataset(inputs, inputs[:, :4].argmax(dim=1))


def part(count: int, batch_size: int, begin: int) -> DataLoader:
    return DataLoader(torch.utils.data.Subset(samples(64), range(begin, begin + count)), batch_size)


def trainer_of(callbacks: list[Any], **arguments: Any) -> Trainer:
    defaults = {**QUIET, "use_distributed_sampler": False, "max_epochs": 2}
    devices = {"accelerator": "cpu", "strategy": "auto", "devices": 1}
    if torch.distributed.is_torchelastic_launched():
        devices |= {"strategy": "ddp", "devices": int(os.environ["WORLD_SIZE"])}
    return Trainer(callbacks=callbacks, **{**defaults, **devices, **arguments})


def rank() -> int:
    return int(os.environ["RANK"])


def exact(collector: RelevanceCollector) -> RelevanceCollector:
    """Statistics are else multiplied in bfloat16 where that is faster, and rounded for each batch."""
    collector._collection.running["matmul_dtype"] = "float32"
    return collector


def relevance_of(loaders: Any, trainer: dict[str, Any] | None = None, **arguments: Any) -> Any:
    collector = exact(RelevanceCollector(**arguments))
    trainer_of([collector], **(trainer or {})).validate(Classifier(), loaders, verbose=False)
    return {name: tensor.clone() for name, tensor in collector.relevance.items()}, collector.relevance.num_samples


def assert_close(found: list[Any], expected: Any) -> None:
    for relevance, count in found:
        assert count == expected[1]
        for name, tensor in expected[0].items():
            scale = float(tensor.abs().max())
            torch.testing.assert_close(relevance[name], tensor, rtol=1e-5, atol=1e-5 * scale)


COUNTS = {2: [(20, 8), (6, 4)], 3: [(20, 8), (6, 4), (9, 2)]}


@pytest.mark.parametrize("processes", [2, 3])
@pytest.mark.parametrize("statistic", ["geometric", "signed"])
def test_uneven_batches_equal_one_process(tmp_path: Path, processes: int, statistic: str) -> None:
    """Different numbers of batches, of different sizes: relevance is that of the union of the samples."""
    counts = COUNTS[processes]

    def validate() -> Any:
        begin = sum(count for count, _ in counts[: rank()])
        return relevance_of(part(*counts[rank()], begin), method=LRP(statistic=statistic))

    expected = relevance_of(part(sum(count for count, _ in counts), 5, 0), method=LRP(statistic=statistic))
    assert_close(run(validate, processes, tmp_path), expected)


@pytest.mark.parametrize(("reference", "limit"), [(0, 1.0), (1, 1.0), ("all", 1.0), ("all", 2)])
def test_several_loaders_and_a_limit(tmp_path: Path, reference: int | str, limit: float) -> None:
    def validate() -> Any:
        loaders = [part(16, 4, 16 * rank()), part(4 + 8 * rank(), 4, 32 + 4 * rank())]
        return relevance_of(loaders, {"limit_val_batches": limit}, reference=reference)

    def seen(index: int, process: int) -> range:
        begin, count = ((16 * process, 16), (32 + 4 * process, 4 + 8 * process))[index]
        return range(begin, begin + (count if limit == 1.0 else min(count, 8)))

    indices = [0, 1] if reference == "all" else [int(reference)]
    chosen = [place for index in indices for process in (0, 1) for place in seen(index, process)]
    expected = relevance_of(DataLoader(torch.utils.data.Subset(samples(64), chosen), 4))
    assert_close(run(validate, 2, tmp_path), expected)


class Stream(IterableDataset):
    def __iter__(self) -> Any:
        return iter([samples(8)[place] for place in range(8 if rank() == 1 else 0)])


def test_a_process_whose_stream_is_empty(tmp_path: Path) -> None:
    expected = relevance_of(DataLoader(samples(8), 4))
    assert_close(run(lambda: relevance_of(DataLoader(Stream(), 4)), 2, tmp_path), expected)


def uneven_loader() -> DataLoader:
    return part(8, 4, 0) if rank() == 0 else DataLoader(TensorDataset(torch.zeros(0, 8), torch.zeros(0)), 4)


@pytest.mark.parametrize("stage", ["validate", "fit"])
def test_a_process_without_batches_is_refused_by_all(tmp_path: Path, stage: str) -> None:
    def start() -> Any:
        if stage == "validate":
            return relevance_of(uneven_loader())
        trainer_of([RelevancePruning()]).fit(Classifier(), part(8, 4, 0), uneven_loader())

    for outcome in run(start, 2, tmp_path):
        assert isinstance(outcome, MisconfigurationException), outcome
        assert "rank 1" in str(outcome)
        assert "rank 0: 2; rank 1: 0" in str(outcome)


def test_what_lightning_refuses_in_one_process_ends_all(tmp_path: Path) -> None:
    def start() -> Any:
        trainer_of([RelevancePruning()]).fit(Classifier(allow_empty=False), part(8, 4, 0), uneven_loader())

    first, second = run(start, 2, tmp_path)
    assert "zero length" in str(second)
    assert "rank 1" in str(first) and "zero length" in str(first)


def test_sharded_models_need_equal_numbers_of_batches(tmp_path: Path) -> None:
    """Their forwards are steps of all processes: refused by all before the loop, with the numbers."""

    def start() -> Any:
        strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
        trainer = trainer_of([RelevancePruning(summary=False)], strategy=strategy)
        trainer.fit(Sharded(), part(8, 4, 0), part(8 + 8 * rank(), 4, 0))

    for outcome in run(start, 2, tmp_path):
        assert isinstance(outcome, MisconfigurationException), outcome
        assert "rank 0: 2; rank 1: 4" in str(outcome)
        assert "use_distributed_sampler=True" in str(outcome)


@pytest.mark.parametrize("where", ["validation", "reference"])
def test_an_error_of_one_process_is_raised_by_all(tmp_path: Path, where: str) -> None:
    def start() -> Any:
        data = samples(16)
        if rank() == 1:
            data.tensors[0][5] = float("nan")
        loader = DataLoader(data, 4)
        collector = RelevanceCollector(reference=list(loader) if where == "reference" else 0)
        trainer_of([collector]).validate(Classifier(), loader, verbose=False)

    first, second = run(start, 2, tmp_path)
    assert isinstance(second, FloatingPointError)
    assert isinstance(first, RuntimeError)
    assert "rank 1" in str(first)
    assert "FloatingPointError" in str(first)


def test_a_training_with_uneven_validations_prunes_equally(tmp_path: Path) -> None:
    def train() -> Any:
        pruning = RelevancePruning(sparsity=0.5, summary=False)
        module = Classifier()
        trainer_of([pruning], max_epochs=3).fit(module, part(16, 4, 16 * rank()), part(4 + 8 * rank(), 4, 32))
        assert pruning.masks is not None
        return pruning.masks.checksum(), {name: tensor.clone() for name, tensor in module.named_parameters()}

    (first, weights), (second, others) = run(train, 2, tmp_path)
    assert first == second
    assert all(torch.equal(weights[name], others[name]) for name in weights)


@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_collection_leaves_the_training_bit_for_bit(tmp_path: Path, accumulate: int) -> None:
    """Also in an accumulation window: final weights, and ``.grad`` before and after each validation."""

    def train(callbacks: list[Any]) -> Any:
        torch.manual_seed(0)
        module, gradients = Classifier(), []

        class Watch(ModelCheckpoint):  # runs last
            def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
                found = [parameter.grad for parameter in pl_module.parameters()]
                gradients.append([None if gradient is None else gradient.clone() for gradient in found])

        trainer_of(
            [*callbacks, Watch(tmp_path)],
            enable_checkpointing=True,
            accumulate_grad_batches=accumulate,
            val_check_interval=2,
            max_epochs=2,
        ).fit(module, part(32, 4, 32 * rank()), part(8, 4, 8 * rank()))
        return [parameter.detach().clone() for parameter in module.parameters()], gradients

    def both() -> Any:
        return train([]), train([RelevanceCollector()])

    for (weights, gradients), (others, same) in run(both, 2, tmp_path):
        assert all(torch.equal(one, two) for one, two in zip(weights, others, strict=True))
        assert accumulate == 1 or any(gradient is not None for gradient in gradients[1])
        for one, two in zip(gradients, same, strict=True):
            for mine, theirs in zip(one, two, strict=True):
                assert (mine is None) == (theirs is None)
                assert mine is None or torch.equal(mine, theirs)
