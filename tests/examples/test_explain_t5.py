import random

import explain_t5
import pytest


@pytest.mark.slow
def test_both_sides_are_explained_and_drawn(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("sys.argv", ["explain_t5.py", "--steps", "2", "--output", str(tmp_path)])
    assert 0 <= explain_t5.main() <= 1
    printed = capsys.readouterr().out
    assert printed.count("decoder_input_ids:") == 6 and "conservation" in printed
    for name in ("word.png", "end.png", "audit.png", "word.html", "end.html"):
        assert (tmp_path / name).stat().st_size > 2000


def test_one_noun_of_a_sentence_is_in_capitals_and_the_answer():
    tokenizer = explain_t5.tokenizer_of_words()
    texts, answers = explain_t5.sentences(20, random.Random(0))
    for text, answer in zip(texts, answers, strict=True):
        assert [word.lower() for word in text.split() if word.isupper()] == [answer]
        assert tokenizer.decode(tokenizer(text).input_ids).strip() == text
    labels = explain_t5.batch_of(tokenizer, texts, answers)["labels"]
    assert labels.shape == (20, 2) and bool((labels[:, 1] == tokenizer.eos_token_id).all())
