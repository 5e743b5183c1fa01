import language_model
import pytest
import torch
from transformers import LlamaForCausalLM

from tests.benchmarks import compression
from tests.support.small_models import llama


@pytest.fixture
def model() -> LlamaForCausalLM:
    return llama().eval()


def zeros(model: LlamaForCausalLM) -> float:
    weights = [weight for name, weight in model.named_parameters() if "proj" in name]
    return sum(int((weight == 0).sum()) for weight in weights) / sum(weight.numel() for weight in weights)


# Under CP-LRP queries, keys and gates have no relevance and are not pruned, so that fewer weights are zero in all.
@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in compression.settings() if "cp_lrp" not in name])
def test_each_setting_prunes_to_the_sparsity(name: str, model: LlamaForCausalLM) -> None:
    reference = language_model.batches(torch.randint(0, 26, (3, 12)), 1)
    compression.prune_in_rounds(compression.settings()[name], model, reference, 0.5)
    assert zeros(model) == pytest.approx(0.5, abs=0.01)


def test_settings_that_differ_in_their_selection_share_one_collection() -> None:
    rows = compression.settings()
    shared = ["attnlrp abs_token, row", "attnlrp abs_token, global", "attnlrp abs_token, global, normalised"]
    names = ["sparsegpt", *shared, "default", "default, 2 rounds"]
    assert list(compression.groups(names, rows)) == [["sparsegpt"], shared, ["default"], ["default, 2 rounds"]]


def test_results_are_kept_in_the_file_and_averaged_over_seeds(tmp_path) -> None:
    file = tmp_path / "results.jsonl"
    compression.Results(file).add("default", 0.5, 0, 30.0, 1.0)
    compression.Results(file).add("default", 0.5, 1, 32.0, 1.0)
    again = compression.Results(file)
    assert again.perplexity["default", 0.5, 1] == 32.0
    assert again.table(["default", "wanda"], [0.5]).splitlines()[2:] == [
        "| default | 31.00 (30.00, 32.00) |",
        "| wanda |  |",
    ]
