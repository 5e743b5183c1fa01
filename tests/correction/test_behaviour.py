"""A behaviour of one's own, given as prompts or as answers: parted, found, chosen by the worst side effect, and tested."""

import json

import pytest
import torch

from lrp_prune import CorrectedModule, Patch
from lrp_prune.callbacks import ContrastiveCorrection
from lrp_prune.correction import Automatic, Behaviour, correct
from lrp_prune.correction.behaviour import WANTED, _sides
from lrp_prune.correction.judging import Judge
from lrp_prune.effects import Suite
from lrp_prune.effects.generating import greedy
from tests.support.patches import unchanged, weights
from tests.support.small_models import build
from tests.support.trainers import quiet_trainer


class Letters:
    """A tokenizer of single characters, ids 0 to 49."""

    all_special_ids = ()

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": [ord(letter) - 65 for letter in text]}

    def decode(self, ids, skip_special_tokens=True):
        return "".join(chr(65 + token) for token in ids)

    def __len__(self):
        return 50


PROMPTS = ["".join(chr(65 + (7 * row + 3 * place) % 50) for place in range(5 + row % 3)) for row in range(16)]
OTHERS = ["".join(chr(65 + (11 * row + place) % 50) for place in range(6)) for row in range(8)]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    found = build("llama")
    found.generation_config.eos_token_id = None
    return found


def anything(model, **options):
    return Behaviour.from_prompts(
        model, Letters(), PROMPTS, lambda text: True, wanted=[], name="any", answer_tokens=6, **options
    )


def test_a_pattern_says_whether_and_where() -> None:
    judge = Judge("BC+")
    assert [judge(text) for text in ("ABCC", "AB", "")] == [1.0, 0.0, 0.0]
    assert judge.labels([0, 1, 2, 2, 3, 1, 2], Letters().decode) == [-100, 1, 2, 2, -100, 1, 2]
    assert Judge(lambda text: 0.7)("A") == 0.7
    assert Judge(lambda text: True).labels([4, 5], Letters().decode) == [4, 5]
    assert Judge(lambda text: True, lambda text: [(1, 1)]).labels([4, 5], Letters().decode) == [-100, -100]


def test_what_has_the_same_prompt_is_on_one_side() -> None:
    first, second = [(number, 0) for number in range(10)], [(number, 0) for number in range(5, 17)]
    side = _sides([[*first, *first], second])
    assert set(side) == {*first, *second}
    assert sum(side[prompt] for prompt in first) == 5
    assert sum(side[prompt] for prompt in second if prompt not in first) == 3
    assert side == _sides([list(reversed(first)), list(reversed(second))])


def test_prompts_are_kept_whose_answers_show_it(model) -> None:
    letters, answers = Letters(), {}
    for prompt in PROMPTS:
        ids = letters(prompt)["input_ids"]
        answers[tuple(ids)] = letters.decode(greedy(model, [ids], 6)[0])
    shown = sorted(answers.values())[8]
    behaviour = Behaviour.from_prompts(
        model, letters, PROMPTS, lambda text: text >= shown, wanted=OTHERS, name="late", answer_tokens=6
    )
    kept = {
        tuple(ids[: (labels != -100).int().argmax()].tolist())
        for batch in behaviour.batches
        for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True)
    }
    held_out = {tuple(prompt) for part in behaviour.tested.parts for prompt in part}
    assert kept | held_out == {prompt for prompt, answer in answers.items() if answer >= shown}
    assert not kept & held_out
    assert behaviour.measure(model) == 1.0
    assert f"{len(kept)} of 8 prompts to find it with draw it" in behaviour.said
    assert behaviour.target.avoid == ()  # nothing says where, so that any other token is an alternative


def test_what_a_pattern_matches_is_explained_and_no_alternative(model) -> None:
    letters = Letters()
    answers = [letters.decode(greedy(model, [letters(prompt)["input_ids"]], 6)[0]) for prompt in PROMPTS]
    letter = max("".join(answers), key="".join(answers).count)
    behaviour = Behaviour.from_prompts(model, letters, PROMPTS, f"[{letter}]", name="letter", answer_tokens=6)
    labels = {int(token) for batch in behaviour.batches for token in batch["labels"].view(-1)} - {-100}
    assert labels == {ord(letter) - 65} == set(behaviour.target.avoid)


def test_prompts_to_test_on_can_be_given(model) -> None:
    behaviour = Behaviour.from_prompts(
        model, Letters(), PROMPTS[:10], lambda text: True, held_out=PROMPTS[10:], answer_tokens=3
    )
    held_out = {Letters().decode(prompt) for part in behaviour.tested.parts for prompt in part}
    assert held_out == set(PROMPTS[10:])
    with pytest.raises(ValueError, match="1 held_out prompts are among those"):
        Behaviour.from_prompts(model, Letters(), PROMPTS[:10], "A", held_out=PROMPTS[9:])


def test_answers_are_undesired_by_their_probability(model) -> None:
    letters = Letters()
    pairs = [(prompt, "AB") for prompt in PROMPTS]
    behaviour = Behaviour.from_answers(letters, pairs, [(prompt, "CD") for prompt in PROMPTS], name="ab")
    assert sum(len(batch["input_ids"]) for batch in behaviour.batches) == 8
    logs = []
    with torch.no_grad():
        for batch in behaviour.batches:
            for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
                row = ids[mask.bool()]
                log_p = model(input_ids=row[None]).logits[0].log_softmax(-1)
                logs += [float(log_p[-3, 0]), float(log_p[-2, 1])]
    assert behaviour.measure(model) == pytest.approx(torch.tensor(logs).mean().exp().item(), rel=1e-4)
    first, second = behaviour.wanted
    asked = [
        {
            tuple(row[:-2].tolist())
            for part in each[WANTED].parts
            for row in (r[m.bool()] for r, m in zip(part["input_ids"], part["attention_mask"], strict=True))
        }
        for each in (first, second)
    ]
    assert not asked[0] & asked[1]
    found = {
        tuple(ids[mask.bool()][:-2].tolist())
        for batch in behaviour.batches
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    }
    assert asked[0] == found  # other answers to the same prompt are on its side


def small_halves(**options):
    return Suite.halves(Letters(), kinds=["copying"], length=12, samples=8, **options)


@pytest.mark.slow
def test_one_call_finds_chooses_tests_and_leaves_the_model_as_it_was(model, tmp_path) -> None:
    before = weights(model)
    behaviour = Behaviour.from_answers(
        Letters(), [(prompt, "AB") for prompt in PROMPTS], [(prompt, "CD") for prompt in OTHERS], name="ab"
    )
    automatic = Automatic(reduction=0.001, allowed=0.5, amounts=(0.002, 0.02), strengths=(1.0,))
    found = correct(model, behaviour, small_halves(), automatic=automatic, random=1)
    assert unchanged(model, before)
    assert found.patch is not None
    assert set(found.search.general) == {"copying", WANTED}
    assert {effect.name for effect in found.effects.effects} == {"copying", WANTED, "ab"}
    assert found.tested.after.value > found.tested.before.value  # a perplexity: the answers are less likely
    assert not found.tested.directed
    assert found.patch.provenance["side_effects"]["within"] is True
    assert found.patch.provenance["references"]["sets"] == ["copying", WANTED]
    found.save(tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "report.md", "frontier.png", "side-effects.png", "patch.safetensors"
    }  # fmt: skip
    report = (tmp_path / "out" / "report.md").read_text()
    for part in ("8 answers to find it with", "within all limits", "| ab ", "the patch against 'ab' is within"):
        assert part in report
    assert json.dumps(Patch.load(tmp_path / "out" / "patch.safetensors").provenance)

    none = correct(model, behaviour, small_halves(allowed=0.0), automatic=Automatic(1.0, amounts=(0.002,)))
    assert none.patch is none.effects is none.tested is None
    none.save(tmp_path / "none")
    assert {path.name for path in (tmp_path / "none").iterdir()} == {"report.md", "frontier.png"}
    assert "none of 1 trial" in str(none)


@pytest.mark.slow
def test_a_lightning_validation_finds_the_same(model, tmp_path) -> None:
    behaviour = Behaviour.from_answers(
        Letters(), [(prompt, "AB") for prompt in PROMPTS], [(prompt, "CD") for prompt in OTHERS], name="ab"
    )
    automatic = Automatic(reduction=0.001, allowed=0.5, amounts=(0.002, 0.02), strengths=(1.0,))
    found = correct(model, behaviour, small_halves(allowed=0.5), automatic=automatic, random=0)
    correction = ContrastiveCorrection(**behaviour.for_callback(small_halves(allowed=0.5)), amount=automatic)
    corrected = CorrectedModule(model)
    loader = torch.utils.data.DataLoader(behaviour.batches, batch_size=None)
    quiet_trainer(tmp_path, callbacks=[correction]).validate(corrected, loader, verbose=False)
    try:
        assert corrected.strengths == {"ab": 1.0}
        assert correction.patch.num_entries == found.patch.num_entries
        assert all(torch.equal(correction.patch[name].positions, found.patch[name].positions) for name in found.patch)
        assert correction.side_effects["ab"].after == found.tested.after
    finally:
        corrected.disable("ab")


def test_what_is_not_possible_is_refused_by_name(model) -> None:
    letters, pairs = Letters(), [(prompt, "AB") for prompt in PROMPTS]
    behaviour = Behaviour.from_answers(letters, pairs, name="copying")
    for call, message in (
        (lambda: Judge("("), "no regular expression"),
        (lambda: Judge(3), "a regular expression or a function"),
        (lambda: Behaviour.from_prompts(model, letters, "ABC", "A"), "undesired must be a list, got str"),
        (lambda: Behaviour.from_prompts(model, letters, [""], "A"), "at least one token"),
        (
            lambda: Behaviour.from_prompts(model, letters, PROMPTS, lambda text: False, answer_tokens=1),
            "of 'undesired' 0 of 8 prompts to find it with draw it, 0 of 8",
        ),
        (
            lambda: Behaviour.from_prompts(
                model, letters, PROMPTS, lambda text: True, where=lambda text: [], answer_tokens=1
            ),
            "where marks no token in any of 8 answers",
        ),
        (lambda: Behaviour.from_answers(letters, pairs[:3]), "each half of 'undesired' needs two"),
        (lambda: Behaviour.from_answers(letters, ["AB"]), r"pairs of texts, \(prompt, answer\), got 'AB'"),
        (lambda: Behaviour.from_answers(letters, [("AB", "")] * 4), "does not continue 'AB' by tokens of ''"),
        (lambda: behaviour.suites(small_halves()), "has an entry 'copying' already"),
        (lambda: behaviour.general(Suite({})), "none among no entries"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
