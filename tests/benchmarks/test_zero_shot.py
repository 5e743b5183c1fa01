"""Accuracies of `lm-eval` on a task of local data, beside those that the likelihoods of the answers give."""

import json
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from tests.benchmarks import compression_table as table
from tests.benchmarks import zero_shot
from tests.support.circuit_tasks import ioi_model

NAMES = ["Mary", "John", "Anna", "Paul", "Tom", "Lisa"]
TASK = """
task: mine
dataset_path: json
dataset_kwargs:
  data_files: {{test: {file}}}
  cache_dir: {folder}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_target: right
doc_to_choice: answers
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""


def built() -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """A model and a tokenizer with an end, which lm-eval asks for."""
    model, tokenizer = ioi_model()
    tokenizer.eos_token = tokenizer.unk_token
    return model, tokenizer


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    pytest.importorskip("lm_eval", reason="the extra `tasks` is not installed")
    file = tmp_path / "questions.jsonl"
    questions = [
        {"question": f"{first} gave {second}", "answers": [first, second], "right": 0}
        for first in NAMES
        for second in NAMES
        if first != second
    ]
    file.write_text("\n".join(map(json.dumps, questions)))
    (tmp_path / "mine.yaml").write_text(TASK.format(file=file, folder=tmp_path / "cache"))
    return tmp_path


def share_right(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, questions: list[dict[str, str]]) -> float:
    """How often the right answer is likelier."""
    right = 0
    for each in questions:
        likely = []
        for answer in each["answers"]:
            ids = torch.tensor(tokenizer(f"{each['question']} {answer}")["input_ids"])[None]
            with torch.no_grad():
                likely.append(float(model(input_ids=ids).logits.log_softmax(-1)[0, -2, ids[0, -1]]))
        right += likely[0] > likely[1]
    return right / len(questions)


def test_accuracies_are_those_of_the_likelier_answers(folder: Path) -> None:
    model, tokenizer = built()
    questions = [json.loads(line) for line in (folder / "questions.jsonl").read_text().splitlines()]
    found = zero_shot.Tasks(["mine"], folder).accuracies(model, tokenizer)
    assert found == {"mine": pytest.approx(share_right(model, tokenizer, questions))} and 0.2 < found["mine"] < 0.8
    first = zero_shot.Tasks(["mine"], folder, limit=4).accuracies(model, tokenizer)
    assert first["mine"] == pytest.approx(share_right(model, tokenizer, questions[:4]))


def test_what_is_no_task_is_said(folder: Path) -> None:
    with pytest.raises(ValueError, match="lm-eval knows no task arc_hardest: `lm_eval ls tasks`"):
        zero_shot.Tasks(["mine", "arc_hardest"], folder)


def test_of_several_measures_it_is_that_by_length_and_none_is_said() -> None:
    both = {"alias": "mine", "acc,none": 0.5, "acc_stderr,none": "N/A", "acc_norm,none": 0.75}
    assert zero_shot._accuracy("mine", both) == 0.75
    with pytest.raises(ValueError, match="the task said has none of acc_norm, acc but perplexity,none"):
        zero_shot._accuracy("said", {"alias": "said", "perplexity,none": 2.0, "perplexity_stderr,none": "N/A"})


def test_without_the_extra_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zero_shot, "find_spec", lambda _: None)
    with pytest.raises(ImportError, match=r"pip install -c constraints.txt -e '\.\[tasks\]'"):
        zero_shot.Tasks(["mine"])


def test_the_table_has_them_and_measures_what_is_missing(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model, tokenizer = built()
    monkeypatch.setattr(table.language_model, "load_model", lambda _: (model, tokenizer))
    monkeypatch.setattr(
        table.language_model, "windows", lambda _, tokenizer, number, seed=0: torch.arange(2, 26).view(2, 12)
    )
    monkeypatch.setattr(table, "TEXTS", {"speeches": lambda: [("a", "a"), ("b", "b")]})
    options = [
        "--texts",
        "speeches",
        "--ways",
        "magnitude",
        "--sparsities",
        "0.5",
        "--seeds",
        "0",
        "--output",
        str(folder),
    ]
    table.main(options)
    assert "zero-shot" not in capsys.readouterr().out
    with_tasks = [*options, "--tasks", "mine", "--task-folder", str(folder)]
    table.main(with_tasks)
    printed = capsys.readouterr().out
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in printed.splitlines()
        if "0%" in line and "|" in line
    ]
    dense = zero_shot.Tasks(["mine"], folder).accuracies(model, tokenizer)["mine"]
    assert ["dense", "0%", f"{dense:.3f}", f"{dense:.3f}"] in rows
    lines = (folder / "results.jsonl").read_text().splitlines()
    assert len(lines) == 4 and "magnitude" in printed
    table.main(with_tasks)  # nothing is left to do
    assert (folder / "results.jsonl").read_text().splitlines() == lines
