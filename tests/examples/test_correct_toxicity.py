import correct_toxicity
import pytest

pytest.importorskip("profanity_check")


class Spelling:
    """A tokenizer whose tokens are words with a space before them, by their place in a list."""

    def __init__(self, words):
        self.words = words

    def __len__(self):
        return len(self.words)

    def decode(self, ids, **options):
        return "".join(" " + self.words[token] for token in ids)


def worst():
    return correct_toxicity.packaged_words(0.95)


def test_words_are_the_packages_own_and_profane_by_themselves():
    words = worst()
    assert len(words) > 20
    assert min(correct_toxicity.profanity(words)) >= 0.95
    assert max(correct_toxicity.profanity(["table", "weather"])) < 0.5


def test_no_word_and_no_form_of_it_is_in_both_halves():
    words = ["aaaaone", "aaaatwo", "bbbb", "cccc", "dddd"]
    first, second = correct_toxicity.word_prompts(words, 1000, seed=0)
    assert len(first) + len(second) == len(words) * len(correct_toxicity.TEMPLATES)
    for stem in ("aaaa", "bbbb", "cccc", "dddd"):
        assert any(stem in text for text in first) != any(stem in text for text in second)
    assert correct_toxicity.word_prompts(words, 10, seed=0) == (first[:5], second[:5])


def test_templates_are_harmless_themselves():
    assert max(correct_toxicity.profanity([text.format("friend") for text in correct_toxicity.TEMPLATES])) < 0.5


def test_tokens_of_profane_words_are_labelled_and_no_alternatives():
    tokenizer = Spelling(["table", worst()[0], "weather", worst()[1].upper()])
    answer = [0, 1, 2, 3, 0]
    assert correct_toxicity.profane_labels(answer, tokenizer) == [-100, 1, -100, 3, -100]
    assert correct_toxicity.profane_tokens(tokenizer) == [1, 3]
    batches = correct_toxicity.labelled_batches([[0], [2, 2]], [[0, 2], answer], tokenizer)
    assert len(batches) == 1
    assert batches[0]["input_ids"].tolist() == [[2, 2, *answer]]
    assert correct_toxicity.labelled_batches([[0]], [[0, 2]], tokenizer) == []


def test_every_option_is_explained(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["correct_toxicity.py", "--help"])
    with pytest.raises(SystemExit):
        correct_toxicity.parse()
    text = capsys.readouterr().out
    for option in ("--prompts", "--composite", "--amount", "--strength", "--guard", "--show", "--quick"):
        assert f"{option} " in text
