import json
from pathlib import Path

import language_model
import pytest
import torch

from tests.benchmarks import compression_table as table
from tests.support.small_models import llama


@pytest.mark.slow
@pytest.mark.parametrize("way", table.WAYS)
@pytest.mark.parametrize("level", ["0.5", "0.7", "2:4"])
def test_each_way_removes_what_the_column_says(way: str, level: str) -> None:
    if not table._possible(way, level):
        pytest.skip("no budgets where each layer has the same pattern")
    model = llama(hidden_size=32, intermediate_size=64, num_attention_heads=4, num_key_value_heads=2).eval()
    ids = torch.randint(0, 26, (3, 24))
    scores = table.Scores(model, language_model.batches(ids, 1))
    seconds, megabytes = table.prune_(way, level, model, ids, scores)
    assert seconds > 0 and megabytes >= 0
    weights = [weight for name, weight in model.named_parameters() if "_proj" in name]
    zeros = sum(int((weight == 0).sum()) for weight in weights) / sum(weight.numel() for weight in weights)
    assert zeros == pytest.approx(table.share_of(level), abs=0.01)
    if ":" in level:
        groups = torch.cat([weight.detach().reshape(-1, 4) for weight in weights])
        assert ((groups != 0).sum(1) == 2).all()


def test_scores_of_a_method_are_collected_once() -> None:
    model = llama().eval()
    scores = table.Scores(model, language_model.batches(torch.randint(0, 26, (2, 12)), 1))
    assert scores.of("lrp")[0] is scores.of("lrp")[0]
    assert scores.of("wanda")[0] is not scores.of("lrp")[0]


def test_the_table_has_means_their_range_and_costs(tmp_path: Path) -> None:
    file = tmp_path / "results.jsonl"
    rows = [{"text": "speeches", "way": "dense", "level": "0", "seed": 0, "perplexity": 20.0}]
    for seed, perplexity in enumerate((30.0, 32.0)):
        costs = {"seconds": 10.0 + seed, "megabytes": 1500}
        rows.append({"text": "speeches", "way": "lrp", "level": "0.5", "seed": seed, "perplexity": perplexity, **costs})
    for row in rows[:-1]:
        table.Results(file).add(row)
    results = table.Results(file)
    results.add(rows[-1])
    assert table.Results(file).rows == results.rows and len(file.read_text().splitlines()) == 3
    assert results.table("speeches").splitlines() == [
        "| speeches: dense 20.00 | 50% | seconds | MB |",
        "|---|---|---|---|",
        "| lrp | 31.00 (30.00 to 32.00) | 11 | 1,500 |",
    ]
    table.main(["--report", "--output", str(tmp_path)])
    assert (tmp_path / "compression.png").stat().st_size > 0
    assert json.loads(file.read_text().splitlines()[0])["way"] == "dense"
