import sys

import plan_memory
import pytest

from tests.support.small_models import build


@pytest.mark.slow
def test_one_row_for_each_number_of_devices(monkeypatch, capsys, tmp_path):
    build("llama").config.save_pretrained(tmp_path)
    monkeypatch.setattr(sys, "argv", ["plan", "--model", str(tmp_path), "--devices", "1", "2", "--tokens", "8"])
    plan_memory.main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split(" | ")[-1] == "training |"
    assert [line.split("|")[2].strip() for line in lines[3:]] == ["1", "2"]


def test_the_known_configurations_are_the_published_sizes():
    sizes = {
        name: sum(parameter.numel() for parameter in _on_meta(config).parameters())
        for name, config in plan_memory.KNOWN.items()
    }
    assert sizes == {"Llama-2-7B": 6_738_415_616, "Llama-3-8B": 8_030_261_248}


def _on_meta(config):
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)
