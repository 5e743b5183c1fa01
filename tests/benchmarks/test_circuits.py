"""The table of circuit methods runs on a tiny model, is kept in a file, and is continued."""

import json
from pathlib import Path

import pytest
from transformers import LlamaForCausalLM

from lrp_prune import tasks
from tests.benchmarks import circuits as benchmark
from tests.support.circuit_tasks import ioi_model

MODEL, TOKENIZER = ioi_model()


@pytest.fixture
def model() -> LlamaForCausalLM:
    return MODEL


def options(path: Path, *arguments: str) -> benchmark.argparse.Namespace:
    small = ["--samples", "4", "--sizes", "0.1", "0.5", "1", "--steps", "2", "--results", str(path)]
    return benchmark.parse([*small, *arguments])


@pytest.mark.slow
def test_every_row_is_measured_and_a_run_is_continued(model: LlamaForCausalLM, tmp_path: Path) -> None:
    names = ["attnlrp", "attribution_patching_ig", "relp, 3 rounds", "gates from attribution_patching", "random"]
    given = options(
        tmp_path / "results.jsonl", "--methods", *names, "--seeds", "0", "1", "--ablations", "counterfactual", "zero",
        "--granularities", "neuron", "head",
    )  # fmt: skip
    results = benchmark.run(model, TOKENIZER, given)
    lines = [json.loads(line) for line in given.results.read_text().splitlines()]
    assert len(lines) == len(names) * 2 * 2 * 2 == len(results.rows)
    table = results.table("ioi", "neuron", "zero", names, given.sizes).splitlines()
    assert [line.split(" | ")[0].removeprefix("| ") for line in table[2:]] == names
    assert all(line.count("±") == 5 for line in table[2:])
    # Nothing is computed again, and what is new is added.
    more = options(given.results, "--methods", *names, "wanda", "--seeds", "0", "--granularities", "neuron")
    more.ablations = ["zero"]
    benchmark.run(model, TOKENIZER, more)
    assert len(given.results.read_text().splitlines()) == len(lines) + 1
    # Results of other options are not taken for these.
    more.samples = 5
    assert len(benchmark.run(model, TOKENIZER, more).rows) == len(more.methods)


def test_weights_have_rows_of_their_own(model: LlamaForCausalLM, tmp_path: Path) -> None:
    given = options(
        tmp_path / "w.jsonl", "--methods", "attnlrp", "relp", "gates", "--granularities", "weight", "--seeds", "0"
    )
    results = benchmark.run(model, TOKENIZER, given)
    assert [key[1:4] for key in results.rows] == [("weight", "zero", "attnlrp")]


@pytest.mark.slow
def test_methods_that_do_not_know_the_ablation_find_once(
    model: LlamaForCausalLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    monkeypatch.setattr(benchmark, "find", lambda *given, f=benchmark.find: calls.append(given[4]) or f(*given))
    given = options(
        tmp_path / "r.jsonl", "--methods", "attnlrp", "attnlrp, 3 rounds", "--granularities", "head", "--seeds", "0"
    )
    benchmark.run(model, TOKENIZER, given)
    assert calls == ["counterfactual", "counterfactual", "zero", "mean"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["signed ranking", "abs_token", "rounds"])
def test_settings_name_options_that_exist(name: str, model: LlamaForCausalLM) -> None:
    task = tasks.IndirectObject(TOKENIZER, samples=2)
    for row, setting in benchmark.settings().items():
        if name in row and "12" not in row:
            ranking = benchmark.find(setting, model, task, "head", "zero", options(Path("unused")))
            assert len(ranking) == 4


def test_unknown_methods_are_refused() -> None:
    with pytest.raises(SystemExit):
        benchmark.parse(["--methods", "acdc"])
