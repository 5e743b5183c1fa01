import apply_patch
import pytest
import torch
from transformers import AutoModelForCausalLM

from lrp_prune import Patch
from tests.support.small_models import build


class Words:
    """A tokenizer of numbers."""

    def __call__(self, text, return_tensors=None):
        ids = torch.tensor([[int(word) for word in text.split()]])
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def decode(self, ids, **options):
        return " ".join(str(int(token)) for token in ids)

    def save_pretrained(self, path):
        self.saved = path


@pytest.mark.slow
@pytest.mark.parametrize("strength", [[], ["--strength", "1"]])
def test_a_patch_from_elsewhere_is_applied_saved_and_reverted(tmp_path, monkeypatch, capsys, strength):
    maker, fresh = build("llama"), build("llama")
    before = {name: value.clone() for name, value in fresh.state_dict().items()}
    name = "model.layers.0.mlp.down_proj.weight"
    patch = Patch.from_positions(maker, {name: torch.arange(40)}, behaviour="something", strength=0.5)
    patch.save(tmp_path / "some.safetensors")
    monkeypatch.setattr(apply_patch, "load_model", lambda _: (fresh, Words()))
    arguments = [
        str(tmp_path / "some.safetensors"),
        "--prompt",
        "1 2 3",
        "--output",
        str(tmp_path / "model"),
        *strength,
    ]
    monkeypatch.setattr("sys.argv", ["apply_patch.py", *arguments])
    apply_patch.main()
    printed = capsys.readouterr().out
    assert f"at strength {1 if strength else 0.5:g}" in printed
    assert "it is the same" in printed
    assert all(torch.equal(value, before[name]) for name, value in fresh.state_dict().items())
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "model").state_dict()[name].view(-1)
    assert torch.equal(saved[:40], before[name].view(-1)[:40] * (0 if strength else 0.5))
    lines = printed.splitlines()
    assert lines[0].removeprefix("before: ") == lines[-1].removeprefix("reverted: ")
