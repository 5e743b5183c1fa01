import argparse

import correct_repetition
import pytest
import torch

from lrp_prune import Patch
from tests.support.small_models import build


def test_uniqueness_is_of_generated_tokens_only():
    assert correct_repetition.uniqueness([[1, 1, 1, 1], [0, 1], [5, 6, 5]]) == pytest.approx([0.25, 1.0, 2 / 3])


def test_prompts_with_repetitive_answers_are_kept(monkeypatch):
    answers = [[1, 1, 1, 1], [1, 2, 3, 4], [], [2, 2, 3, 3]]
    monkeypatch.setattr(correct_repetition, "generate", lambda *_: answers)
    options = argparse.Namespace(answer_tokens=4, repetitive=0.5)
    prompts = [[10], [11], [12], [13]]
    assert correct_repetition.repetitive(None, prompts, options) == ([[10], [13]], [answers[0], answers[3]])
    with pytest.raises(ValueError, match="--candidates"):
        correct_repetition.repetitive(None, prompts, argparse.Namespace(answer_tokens=4, repetitive=0.25))


class Letters:
    """A tokenizer of ids that are below the tiny model's vocabulary."""

    def __call__(self, text, **options):
        return {"input_ids": [ord(character) % 40 + 3 for character in text]}

    def decode(self, ids, **options):
        return " ".join(str(token) for token in ids)


@pytest.mark.slow
def test_the_whole_example_on_a_tiny_model(monkeypatch, tmp_path, capsys):
    model = build("llama")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    letters = "abcdefghijklmnopqrstuvwxyz"
    speeches = [". ".join(letters[n:] + letters[:n] + end for n in range(26)) for end in ("one", "two", "six", "ten")]
    monkeypatch.setattr(correct_repetition, "load_model", lambda _: (model, Letters()))
    monkeypatch.setattr(correct_repetition, "load_documents", lambda _: speeches)
    arguments = ["--quick", "--window", "16", "--repetitive", "1", "--prompt-tokens", "5", "--answer-tokens", "6"]
    arguments += ["--amount", "0.01", "--further", "0.01", "--compare", "gradient", "--output", str(tmp_path)]
    monkeypatch.setattr("sys.argv", ["correct_repetition.py", *arguments])
    correct_repetition.main()
    printed = capsys.readouterr().out
    for line in ("| before ", "| round 2", "| random, same number ", "answers are still repetitive"):
        assert line in printed
    patch = Patch.load(tmp_path / "repetition.safetensors")
    assert patch.provenance["strength"] == 0.5
    assert patch.provenance["side_effects"]["verdict"] in printed
    assert "| source code " in (tmp_path / "side-effects.md").read_text()
    assert (tmp_path / "side-effects.png").stat().st_size > 5_000
    assert (tmp_path / "trade-off.png").stat().st_size > 10_000
    assert "| round 1" in (tmp_path / "table.md").read_text()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_every_option_is_explained(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["correct_repetition.py", "--help"])
    with pytest.raises(SystemExit):
        correct_repetition.parse()
    text = capsys.readouterr().out
    for option in (
        "--candidates",
        "--composite",
        "--compare",
        "--amount",
        "--strength",
        "--guard",
        "--seeds",
        "--quick",
    ):
        assert f"{option} " in text
