import correct_toxicity
import pytest

from lrp_prune.correction.judging import Judge
from tests.support.patches import unchanged, weights
from tests.support.small_models import build

pytest.importorskip("profanity_check")


class Spelling:
    """A tokenizer whose tokens are words with a space before them, by their place in a list."""

    def __init__(self, words):
        self.words = words

    def __len__(self):
        return len(self.words)

    def decode(self, ids, **options):
        return "".join(" " + self.words[token] for token in ids)


class Letters:
    """A tokenizer of ids that are below the tiny model's vocabulary, whose text is harmless."""

    all_special_ids = ()

    def __call__(self, text, **options):
        return {"input_ids": [ord(character) % 40 + 3 for character in text]}

    def __len__(self):
        return 50

    def decode(self, ids, **options):
        return " ".join(f"w{chr(97 + token // 10)}{chr(97 + token % 10)}" for token in ids)


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
    judge = Judge(lambda text: 1.0, correct_toxicity.profane_words)
    assert judge.labels([0, 1, 2, 3, 0], tokenizer.decode) == [-100, 1, -100, 3, -100]
    assert judge.labels([0, 2], tokenizer.decode) == [-100, -100]
    assert correct_toxicity.profane_tokens(tokenizer) == [1, 3]


@pytest.mark.slow
@pytest.mark.parametrize("at", ["everywhere", "model.layers.0"])
def test_the_whole_example_on_a_tiny_model(monkeypatch, tmp_path, capsys, at):
    model = build("llama")
    model.generation_config.eos_token_id = None
    before = weights(model)
    # Words of odd tokens are the profane ones.
    monkeypatch.setattr(
        correct_toxicity,
        "profanity",
        lambda texts: [float(any(word[-1] in "bdfhj" for word in text.split())) for text in texts],
    )
    monkeypatch.setattr(correct_toxicity, "packaged_words", lambda: [letter * 4 for letter in "abcdefghijkl"])
    monkeypatch.setattr(correct_toxicity, "load_model", lambda _: (model, Letters()))
    sizes = ["--windows", "2", "--length", "16", "--samples", "4", "--random", "1", "--answer-tokens", "8"]
    sizes += ["--reduction", "0.01", "--amounts", "0.05", "0.3", "--strengths", "1", "--allowed", "*=9"]
    sizes += ["--at", at, "--holding", "*=0.5"]
    monkeypatch.setattr("sys.argv", ["correct_toxicity.py", *sizes, "--output", str(tmp_path)])
    correct_toxicity.is_profane.cache_clear()
    correct_toxicity.main()
    printed = capsys.readouterr().out
    assert "prompts to test on draw it" in printed
    assert "| neutral sentences " in (tmp_path / "report.md").read_text()
    assert "before: profanity 1.00" in printed
    assert (tmp_path / "frontier.png").stat().st_size > 5000
    assert (tmp_path / "patch.safetensors").exists() == ("within all limits" in printed)
    assert unchanged(model, before)
    correct_toxicity.is_profane.cache_clear()


def test_every_option_is_explained(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["correct_toxicity.py", "--help"])
    with pytest.raises(SystemExit):
        correct_toxicity.parse()
    text = capsys.readouterr().out
    for option in ("--prompts", "--composite", "--amounts", "--strengths", "--guard", "--show", "--quick"):
        assert f"{option} " in text
