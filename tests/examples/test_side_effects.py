import pytest
import side_effects

from lrp_prune import Patch
from tests.support.patches import some_patch, unchanged, weights
from tests.support.small_models import build


class Letters:
    """A tokenizer of ids that are below the tiny model's vocabulary; it knows nothing that is copied or decoded."""

    def __call__(self, text, **options):
        return {"input_ids": [ord(character) % 40 + 3 for character in text]}


def arguments(monkeypatch, *given):
    monkeypatch.setattr("sys.argv", ["side_effects.py", *map(str, given)])


@pytest.mark.slow
def test_the_table_the_figure_and_the_description_are_written(monkeypatch, tmp_path, capsys):
    model = build("llama")
    before = weights(model)
    some_patch(model, behaviour="example").save(tmp_path / "patch.safetensors")
    (tmp_path / "mine").mkdir()
    for number in range(4):
        (tmp_path / "mine" / f"{number}.txt").write_text(
            f"the number of this text, which is short, is {number * 1111}" * 3
        )
    monkeypatch.setattr(side_effects, "load_model", lambda _: (model, Letters()))
    options = ["--windows", "2", "--length", "32", "--samples", "4", "--random", "1", "--output", tmp_path / "out"]
    arguments(monkeypatch, tmp_path / "patch.safetensors", *options, "--text", tmp_path / "mine", "--strength", "0.5")
    assert side_effects.main() in (0, 1)
    printed = capsys.readouterr().out
    for name in ("speeches", "source code", "licences", "lists and tables", "mine"):
        assert f"| {name} " in printed
    assert "random weights" in printed
    assert "not measured: copying" in printed
    kept = Patch.load(tmp_path / "patch.safetensors").provenance["side_effects"]
    assert kept["strength"] == 0.5
    assert kept["verdict"] in printed
    assert (tmp_path / "out" / "side-effects.md").read_text().startswith("| entry ")
    assert (tmp_path / "out" / "side-effects.png").stat().st_size > 5000
    assert unchanged(model, before)
    arguments(monkeypatch, tmp_path / "patch.safetensors", *options, "--random", "0", "--allowed", "*=0")
    assert side_effects.main() == 1


def test_limits_are_names_and_shares():
    assert side_effects.limits(["*=0.02", "a=b=0.5"]) == {"*": 0.02, "a=b": 0.5}
    with pytest.raises(ValueError, match="could not convert"):
        side_effects.limits(["copying=much"])
