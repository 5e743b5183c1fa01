import argparse

import language_model
import prune_smollm2
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import lrp_prune


@pytest.fixture
def model() -> LlamaForCausalLM:
    config = LlamaConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=26,
    )
    return LlamaForCausalLM(config).eval()


def options(**changes: object) -> argparse.Namespace:
    values = {"sparsity": 0.5, "sparsities": [0.3, 0.5], "methods": ["lrp", "wanda"], "rounds": 2, "steps": 3}
    return argparse.Namespace(**{**values, "learning_rate": 1e-3, **changes})


def text(count: int) -> list[dict[str, torch.Tensor]]:
    return language_model.batches(torch.randint(0, 26, (count, 12)), 2)


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
    by_layer = prune_smollm2.sparsity_by_layer(masks)
    assert set(by_layer) == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    for depths in by_layer.values():
        assert depths == pytest.approx({0: 0.25, 1: 0.75}, abs=0.01)


def test_each_method_is_collected_from_the_same_batches(model):
    batches = text(4)
    for method in ("lrp", "wanda", "magnitude"):
        relevance = prune_smollm2.collect(method, model, batches)
        assert {"model.layers.0.mlp.down_proj.weight", "model.layers.1.self_attn.k_proj.weight"} <= set(relevance)


def test_table_and_plot_hold_every_result(model, tmp_path):
    results = {(method, s): 10 + s for method in ("lrp", "wanda") for s in (0.3, 0.5)}
    rows = prune_smollm2.table(9.0, results, 9.5, options()).splitlines()
    assert rows[0] == "| method | 30% | 50% |"
    assert rows[2:5] == [
        "| dense, nothing removed | 9.00 | 9.00 |",
        "| lrp, one shot | 10.30 | 10.50 |",
        "| wanda, one shot | 10.30 | 10.50 |",
    ]
    assert rows[5] == "| lrp, 2 rounds of 3 training steps |  | 9.50 |"
    masks = lrp_prune.prune(model, method="magnitude")
    figure = prune_smollm2.plot(9.0, results, 9.5, masks, options())
    left, right = figure.axes
    assert [line.get_label() for line in left.lines] == ["dense", "lrp", "wanda", "lrp, fine-tuned in rounds"]
    assert len(right.lines) == 7
    figure.savefig(tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000


def test_every_option_is_explained(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["prune_smollm2.py", "--help"])
    with pytest.raises(SystemExit):
        prune_smollm2.parse()
    text = capsys.readouterr().out
    for option in ("--model", "--dataset", "--text-column", "--sparsity", "--rounds", "--held-out-windows", "--quick"):
        assert f"{option} " in text
