"""Tasks: what is generated, equal lengths, batches without padding, splits without overlap, tables, metrics by hand."""

import json
import math
from pathlib import Path

import pytest
import torch
import transformers as tf

from lrp_prune import circuits, tasks
from lrp_prune.tasks import gendered_pronoun, greater_than, indirect_object, names
from lrp_prune.tasks.prompts import tokens
from lrp_prune.tasks.task import Task
from tests.support.planted import WORDS, word_tokenizer


def all_words() -> list[str]:
    """Every word that the tasks can write, punctuation attached."""
    people = [*names.FEMALE, *names.MALE]
    years = [str(year) for year in range(1400, 1900)]
    words = [*people, *greater_than.NOUNS, *years, "she", "he", *(str(century) for century in greater_than.CENTURIES)]
    for template in (*indirect_object.TEMPLATES, *gendered_pronoun.TEMPLATES, *greater_than.TEMPLATES):
        words += template.split()
    return [*words, *(f"{name}," for name in people), *(f"{noun}," for noun in greater_than.NOUNS)]


TOKENIZER = word_tokenizer(all_words())


def make(name: str, **options: object) -> Task:
    task: Task = getattr(tasks, name)(TOKENIZER, **options)
    return task


GENERATED = ["IndirectObject", "GreaterThan", "GenderedPronoun"]


@pytest.mark.slow
@pytest.mark.parametrize("name", GENERATED)
def test_prompts_are_equally_long_and_have_single_token_answers(name: str) -> None:
    task = make(name, samples=40)
    assert len(task) == 40
    unknown = TOKENIZER.unk_token_id
    for sample in task.samples:
        assert len(sample.clean) == len(sample.counterfactual) and sample.clean != sample.counterfactual
        assert unknown not in (*sample.clean, *sample.counterfactual, *sample.answers, *sample.distractors)
        assert sample.answers and sample.distractors and not set(sample.answers) & set(sample.distractors)
        assert TOKENIZER(sample.prompt.clean + sample.prompt.answers[0])["input_ids"] == [
            *sample.clean,
            sample.answers[0],
        ]


@pytest.mark.slow
@pytest.mark.parametrize("name", GENERATED)
def test_a_seed_decides_all_and_another_changes_it(name: str) -> None:
    assert make(name, samples=16, seed=3).fingerprint == make(name, samples=16, seed=3).fingerprint
    assert make(name, samples=16, seed=3).fingerprint != make(name, samples=16, seed=4).fingerprint
    assert make(name, samples=16, seed=3).resampled(4).fingerprint == make(name, samples=16, seed=4).fingerprint
    assert make(name, samples=16, seed=3).resampled(4, 5).fingerprint == make(name, samples=5, seed=4).fingerprint


@pytest.mark.slow
@pytest.mark.parametrize("name", GENERATED)
def test_a_split_shares_neither_templates_nor_words(name: str) -> None:
    task = make(name, samples=30)
    first, second = task.split()
    assert len(first) == len(second) == 30
    assert not {s.prompt.template for s in first.samples} & {s.prompt.template for s in second.samples}
    for attribute in ("names", "female", "male", "nouns"):
        assert not set(getattr(first, attribute, ())) & set(getattr(second, attribute, ()))
    people = {word.strip(",") for s in first.samples for word in s.prompt.clean.split()} & {*names.FEMALE, *names.MALE}
    others = {word.strip(",") for s in second.samples for word in s.prompt.clean.split()} & {*names.FEMALE, *names.MALE}
    assert not people & others


@pytest.mark.parametrize("counterfactual", ["names", "swap"])
def test_indirect_objects_come_in_both_orders(counterfactual: str) -> None:
    task = make("IndirectObject", samples=20, counterfactual=counterfactual)
    orders = set()
    for sample in task.samples:
        words = [word.strip(",.") for word in sample.prompt.clean.split()]
        people = [word for word in words if word in {*names.FEMALE, *names.MALE}]
        (answer,), (distractor,) = sample.prompt.answers, sample.prompt.distractors
        assert sorted(people) == sorted([answer.strip(), distractor.strip(), distractor.strip()])
        assert people[2] == distractor.strip()
        orders.add("ABBA" if people[0] == answer.strip() else "BABA")
        changed = [word.strip(",.") for word in sample.prompt.counterfactual.split()]
        repeated = [word for word in changed if word in {*names.FEMALE, *names.MALE}]
        if counterfactual == "swap":
            assert repeated == [*people[:2], answer.strip()]
        else:
            assert len(set(repeated)) == 3 and not set(repeated) & set(people)
    assert orders == {"ABBA", "BABA"}


def test_pronouns_fit_the_names() -> None:
    for sample in make("GenderedPronoun", samples=10).samples:
        female = any(word.strip(",") in names.FEMALE for word in sample.prompt.clean.split())
        assert sample.prompt.answers == ((" she",) if female else (" he",))


def letters(text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
    """A tokenizer of single letters: years are written digit by digit."""
    return {"input_ids": [ord(letter) for letter in text]}


def pairs(text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
    """A tokenizer of pairs of digits, and of words."""
    pieces = []
    for word in text.split():
        pieces += [word[:2], word[2:]] if word.isdigit() and len(word) == 4 else [word]
    return {"input_ids": [sum(ord(letter) * 257**i for i, letter in enumerate(piece)) for piece in pieces]}


def some_whole(text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
    """Pairs of digits but for some years that are tokens of their own, as in GPT-2's vocabulary."""
    words = [[word] if word in {"1440", "1500", "1510", "1830", "1861"} else None for word in text.split()]
    pieces: list[int] = []
    for whole, word in zip(words, text.split(), strict=True):
        pieces += [int(word)] if whole else pairs(word)["input_ids"]
    return {"input_ids": pieces}


@pytest.mark.slow
def test_years_that_are_whole_tokens_are_neither_asked_for_nor_prompts() -> None:
    task = tasks.GreaterThan(some_whole, samples=200, centuries=(14, 15, 18))
    assert task.form == "digits" and len({len(sample.clean) for sample in task.samples}) <= 4
    for sample in task.samples:
        years = [word.strip(",") for word in sample.prompt.clean.split() if word.strip(",").isdigit()]
        assert years[0] not in {"1440", "1500", "1510", "1830", "1861"}
        offered = {years[-1] + ending for ending in (*sample.prompt.answers, *sample.prompt.distractors)}
        assert not offered & {"1440", "1500", "1510", "1830", "1861"} and len(offered) > 90
    for century in (14, 15, 18):
        assert len(tasks.GreaterThan(some_whole, samples=20, centuries=(century,))) == 20


@pytest.mark.parametrize(("tokenizer", "form"), [(letters, "digit"), (pairs, "digits"), (TOKENIZER, "year")])
def test_years_are_asked_for_as_the_tokenizer_writes_them(tokenizer, form: str) -> None:
    task = tasks.GreaterThan(tokenizer, samples=20)
    assert task.form == form
    for sample in task.samples:
        year = next(int(word.strip(",")) for word in sample.prompt.clean.split() if word.strip(",").isdigit())
        place = {"digit": year // 10 % 10, "digits": year % 100, "year": year}[form]
        assert all(int(answer) > place for answer in sample.prompt.answers)
        assert all(int(answer) < place for answer in sample.prompt.distractors)


def test_a_tokenizer_that_writes_years_otherwise_is_refused() -> None:
    def halves(text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [half for letter in text for half in divmod(ord(letter), 16)]}

    with pytest.raises(ValueError, match="TableTask"):
        tasks.GreaterThan(halves)


def test_batches_hold_every_sample_once_without_padding() -> None:
    task = make("IndirectObject", samples=50)
    batches = task.batches(7)
    assert sum(len(batch["input_ids"]) for batch in batches) == 50
    assert all(len(batch["input_ids"]) <= 7 and bool(batch["attention_mask"].all()) for batch in batches)
    rows = [tuple(row.tolist()) for batch in batches for row in batch["input_ids"]]
    assert sorted(rows) == sorted(sample.clean for sample in task.samples)


def test_what_a_tokenizer_appends_is_left_out() -> None:
    class Appending:
        all_special_ids = (0, 1)
        unk_token_id = None

        def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
            return {"input_ids": [0, *(len(word) + 1 for word in text.split()), 1]}

    assert tokens(Appending(), "aa b") == (0, 3, 2)


ROW = {"clean": "x y", "counterfactual": "y y", "answers": " yes", "distractors": [" no"]}


def test_a_table_comes_from_rows_csv_or_json(tmp_path: Path) -> None:
    tokenizer = word_tokenizer(WORDS)
    (tmp_path / "task.json").write_text(json.dumps([ROW, ROW]))
    (tmp_path / "task.csv").write_text("clean,counterfactual,answers,distractors\nx y,y y, yes, no\nx y,y y, yes, no\n")
    task = tasks.TableTask(tokenizer, [ROW, ROW])
    assert tasks.TableTask.from_json(tokenizer, tmp_path / "task.json").fingerprint == task.fingerprint
    assert tasks.TableTask.from_csv(tokenizer, tmp_path / "task.csv").fingerprint == task.fingerprint
    (tmp_path / "marked.csv").write_text(
        (tmp_path / "task.csv").read_text(), encoding="utf-8-sig"
    )  # as Excel writes it
    assert tasks.TableTask.from_csv(tokenizer, tmp_path / "marked.csv").fingerprint == task.fingerprint
    for answers in (8, [8]):
        with pytest.raises(ValueError, match="row 2 holds 8 where text is expected"):
            tasks.TableTask(tokenizer, [ROW, {**ROW, "answers": answers}])
    several = "clean,counterfactual,answers,distractors\nx,y, yes| x, no\n"
    (tmp_path / "several.csv").write_text(several)
    assert tasks.TableTask.from_csv(tokenizer, tmp_path / "several.csv").samples[0].answers == (3, 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"counterfactual": "y"}, "row 1: .*equally many tokens, got 2 .* 1"),
        ({"counterfactual": "x y"}, "row 1: the counterfactual of 'x y' is 'x y', the same tokens"),
        ({"clean": "oh y", "counterfactual": "ah y"}, "row 1: the counterfactual of 'oh y' is 'ah y', the same tokens"),
        ({"answers": " yes yes"}, "row 1: .*2 tokens"),
        ({"answers": ""}, "row 1 has no 'answers'"),
        ({"answers": " no"}, "share a token"),
    ],
)
def test_a_wrong_row_is_named(change: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tasks.TableTask(word_tokenizer(WORDS), [{**ROW, **change}])


def test_tables_are_split_by_template_or_by_row() -> None:
    tokenizer = word_tokenizer(WORDS)
    rows = [{**ROW, "clean": f"{a} {b}"} for a in ("x", "pad", "yes", "no") for b in ("x", "pad")]
    first, second = tasks.TableTask(tokenizer, rows).split()
    assert len(first) + len(second) == 8
    assert not {s.clean for s in first.samples} & {s.clean for s in second.samples}
    marked = [{**row, "template": row["clean"][-1]} for row in rows]
    first, second = tasks.TableTask(tokenizer, marked).split()
    assert {s.prompt.template for s in first.samples} != {s.prompt.template for s in second.samples}


def test_metrics_by_hand() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0, 1.0], [0.0, 3.0, 0.0, 0.0]])
    answers, distractors = torch.tensor([[0, 3], [0, -1]]), torch.tensor([[1, -1], [1, 2]])

    def metric(name: str, **options: torch.Tensor) -> list[float]:
        return tasks.metric_values(name, logits, answers, distractors, **options).tolist()

    assert metric("logit_difference") == pytest.approx([1.5 - 1.0, 0.0 - 1.5])
    assert metric("accuracy") == [1.0, 0.0]
    e = math.e
    total = e**2 + 2 * e + 1
    assert metric("probability_difference")[0] == pytest.approx((e**2 + e - e) / total)
    full = torch.zeros(2, 4)
    expected = sum(0.25 * math.log(0.25 / p) for p in (e**2 / total, e / total, 1 / total, e / total))
    assert metric("kl", full_logits=full)[0] == pytest.approx(expected)
    with pytest.raises(ValueError, match="full_logits"):
        metric("kl")


@pytest.mark.parametrize("metric", ["accuracy", "kl"])
def test_a_metric_without_gradient_is_no_target(metric: str) -> None:
    with pytest.raises(ValueError, match="cannot be explained"):
        make("IndirectObject", samples=1).target(metric)


def test_what_does_not_continue_a_prompt_is_refused() -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = tf.BertForMaskedLM(tf.BertConfig(**sizes, vocab_size=len(TOKENIZER)))
    with pytest.raises(ValueError, match="BertForMaskedLM is a masked language model, which predicts no next token"):
        circuits.discover(model, make("IndirectObject", samples=2), granularity="head")
