"""Two processes collect what one collects on all samples, prune the same, and keep the zeros."""

import pickle
from pathlib import Path

import pytest
import torch

from lrp_prune.callbacks import RelevanceCollector, RelevancePruning
from tests.support.trainers import forked

pytestmark = pytest.mark.processes


@pytest.mark.slow
@pytest.mark.parametrize("reference", [False, True], ids=["validation", "reference"])
def test_two_processes_equal_one(
    make_module, make_loader, make_trainer, count_zeros, tmp_path: Path, reference
) -> None:
    def run(devices: int, module: torch.nn.Module, path: Path) -> None:
        data = make_loader(seed=5) if reference else 0
        collector = RelevanceCollector(reference=data)
        pruning = RelevancePruning(sparsity=0.5, scope="global", reference=data)
        strategy = forked() if devices > 1 else "auto"
        trainer = make_trainer(callbacks=[collector], devices=devices, strategy=strategy, max_epochs=2)
        trainer.callbacks.append(pruning)
        trainer.callbacks.append(Save(path, collector, pruning))
        trainer.fit(module, make_loader(), make_loader(seed=2))

    from lightning.pytorch import Callback

    class Save(Callback):
        def __init__(self, path: Path, collector: RelevanceCollector, pruning: RelevancePruning) -> None:
            self.path, self.collector, self.pruning = path, collector, pruning

        def on_train_start(self, trainer, pl_module) -> None:
            self.zeros = []

        def on_validation_end(self, trainer, pl_module) -> None:
            if not trainer.sanity_checking and trainer.current_epoch == 0:
                found = {name: tensor.clone() for name, tensor in self.collector.relevance.items()}
                samples = self.collector.relevance.num_samples
                (self.path.with_suffix(f".{trainer.global_rank}.relevance")).write_bytes(pickle.dumps((found, samples)))

        def on_train_epoch_end(self, trainer, pl_module) -> None:
            self.zeros.append(count_zeros(pl_module))
            state = (self.zeros, self.pruning.masks and self.pruning.masks.checksum())
            (self.path.with_suffix(f".{trainer.global_rank}.masks")).write_bytes(pickle.dumps(state))

    # Training is to change nothing, so that the first validation of both is of the same model.
    one, two = make_module(optimizer="none"), make_module(optimizer="none")
    one.net[1].momentum = two.net[1].momentum = 0.0
    run(1, one, tmp_path / "one")
    run(2, two, tmp_path / "two")
    relevance, samples = pickle.loads((tmp_path / "one.0.relevance").read_bytes())
    for rank in (0, 1):
        theirs, their_samples = pickle.loads((tmp_path / f"two.{rank}.relevance").read_bytes())
        assert their_samples == samples
        for name in relevance:
            # Batches are divided differently, and statistics may be multiplied in bfloat16.
            torch.testing.assert_close(theirs[name], relevance[name], rtol=1e-2, atol=1e-4)
    first, second = (pickle.loads((tmp_path / f"two.{rank}.masks").read_bytes()) for rank in (0, 1))
    assert first == second
    assert first[0][1] == (8 * 24 + 24 * 16 + 16 * 4) // 2
