"""Collecting under DDP against processes that know nothing of each other, on the same samples: the ratio of their times.

    python tests/benchmarks/ddp.py --processes 2 --rounds 12

Both kinds run the same Lightning validation with a ``RelevanceCollector``, all processes at the same time; what DDP adds is the
one reduction at the end. The kinds take turns, and the slowest process of each counts. Where other programs share the machine,
the processor's time says more than the wall clock.
"""

import argparse
import os
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[2]))

import torch
import transformers
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.plugins.environments import LightningEnvironment
from torch.utils.data import DataLoader

from lrp_prune.callbacks import RelevanceCollector
from tests.support.processes import run


class LanguageModel(LightningModule):
    """A Llama with random weights."""

    def __init__(self, hidden: int, layers: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        sizes = {"hidden_size": hidden, "intermediate_size": 4 * hidden, "num_hidden_layers": layers}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 512}
        self.model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads))

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Nothing: only the collection is measured."""


class Stopwatch(Callback):
    """Seconds, and seconds of the processor, from the first batch until the relevance is there; all begin together."""

    def __init__(self, barrier: Any) -> None:
        self.barrier = barrier
        self.times: list[tuple[float, float]] = []

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.barrier.wait()
        self._began = time.perf_counter(), time.process_time()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        wall, processor = self._began
        self.times.append((time.perf_counter() - wall, time.process_time() - processor))


def trainer_of(distributed: bool, stopwatch: Stopwatch, processes: int) -> Trainer:
    """Both kinds live in the same processes; the one that knows of no others has an environment of its own."""
    kind = (
        {"strategy": "ddp", "devices": processes}
        if distributed
        else {"devices": 1, "plugins": [LightningEnvironment()]}
    )
    return Trainer(
        accelerator="cpu",
        callbacks=[RelevanceCollector(), stopwatch],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        use_distributed_sampler=False,
        **kind,
    )


def measure(barrier: Any, given: argparse.Namespace) -> dict[bool, list[tuple[float, float]]]:
    """Seconds of this process's collections in turns, by whether they were distributed."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(int(os.environ["RANK"]))
    tokens = torch.randint(512, (given.batches * given.batch_size, given.tokens), generator=generator)
    loader = DataLoader([{"input_ids": row, "labels": row} for row in tokens], given.batch_size)
    module = LanguageModel(given.hidden, given.layers)
    seconds = {distributed: Stopwatch(barrier) for distributed in (True, False)}
    trainers = {kind: trainer_of(kind, stopwatch, given.processes) for kind, stopwatch in seconds.items()}
    for index in range(given.rounds + 1):
        for distributed in ((True, False), (False, True))[index % 2]:
            trainers[distributed].validate(module, loader, verbose=False)
            expected = given.batches * given.batch_size * (given.processes if distributed else 1)
            assert trainers[distributed].callbacks[0].relevance.num_samples == expected
    return {
        kind: stopwatch.times[1:]  # without the first
        for kind, stopwatch in seconds.items()
    }


def slowest(outcomes: list[dict[bool, list[tuple[float, float]]]], distributed: bool, place: int) -> list[float]:
    """Of each round, the time of the process that took longest."""
    return [
        max(time[place] for time in times) for times in zip(*(found[distributed] for found in outcomes), strict=True)
    ]


def interval(values: list[float], draws: int = 2000) -> tuple[float, float]:
    """The bootstrap's 95 % interval of the median."""
    dice = random.Random(0)
    medians = sorted(statistics.median(dice.choices(values, k=len(values))) for _ in range(draws))
    return medians[int(0.025 * draws)], medians[int(0.975 * draws)]


def main() -> None:
    """Measure in turns and print the ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {"processes": 2, "rounds": 12, "batches": 16, "batch_size": 4}.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default)
    for name, default in {"tokens": 128, "hidden": 256, "layers": 4}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    given = parser.parse_args()
    barrier = torch.multiprocessing.get_context("fork").Barrier(given.processes)
    with tempfile.TemporaryDirectory() as directory:
        outcomes = run(lambda: measure(barrier, given), given.processes, Path(directory), limit=3600.0)
    for outcome in outcomes:
        if isinstance(outcome, Exception):
            raise outcome
    for place, what in enumerate(("wall clock", "processor")):
        with_ddp, alone = (slowest(outcomes, kind, place) for kind in (True, False))
        ratios = [one / other for one, other in zip(with_ddp, alone, strict=True)]
        low, high = interval(ratios)
        print(
            f"{what:<10} DDP {statistics.median(with_ddp):.3f} s, independent {statistics.median(alone):.3f} s, "
            f"ratio {statistics.median(ratios):.3f} [{low:.3f}, {high:.3f}] over {given.rounds} rounds"
        )


if __name__ == "__main__":
    main()
