import itertools

import correction_frontier
import pytest

from lrp_prune import Patch
from tests.support.patches import unchanged, weights
from tests.support.small_models import build


class Letters:
    """A tokenizer of ids that are below the tiny model's vocabulary."""

    def __call__(self, text, **options):
        return {"input_ids": [ord(character) % 40 + 3 for character in text]}

    def __len__(self):
        return 50


def run(monkeypatch, tmp_path, model, *options):
    letters = "abcdefghijklmnopqrstuvwxyz"
    speeches = [". ".join(letters[n:] + letters[:n] + end for n in range(26)) for end in ("one", "two", "six", "ten")]
    monkeypatch.setattr(correction_frontier, "load_model", lambda _: (model, Letters()))
    monkeypatch.setattr(correction_frontier, "load_documents", lambda _: speeches)
    small = ["--windows", "2", "--length", "24", "--samples", "4", "--candidates", "12", "--answer-tokens", "5"]
    small += ["--repetitive", "1", "--output", str(tmp_path), "--sets", "speeches", "copying"]
    monkeypatch.setattr("sys.argv", ["correction_frontier.py", *small, *options])
    correction_frontier.main()


@pytest.mark.slow
def test_the_smallest_within_all_limits_is_chosen_and_tested(monkeypatch, tmp_path, capsys):
    model = build("llama")
    before = weights(model)
    calls = itertools.count()  # each trial repeats less than the one before: what is done with it is tested here
    monkeypatch.setattr(correction_frontier, "uniqueness", lambda answers: [0.3 + 0.05 * next(calls)] * len(answers))
    run(
        monkeypatch,
        tmp_path,
        model,
        "--reduction",
        "0.0001",
        "--allowed",
        "*=9",
        "--amounts",
        "0.01",
        "--strengths",
        "0.5",
        "1",
    )
    printed = capsys.readouterr().out
    assert "general relevance is the mean of speeches, copying" in printed
    patch = Patch.load(tmp_path / "repetition.safetensors")
    assert patch.provenance["side_effects"]["allowed"] == {"*": 9.0}
    assert patch.provenance["references"]["guard_by"]["target"] == "largest of speeches, copying"
    assert patch.provenance["side_effects"]["verdict"] in printed
    assert "uniqueness on " in printed
    for name in ("frontier.png", "frontier.md", "side-effects.md"):
        assert (tmp_path / name).stat().st_size > 100
    assert unchanged(model, before)


@pytest.mark.slow
def test_nothing_within_the_limits_gives_the_frontier_only(monkeypatch, tmp_path, capsys):
    model = build("llama")
    run(monkeypatch, tmp_path, model, "--reduction", "1", "--allowed", "*=0", "--amounts", "0.01")
    assert "none of 2 trials reduces the behaviour by 100.0 % within the limits" in capsys.readouterr().out
    assert not (tmp_path / "repetition.safetensors").exists()


def test_every_option_is_explained(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["correction_frontier.py", "--help"])
    with pytest.raises(SystemExit):
        correction_frontier.parse()
    assert "--strengths" in capsys.readouterr().out
