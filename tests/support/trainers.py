"""Trainers that write nothing, and trainers of models that shard themselves."""

import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy

from tests.support.sharding import device_type

QUIET: dict[str, Any] = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


def quiet_trainer(directory: Path, **arguments: Any) -> Trainer:
    """A trainer of one process."""
    defaults = {"accelerator": "cpu", "devices": 1, "default_root_dir": directory, "log_every_n_steps": 1}
    return Trainer(**{**QUIET, **defaults, **arguments})


def forked() -> DDPStrategy:
    """What ``"ddp_fork"`` stands for, with four minutes in place of thirty to wait for a process that does not come."""
    return DDPStrategy(start_method="fork", timeout=timedelta(minutes=4))


def sharded_trainer(processes: int, directory: Path, saving: dict[str, Any] | None = None, **arguments: Any) -> Trainer:
    """A trainer of a model that shards itself, where there are several processes; to be made in each of them.

    Args:
        processes: how many there are.
        directory: where it writes to.
        saving: of the strategy: how checkpoints are written.
        **arguments: of the trainer.
    """
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    if processes > 1:
        sizes = {"data_parallel_size": processes, "tensor_parallel_size": 1}
        arguments.setdefault("strategy", ModelParallelStrategy(**sizes, **(saving or {})))
    accelerator = "gpu" if device_type(processes) == "cuda" else "cpu"
    defaults = {"accelerator": accelerator, "devices": processes, "default_root_dir": directory}
    return Trainer(**{**QUIET, **defaults, **arguments})
