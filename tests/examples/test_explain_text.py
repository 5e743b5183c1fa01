import explain_text
import pytest

from lrp_prune import Explanation
from tests.support.small_models import build
from tests.support.words import of_pieces


@pytest.mark.slow
def test_pages_and_figures_are_written(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(explain_text, "load_model", lambda _: (build("llama"), of_pieces()))
    given = ["--text", "the unlikely end", "--answer", "end", "--other", "the", "--output", str(tmp_path)]
    monkeypatch.setattr("sys.argv", ["explain_text.py", *given])
    explain_text.main()
    printed = capsys.readouterr().out
    assert "explains the logit of 'end' minus the logit of 'the'" in printed
    assert "unlikely" in printed and "most by head" in printed and "area" in printed
    for name in ("answer.png", "layers.png", "difference.png", "heads.png", "faithfulness.png"):
        assert (tmp_path / name).stat().st_size > 5000
    assert "like</span>" in (tmp_path / "answer.html").read_text() and (tmp_path / "difference.html").exists()
    kept = Explanation.load(tmp_path / "answer.safetensors")
    assert list(kept.layers) == ["model.layers.0", "model.layers.1"] and kept.target == "the logit of 'end'"


@pytest.mark.parametrize(("name", "found"), [("llama", "model.layers"), ("gpt2", "transformer.h")])
def test_layers_are_found_whatever_they_are_called(name, found):
    model = build(name)
    assert explain_text.layers(model) == [f"{found}.0", f"{found}.1"]
    assert explain_text.layers(model, most=1) == [f"{found}.0"]
