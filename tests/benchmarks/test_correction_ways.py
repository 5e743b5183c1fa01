import json
from pathlib import Path

import pytest
import torch

from tests.benchmarks import correction_ways
from tests.examples.test_correction_frontier import Letters
from tests.support.patches import unchanged, weights
from tests.support.small_models import build

SIZES = ["--windows", "2", "--length", "24", "--samples", "4", "--candidates", "12", "--answer-tokens", "5"]


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> torch.nn.Module:
    letters = "abcdefghijklmnopqrstuvwxyz"
    speeches = [". ".join(letters[n:] + letters[:n] + end for n in range(26)) for end in ("one", "two", "six", "ten")]
    model = build("llama")
    monkeypatch.setattr(correction_ways, "load_model", lambda _: (model, Letters()))
    monkeypatch.setattr(correction_ways, "load_documents", lambda: speeches)
    return model


@pytest.mark.slow
def test_every_way_is_measured_once_and_the_model_is_as_before(model, tmp_path: Path, capsys) -> None:
    before = weights(model)
    file = tmp_path / "results.jsonl"
    given = [*SIZES, "--repetitive", "1", "--amount", "0.02", "--steps", "3", "--output", str(file)]
    correction_ways.main([*given, "--strengths", "0.5"])
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [row["way"] for row in rows].count("strengths learned") == 2  # one for each penalty
    assert {row["way"] for row in rows} == {"before", *correction_ways.WAYS}
    assert unchanged(model, before)
    entries = {row["way"]: row["weights"] for row in rows}
    assert (
        entries["no guard"]
        == entries["usual"]
        == entries["guard by the mean over sets"]
        > entries["attention only"]
        > 0
    )
    assert entries["half as many weights"] == pytest.approx(entries["usual"] / 2, abs=1)
    assert entries["neurons"] >= entries["usual"]
    assert all(value == 0 for name, value in rows[0]["changes"].items() if name != "repeated")
    printed = capsys.readouterr().out
    correction_ways.main(given)
    assert len(file.read_text().splitlines()) == len(rows)  # nothing is measured again
    assert "| strengths learned" in printed and "| heads" in printed


@pytest.mark.slow
def test_learned_strengths_lower_what_they_are_learned_for(model) -> None:
    """Without a penalty the margin by which tokens are repeated falls below that of one strength for all."""
    options = correction_ways.parse([*SIZES, "--repetitive", "1"])
    setup = correction_ways.Setup(options)
    (_, patch), *_ = correction_ways.patches(setup, ["usual"], 0.05)
    margin = correction_ways.RepetitionMargin()

    def repeats(strengths) -> float:
        with correction_ways.weakened(model, patch, strengths), torch.no_grad():
            return sum(float(margin(model, batch)) for batch in setup.repeating)

    learned = correction_ways.learned_strengths(setup, patch, 0.5, 30, 0.0)
    same = {name: torch.full_like(values, 0.5) for name, values in learned.items()}
    assert all(bool(((values >= 0) & (values <= 1)).all()) for values in learned.values())
    assert any(not torch.equal(values, same[name]) for name, values in learned.items())
    assert repeats(learned) < repeats(same)
    assert all(parameter.requires_grad for parameter in model.parameters())
