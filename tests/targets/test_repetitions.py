"""Repeated tokens against definitions that are written out token by token."""

import pytest
import torch
from torch import Tensor, nn

import lrp_prune
from lrp_prune.targets import LoopMargin, RepeatedTokens, repeated, repeats_only
from tests.support.small_models import build

IDS = torch.tensor([[5, 3, 5, 6, 5, 6, 7, 5, 6, 7], [5, 3, 1, 2, 3, 4, 8, 9, 10, 11]])
PROMPT = 2


def batch() -> dict[str, Tensor]:
    labels = IDS.clone()
    labels[:, :PROMPT] = -100
    return {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "labels": labels}


def padded(given: dict[str, Tensor], left: int) -> dict[str, Tensor]:
    """With tokens of the text itself as padding, which must count for nothing."""
    filled = {"input_ids": 5, "attention_mask": 0, "labels": -100}
    return {key: torch.cat([torch.full((len(IDS), left), filled[key]), value], 1) for key, value in given.items()}


@pytest.mark.parametrize("length", [1, 2, 3])
def test_repeated_tokens_end_what_the_text_had_before(length: int) -> None:
    found = repeated(IDS, length=length)
    for row, tokens in enumerate(IDS.tolist()):
        had: list[list[int]] = []
        for place in range(len(tokens)):
            several = tokens[max(place + 1 - length, 0) : place + 1]
            assert bool(found[row, place]) == (several in had)
            if len(several) == length:
                had.append(several)
    assert found.any()


def test_padding_is_not_repeated() -> None:
    mask = padded(batch(), 3)["attention_mask"]
    found = repeated(padded(batch(), 3)["input_ids"], mask)
    assert torch.equal(found[:, 3:], repeated(IDS))
    assert not found[:, :3].any()


def test_a_batch_is_labelled_where_it_repeats_and_was_labelled() -> None:
    given = batch()
    labels = repeats_only(given, 2)["labels"]
    assert torch.equal(labels != -100, repeated(IDS, length=2) & (given["labels"] != -100))
    assert labels[0, 5] == IDS[0, 5]
    assert torch.equal(given["labels"], batch()["labels"])
    with pytest.raises(ValueError, match="mapping with input_ids, got tuple"):
        repeats_only((IDS,))


def log_probabilities(model: nn.Module) -> Tensor:
    found: Tensor = model(input_ids=IDS).logits.log_softmax(-1)
    return found


@pytest.mark.parametrize("length", [1, 2])
def test_right_repetitions_are_explained_by_their_likelihood(length: int) -> None:
    model = build("llama")
    log_p, again = log_probabilities(model), repeated(IDS, length=length)
    expected = sum(
        log_p[row, place - 1, IDS[row, place]]
        for row in range(len(IDS))
        for place in range(PROMPT, IDS.shape[1])
        if again[row, place]
    )
    torch.testing.assert_close(RepeatedTokens(length)(model, batch()), expected)
    none = {key: value[1:] for key, value in batch().items()}
    assert RepeatedTokens(2)(model, none).item() == 0


@pytest.mark.parametrize(("length", "first"), [(1, None), (2, None), (2, 1)])
def test_a_loop_is_set_against_the_best_token_that_breaks_it(length: int, first: int | None) -> None:
    model = build("llama")
    logits, again = model(input_ids=IDS).logits, repeated(IDS, length=length)
    expected = torch.zeros(())
    for row, tokens in enumerate(IDS.tolist()):
        places = [place for place in range(PROMPT, len(tokens)) if again[row, place]][:first]
        for place in places:
            new = [token for token in range(logits.shape[-1]) if token not in tokens[:place]]
            expected = expected + logits[row, place - 1, tokens[place]] - logits[row, place - 1, new].max()
    assert expected != 0
    torch.testing.assert_close(LoopMargin(length, first)(model, batch()), expected)


def test_left_padding_changes_neither() -> None:
    model, given = build("llama"), padded(batch(), 3)
    for target in (RepeatedTokens(2), LoopMargin(2)):
        torch.testing.assert_close(target(model, given), target(model, batch()))


def test_both_serve_as_targets_of_relevance() -> None:
    model = build("llama")
    good = lrp_prune.attribute(model, [batch()], RepeatedTokens(), "epsilon", "signed")
    bad = lrp_prune.attribute(model, [batch()], LoopMargin(), "epsilon", "signed")
    patch = lrp_prune.Patch.from_contrast(model, {"repeating": good}, bad, 20, guard=None)
    assert patch.num_entries == 20
    assert good.target == "RepeatedTokens(length=1)"


def test_lengths_are_counts() -> None:
    with pytest.raises(ValueError, match="length must be an integer of at least 1, got 0"):
        RepeatedTokens(0)
    with pytest.raises(ValueError, match="first must be an integer of at least 1, got 0"):
        LoopMargin(first=0)
    with pytest.raises(ValueError, match=r"ids must be \[samples, tokens\], got shape \(3,\)"):
        repeated(torch.ones(3, dtype=torch.int64))
