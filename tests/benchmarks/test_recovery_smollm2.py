import argparse
from pathlib import Path
from typing import Any

import language_model
import pytest
import torch

from tests.benchmarks import recovery_smollm2 as recovery
from tests.support.small_models import llama


@pytest.fixture
def options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> argparse.Namespace:
    def load(_: str) -> tuple[Any, None]:
        torch.manual_seed(0)
        return llama(hidden_size=32, intermediate_size=64, num_attention_heads=4, num_key_value_heads=2).eval(), None

    monkeypatch.setattr(language_model, "load_model", load)
    given = {"model": "", "text": "speeches", "sparsity": 0.5, "seconds": 1.0, "rate": 1e-2, "adapter_rate": 3.0}
    return argparse.Namespace(**given, rank=4, seed=0, output=tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("way", recovery.WAYS)
def test_each_way_learns_and_keeps_its_zeros(way: str, options: argparse.Namespace) -> None:
    pytest.importorskip("peft")
    ids = torch.arange(24).repeat(4, 1) % 13
    row = recovery.measured(way, {"calibration": ids, "training": ids, "test": ids}, options)
    assert row["steps"] > 1
    assert row["after"] < row["before"]
    again = recovery.measured(way, {"calibration": ids, "training": ids, "test": ids}, options)
    assert again["before"] == row["before"], "the pruned model was read from its file"


def test_the_table_says_how_far_each_row_is_from_the_dense_one() -> None:
    rows = [
        {"way": "dense", "before": 20.0, "after": 10.0, "steps": 9},
        {"way": "pruned", "before": 30.0, "after": 11.0, "steps": 8},
    ]
    lines = recovery.table(rows).splitlines()
    assert lines[2:] == ["| dense | 20.00 | 10.00 |  | 9 |", "| pruned | 30.00 | 11.00 | +10.0% | 8 |"]
