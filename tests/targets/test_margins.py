"""Margins against definitions that are computed token by token."""

import pytest
import torch
from torch import Tensor, nn

import lrp_prune
from lrp_prune.targets import LoopMargin, RepetitionMargin, TokenMargin
from tests.support.small_models import build

PROMPT = 2
RESPONSES = [[5, 6, 5, 5, 7, 6], [1, 2, 3, 4, 8, 9]]


def batch() -> dict[str, Tensor]:
    ids = torch.tensor([[5, 3, *response] for response in RESPONSES])
    labels = ids.clone()
    labels[:, :PROMPT] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def scores(model: nn.Module, ids: Tensor) -> Tensor:
    logits: Tensor = model(input_ids=ids).logits[:, PROMPT - 1 : -1]
    return logits


def best_except(values: Tensor, avoided: set[int]) -> Tensor:
    return max(value for token, value in enumerate(values) if token not in avoided)


def test_a_repeated_token_is_compared_with_the_best_that_was_not_said_yet() -> None:
    model = build("llama")
    logits = scores(model, batch()["input_ids"])[0]
    said = RESPONSES[0]
    # The token 5 of the prompt is no repetition; the second response repeats nothing.
    expected = [logits[place, said[place]] - best_except(logits[place], set(said[:place])) for place in (2, 3, 5)]
    torch.testing.assert_close(RepetitionMargin()(model, batch()), sum(expected))
    torch.testing.assert_close(RepetitionMargin(first=1)(model, batch()), expected[0])


def test_padding_is_no_response() -> None:
    model, padded = build("llama"), batch()
    padded["attention_mask"][0, -1] = 0
    short = {name: values[:, :-1] for name, values in batch().items()}
    torch.testing.assert_close(RepetitionMargin()(model, padded), RepetitionMargin()(model, short))


def test_no_repetition_is_nothing_to_explain_but_no_error() -> None:
    model = build("llama")
    assert RepetitionMargin()(model, {name: values[1:] for name, values in batch().items()}).item() == 0


@pytest.mark.parametrize("target", [RepetitionMargin(), LoopMargin()])
def test_batches_without_a_repetition_add_nothing_to_others(target: RepetitionMargin | LoopMargin) -> None:
    ids = torch.tensor([[3, 4, 5, 6, 7, 8]])
    without, repeated = {"input_ids": ids, "labels": ids}, {"input_ids": ids % 2 + 3, "labels": ids % 2 + 3}
    options = {"target": target, "composite": "gradient", "statistic": "signed", "matmul_dtype": None}
    alone = lrp_prune.attribute(build("llama"), [repeated], **options)
    both = lrp_prune.attribute(build("llama"), [without, repeated], **options)
    assert both.num_samples == 2
    for name, values in alone.items():
        torch.testing.assert_close(2 * both[name], values)


def test_a_token_is_compared_with_the_best_that_is_allowed() -> None:
    model, given = build("llama"), batch()
    given["labels"] = torch.full_like(given["input_ids"], -100)
    given["labels"][0, PROMPT + 4] = given["labels"][1, PROMPT] = 0
    logits = scores(model, given["input_ids"])
    # What would win is avoided, so that it matters.
    avoid = set(logits[0, 4].topk(3).indices.tolist() + logits[1, 0].topk(2).indices.tolist())
    expected = logits[0, 4, 7] - best_except(logits[0, 4], {7, *avoid})
    expected = expected + logits[1, 0, 1] - best_except(logits[1, 0], {1, *avoid})
    torch.testing.assert_close(TokenMargin([*avoid, *avoid])(model, given), expected)


@pytest.mark.parametrize("target", [RepetitionMargin(), TokenMargin([3])])
def test_without_labels_the_response_is_unknown(target: RepetitionMargin | TokenMargin) -> None:
    model = build("llama")
    with pytest.raises(ValueError, match="needs input_ids and labels"):
        target(model, {"input_ids": batch()["input_ids"]})
    nothing = {**batch(), "labels": torch.full((2, 8), -100)}
    with pytest.raises(ValueError, match="nothing to explain"):
        target(model, nothing)


def test_impossible_arguments() -> None:
    with pytest.raises(ValueError, match="first must be a count"):
        RepetitionMargin(first=0)
    with pytest.raises(ValueError, match="must not be negative"):
        TokenMargin([-1])
    with pytest.raises(ValueError, match="token 4000 to avoid is outside"):
        TokenMargin([4000])(build("llama"), batch())


@pytest.mark.parametrize("composite", ["attnlrp", "epsilon", "gradient"])
def test_margins_are_explained_by_any_composite(composite: str) -> None:
    relevance = lrp_prune.attribute(
        build("llama"), [batch()], target=RepetitionMargin(), composite=composite, statistic="signed"
    )
    assert relevance.target == "RepetitionMargin(first=None)"
    assert all(bool(values.any()) for values in relevance.values())


def test_the_gradients_relevance_of_a_margin_is_what_removal_changes_to_first_order() -> None:
    model = build("llama")
    options = {"target": RepetitionMargin(), "composite": "gradient", "statistic": "signed", "matmul_dtype": None}
    relevance = lrp_prune.attribute(model, [batch()], **options)
    name = "model.layers.0.mlp.down_proj.weight"
    parameter = model.get_parameter(name)
    (gradient,) = torch.autograd.grad(RepetitionMargin()(model, batch()), parameter)
    # Relevance is averaged over the two samples.
    torch.testing.assert_close(2 * relevance[name], gradient * parameter.detach(), rtol=1e-4, atol=1e-8)
