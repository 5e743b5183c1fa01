import argparse
from pathlib import Path

import pytest
import shrink_smollm2
import torch
from transformers import LlamaForCausalLM

from tests.support.small_models import llama


class Tokenizer:
    def save_pretrained(self, folder: Path) -> None:
        (folder / "tokenizer.json").write_text("{}")


@pytest.mark.slow
def test_what_is_left_is_smaller_and_loads_plainly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = llama(intermediate_size=40).eval()
    monkeypatch.setattr(shrink_smollm2, "load_model", lambda name: (model, Tokenizer()))
    monkeypatch.setattr(shrink_smollm2, "load_documents", lambda name: ["a", "b", "c", "d", "e"])
    monkeypatch.setattr(
        shrink_smollm2,
        "windows",
        lambda documents, tokenizer, count, length, seed=0: torch.randint(26, (count, length)),
    )
    found = shrink_smollm2.main(["--quick", "--multiple-of", "4", "--output", str(tmp_path)])
    assert found["shrunk"] == pytest.approx(found["masked"], rel=1e-4)
    assert found["loaded"] == found["shrunk"] and found["times faster"] > 0 and found["prompt"] > 0
    assert "24 of 80 neurons taken out" in capsys.readouterr().out
    again = LlamaForCausalLM.from_pretrained(tmp_path)
    assert again.config.intermediate_size == 28 and again.model.layers[1].mlp.up_proj.out_features == 28


def test_a_short_run_is_short() -> None:
    assert shrink_smollm2.parse([]).calibration_windows == 8
    quick: argparse.Namespace = shrink_smollm2.parse(["--quick", "--sparsity", "0.5"])
    assert (quick.calibration_windows, quick.window, quick.runs, quick.sparsity) == (2, 64, 2, 0.5)
