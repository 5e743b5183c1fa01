import json
from pathlib import Path

import find_ioi_circuit
import pytest
import torch

from lrp_prune import circuits
from tests.support.circuit_tasks import ioi_model

MODEL, TOKENIZER = ioi_model()


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(find_ioi_circuit, "load_model", lambda name: (MODEL, TOKENIZER))
    monkeypatch.setattr("sys.argv", ["find_ioi_circuit.py", "--quick", "--sizes", "0.1", "0.5", "1", *arguments])
    find_ioi_circuit.main()


@pytest.mark.slow
def test_everything_is_written_and_the_model_unchanged(monkeypatch, tmp_path: Path, capsys) -> None:
    before = {name: value.clone() for name, value in MODEL.state_dict().items()}
    run(monkeypatch, "--gates", "--output", str(tmp_path))
    text = capsys.readouterr().out
    for ablation in ("counterfactual", "zero"):
        rows = (tmp_path / f"{ablation}.md").read_text().splitlines()[3:]
        names = [row.split("|")[1].strip() for row in rows]
        assert names == ["attnlrp", "random", "attribution patching, 2 rounds", "gates from attribution patching"]
        assert all(row.count("±") == 6 and row in text for row in rows)
        html = (tmp_path / f"{ablation}.html").read_text()
        assert f"{ablation} ablation" in html and all(name in html for name in names)
    assert all(torch.equal(value, before[name]) for name, value in MODEL.state_dict().items())
    # With random weights a circuit of everything is needed, or less by chance: it is saved either way.
    saved = circuits.Circuit.load(next(tmp_path.glob("*.safetensors")))
    assert saved.total == 48


@pytest.mark.slow
def test_a_task_of_ones_own_comes_from_a_file(monkeypatch, tmp_path: Path) -> None:
    rows = [
        {"clean": f"Then, Mary and {name} went to the", "counterfactual": f"Then, Anna and {name} went to the",
         "answers": " store.", "distractors": [" park,", " school,"]}
        for name in ("John", "James", "Robert", "Michael")
    ]  # fmt: skip
    (tmp_path / "task.json").write_text(json.dumps(rows))
    run(monkeypatch, "--task", str(tmp_path / "task.json"), "--rounds", "0", "--output", str(tmp_path / "out"))
    lines = ["clean,counterfactual,answers,distractors"]
    lines += [
        f'"{row["clean"]}","{row["counterfactual"]}",{row["answers"]}," park,| school,"'
        for row in rows
    ]  # fmt: skip
    (tmp_path / "task.csv").write_text("\n".join(lines))
    run(monkeypatch, "--task", str(tmp_path / "task.csv"), "--rounds", "0", "--output", str(tmp_path / "csv"))
    for ablation in ("counterfactual", "zero"):
        assert (tmp_path / "out" / f"{ablation}.md").read_text() == (tmp_path / "csv" / f"{ablation}.md").read_text()


@pytest.mark.slow
def test_only_what_depends_on_the_ablation_is_ranked_again(capsys) -> None:
    options = find_ioi_circuit.parse(["--samples", "8", "--held-out", "8", "--rounds", "0"])
    options.methods = ["random", "gate IG"]
    task, _ = find_ioi_circuit.load_task(TOKENIZER, options)
    first = find_ioi_circuit.find(MODEL, task, "counterfactual", options, {})
    second = find_ioi_circuit.find(MODEL, task, "zero", options, first)
    assert second["random"] is first["random"]
    by_ablation = [found["gate IG"] for found in (first, second)]
    assert [ranking.description["ablation"] for ranking in by_ablation] == ["counterfactual", "zero"]
    one, other = (torch.cat(list(ranking.scores.values())) for ranking in by_ablation)
    assert not torch.allclose(one, other)


def test_an_unknown_task_is_named(monkeypatch, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"greater-than.*got 'docstring'"):
        run(monkeypatch, "--task", "docstring", "--output", str(tmp_path))


def test_prompts_held_out_share_no_names_and_templates() -> None:
    train, held_out = find_ioi_circuit.load_task(
        TOKENIZER, find_ioi_circuit.parse(["--samples", "32", "--held-out", "8"])
    )
    assert not set(train.names) & set(held_out.names) and not set(train.templates) & set(held_out.templates)
    assert (len(train), len(held_out)) == (32, 8)


def test_every_option_is_explained(capsys) -> None:
    with pytest.raises(SystemExit):
        find_ioi_circuit.parse(["--help"])
    text = capsys.readouterr().out
    for option in ("--model", "--task", "--granularity", "--rounds", "--gates", "--density", "--output", "--quick"):
        assert f"{option} " in text
