import correction_comparisons
import correction_rounds
import correction_study
import pytest
import torch
from transformers import LlamaForCausalLM

from lrp_prune import Patch
from lrp_prune.targets import RepetitionMargin
from tests.support.small_models import llama


@pytest.fixture
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return llama(eos_token_id=25, bos_token_id=24, pad_token_id=None, initializer_range=0.3).eval()


PROMPTS = [[1, 2, 3], [4, 5], [6, 7, 8], [9, 3], [2, 2, 2]]


def state(model: LlamaForCausalLM) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(model: LlamaForCausalLM, before: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def study(model: LlamaForCausalLM) -> correction_study.Study:
    text = torch.randint(0, 25, (6, 12), generator=torch.Generator().manual_seed(1))

    def distinct(corrected: LlamaForCausalLM) -> list[float]:
        return [len(set(answer)) / 8 for answer in correction_study.generate(corrected, PROMPTS, 8)]

    return correction_study.Study(model, distinct, text)


def names(model: LlamaForCausalLM) -> list[str]:
    return [name for name, parameter in model.named_parameters() if "layers" in name and parameter.dim() == 2]


def test_answers_are_those_of_each_prompt_by_itself(model):
    answers = correction_study.generate(model, PROMPTS, 6, batch_size=2)
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        ids = list(prompt)
        for token in answer:
            assert model(torch.tensor([ids])).logits[0, -1].argmax() == token
            ids.append(token)
        assert len(answer) == 6 or model(torch.tensor([ids])).logits[0, -1].argmax() == 25


def test_batches_label_the_answers_and_nothing_else():
    (batch,) = correction_study.answer_batches([[1, 2], [3]], [[4, 5], [6]], [[4, -100], [6]], 2)
    assert batch["input_ids"].tolist() == [[1, 2, 4, 5], [3, 6, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert batch["labels"].tolist() == [[-100, -100, 4, -100], [-100, 6, -100, -100]]


def test_the_interval_covers_the_mean_and_shrinks():
    few, many = [0.0, 1.0] * 5, [0.0, 1.0] * 500
    low, high = correction_study.interval(few)
    assert low < 0.5 < high
    narrow = correction_study.interval(many)
    assert narrow[1] - narrow[0] < (high - low) / 5
    assert correction_study.interval([0.3, 0.3]) == pytest.approx((0.3, 0.3))


def test_a_patch_is_measured_and_taken_back(model):
    before, figures = state(model), study(model)
    patch = correction_comparisons.random_patch(model, names(model), 500, seed=0)
    result = figures.measure(patch, 0.5)
    assert same(model, before)
    assert result.cost == pytest.approx(result.perplexity / figures.perplexity - 1)
    assert result.cost == pytest.approx(figures.cost(patch, 0.5))
    assert result.divergence > 0
    assert len(result.scores) == len(PROMPTS)


def test_the_largest_patch_at_a_cost_is_found(model, monkeypatch):
    figures = study(model)
    monkeypatch.setattr(figures, "cost", lambda patch, strength: patch.num_entries * strength / 100_000)
    tried = []

    def make(count: int) -> Patch:
        tried.append(count)
        return correction_comparisons.random_patch(model, names(model), count, 0)

    found = figures.at_cost(make, 50, 0.01, strength=0.5, trials=8)
    assert found is not None
    assert 1600 <= found.entries <= 2000
    assert found.strength == 0.5
    assert len(set(tried)) == len(tried) <= 8
    assert figures.at_cost(make, 1000, -1.0) is None


def test_random_patches_have_their_number_and_depend_on_the_seed(model):
    layers = names(model)
    first, again, other = (correction_comparisons.random_patch(model, layers, 40, seed) for seed in (0, 0, 1))
    assert first.num_entries == 40
    assert first == again
    assert first != other


def test_neurons_go_by_the_difference_of_their_mean_activation(model):
    down = [name for name in names(model) if "down_proj" in name]
    general = {name: torch.zeros(24) for name in down}
    undesired = {name: torch.arange(24.0) * (1 if "0" in name else -0.5) for name in down}
    patch = correction_comparisons.activation_patch(model, general, undesired, 16 * 3)
    assert list(patch) == [down[0]]
    assert set((patch[down[0]].positions % 24).tolist()) == {21, 22, 23}


def test_mean_activations_are_of_labelled_tokens_without_the_first(model):
    ids = torch.tensor([[1, 2, 3, 4]])
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.tensor([[1, -100, 3, 4]])}
    name = "model.layers.1.mlp.down_proj.weight"
    seen = []
    handle = model.model.layers[1].mlp.down_proj.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model(ids)
    handle.remove()
    found = correction_comparisons.mean_activations(model, [batch], [name])[name]
    torch.testing.assert_close(found.float(), seen[0][0, 2:].mean(0))


@pytest.mark.slow
def test_rounds_end_in_one_patch_of_the_model_as_it_was(model):
    before = state(model)
    text = torch.randint(0, 25, (4, 12), generator=torch.Generator().manual_seed(1))
    general = [{"input_ids": text, "attention_mask": torch.ones_like(text), "labels": text}]

    def answered() -> list[correction_study.Batch]:
        answers = correction_study.generate(model, PROMPTS, 8)
        return correction_study.answer_batches(PROMPTS, answers, answers, 3)

    contrast = correction_rounds.ContrastRounds(model, general, RepetitionMargin(), "repetition", "gradient", 0.7)
    patches = contrast.rounds(answered(), answered, 0.01, [0.005, 0.002], 0.3, 0.5)
    assert same(model, before)
    total = sum(model.get_parameter(name).numel() for name in contrast.names)
    first = round(0.01 * total)
    assert [patch.num_entries for patch in patches] == [
        first,
        first + round(0.002 * total),
        first + round(0.005 * total),
    ]
    assert all(sum(patch.overlap(patches[0]).values()) == first for patch in patches)
    assert patches[1].provenance["strength"] == 0.5
    assert len(contrast.rounds(answered(), list, 0.01, [0.005], 0.3, 0.5)) == 1
    assert contrast.rounds(answered(), answered, 0.01, [], 0.3, 0.5) == patches[:1]
    text = text[:2]
    assert correction_rounds.last_within(model, patches, 0.5, text, allowed=1e9) == 2
    assert correction_rounds.last_within(model, patches, 0.5, text, allowed=-1.0) == 0
    assert same(model, before)


def test_table_and_plot_show_every_result(model, tmp_path):
    def result(score: float, cost: float) -> correction_study.Result:
        return correction_study.Result(1000, 0.5, [score, score], 20 + cost, cost, 0.01)

    groups = {"before": [result(0.3, 0)], "random": [result(0.4, 0.01), result(0.6, 0.03)], "nothing found": []}
    lines = correction_study.table(groups, "uniqueness").splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert rows[0][:4] == ["", "entries", "strength", "uniqueness"]
    assert rows[2] == ["before", "1,000", "0.5", "0.300 (95 %: 0.300 to 0.300)", "20.00", "+0.0%", "0.0100"]
    assert rows[3] == ["random", "1,000", "0.5", "0.500 (2 seeds: 0.400 to 0.600)", "20.02", "+2.0%", "0.0100"]
    assert len(rows) == 4
    figure = correction_study.plot({"ours": [result(0.7, 0.01)]}, groups, result(0.3, 0), "uniqueness", 0.7, "title")
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert {"ours", "random", "before"} <= set(labels)
    figure.savefig(tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000
