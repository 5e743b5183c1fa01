import argparse

import language_model
import perplexities
import prune_smollm2
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM

import lrp_prune
from tests.support.small_models import llama


@pytest.fixture
def model() -> LlamaForCausalLM:
    return llama().eval()


def options(**changes: object) -> argparse.Namespace:
    values = {"sparsity": 0.5, "sparsities": [0.3, 0.5], "methods": ["lrp", "wanda"], "rounds": 2, "steps": 3}
    return argparse.Namespace(**{**values, "learning_rate": 1e-3, "compensation": "none", **changes})


def text(count: int) -> list[dict[str, torch.Tensor]]:
    return language_model.batches(torch.randint(0, 26, (count, 12)), 2)


@pytest.mark.slow
def test_fine_tuning_in_rounds_ends_at_the_sparsity_and_survives_saving(model, tmp_path):
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    masks = prune_smollm2.fine_tune(model, text(4), text(6), options())
    assert masks.sparsity == pytest.approx(0.5, abs=1e-3)
    assert not model.training
    kept = masks["model.layers.0.mlp.up_proj.weight"]
    weight = model.model.layers[0].mlp.up_proj.weight.detach()
    assert not torch.equal(weight[kept], before["model.layers.0.mlp.up_proj.weight"][kept])
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert "(50.00%) are zero" in prune_smollm2.check_zeros(loaded, masks)


def test_a_pruned_weight_that_is_not_zero_is_reported(model):
    masks = lrp_prune.prune(model, method="magnitude")
    prune_smollm2.check_zeros(model, masks)
    weight = model.model.layers[1].self_attn.q_proj.weight
    with torch.no_grad():
        weight[~masks["model.layers.1.self_attn.q_proj.weight"]] = 1e-30
    with pytest.raises(RuntimeError, match=r"1 tensors.*model\.layers\.1\.self_attn\.q_proj\.weight"):
        prune_smollm2.check_zeros(model, masks)


def test_sparsity_is_sorted_by_kind_and_depth(model):
    masks = lrp_prune.prune(model, method="magnitude", sparsity={"*.0.*": 0.25, "*.1.*": 0.75})
    by_layer = perplexities.sparsity_by_layer(masks)
    assert set(by_layer) == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    for depths in by_layer.values():
        assert depths == pytest.approx({0: 0.25, 1: 0.75}, abs=0.01)


def test_each_method_is_collected_from_the_same_batches(model):
    batches = text(4)
    for method in ("lrp", "wanda", "magnitude"):
        relevance = prune_smollm2.collect(method, model, batches)
        assert {"model.layers.0.mlp.down_proj.weight", "model.layers.1.self_attn.k_proj.weight"} <= set(relevance)


def cells(row: str) -> list[str]:
    return [cell.strip() for cell in row.strip("|").split("|")]


@pytest.mark.slow
def test_table_and_plot_hold_every_result(model, tmp_path):
    results = {(method, s): 10 + s for method in ("lrp", "wanda") for s in (0.3, 0.5)}
    table = perplexities.Table(options())
    rows = table.whole(9.0, results, 9.5).splitlines()
    assert [cells(row) for row in rows if "--" not in row] == [
        ["perplexity", "30 %", "50 %"],
        ["dense, nothing removed", "9.00", "9.00"],
        ["lrp, one shot", "10.30", "10.50"],
        ["wanda, one shot", "10.30", "10.50"],
        ["lrp, 2 rounds of 3 training steps", "", "9.50"],
    ]
    assert len({len(row) for row in rows}) == 1
    assert table.whole(9.0, results, None).splitlines() == rows[:-1]
    updated = options(compensation="exact")
    results[perplexities.COMPENSATED, 0.5] = 9.75
    with_update = perplexities.Table(updated).whole(9.0, results, 9.5).splitlines()
    assert [cells(row) for row in with_update][4] == ["lrp, one shot, kept weights updated", "", "9.75"]
    assert [cells(row) for row in (*with_update[2:4], *with_update[5:])] == [cells(row) for row in rows[2:]]
    masks = lrp_prune.prune(model, method="magnitude")
    figure = perplexities.plot(9.0, results, 9.5, masks, updated)
    left, right = figure.axes
    labels = ["dense", "lrp", "wanda", "lrp, 2 rounds of 3 steps", "lrp, kept weights updated"]
    assert [line.get_label() for line in left.lines] == labels
    assert len(right.get_legend().get_texts()) == 7
    figure.savefig(tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000


def test_full_and_quick_change_what_is_not_chosen():
    short, full, quick = (prune_smollm2.parse(list(each)) for each in ([], ["--full"], ["--quick"]))
    assert [each.sparsities for each in (short, full, quick)] == [[0.5], [0.3, 0.5, 0.6], [0.5]]
    assert short.calibration_windows < full.calibration_windows
    assert (quick.window, full.window) == (128, 512)
    chosen = prune_smollm2.parse(["--full", "--steps", "7", "--sparsities", "0.2"])
    assert (chosen.steps, chosen.sparsities, chosen.calibration_windows) == (7, [0.2, 0.5], full.calibration_windows)
    assert [each.compensation for each in (short, full, quick)] == ["exact", "exact", "none"]
    told = [prune_smollm2.introduction(each) for each in (short, full, quick)]
    assert all(text.startswith(f"The {name} run") for text, name in zip(told, ("short", "full", "quick"), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [["--full"], [], ["--compensation", "none"]])
def test_what_is_printed_are_results_and_which_run_they_are_of(arguments, model, tmp_path, monkeypatch, capsys, caplog):
    """The whole job on a tiny model: rows appear as they are measured, and nothing of what libraries say of themselves."""
    monkeypatch.setattr(prune_smollm2, "load_model", lambda name: (model, Characters()))
    monkeypatch.setattr(prune_smollm2, "load_documents", lambda *_: [letter * 60 for letter in "abcdefghijklmnop"])
    few = ["--window", "12", "--calibration-windows", "4", "--held-out-windows", "2", "--steps", "2"]
    monkeypatch.setattr("sys.argv", ["prune_smollm2.py", *arguments, *few, "--output", str(tmp_path)])
    prune_smollm2.main()
    printed = capsys.readouterr()
    rows = [line for line in printed.out.splitlines() if line.startswith("| ") and "--" not in line]
    updated, full = [] if "none" in arguments else ["lrp"], "--full" in arguments
    measured = ["perplexity", "dense", "lrp", *updated, "wanda", "magnitude"]
    assert [cells(row)[0].split(",")[0] for row in rows] == [*measured, *measured, "lrp"]
    assert rows[: len(measured)] == rows[len(measured) : 2 * len(measured)]
    assert len(cells(rows[0])) == (4 if full else 2)
    assert printed.out.startswith("The full run" if full else "The short run")
    assert (tmp_path / "perplexity.md").read_text().startswith("The full run" if full else "The short run")
    assert "Pruning round 2 of 2 by lrp" in caplog.text
    for noise in ("Tip", "GPU available", "Loading weights", "LeafSpec", "num_workers", "Trainer.fit"):
        assert noise not in printed.out + printed.err + caplog.text


class Characters:
    """A tokenizer that gives each character its own id."""

    def __call__(self, text: str, **options: object) -> dict[str, list[int]]:
        return {"input_ids": [ord(character) - 97 for character in text]}

    def save_pretrained(self, folder: object) -> None:
        """There is nothing to save."""


def test_every_option_is_explained(capsys):
    with pytest.raises(SystemExit):
        prune_smollm2.parse(["--help"])
    text = capsys.readouterr().out
    for option in (
        "--full",
        "--quick",
        "--model",
        "--dataset",
        "--text-column",
        "--sparsity",
        "--compensation",
        "--rounds",
        "--held-out-windows",
    ):
        assert f"{option} " in text
