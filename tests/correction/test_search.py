"""The search over the amount, on a model whose metrics are known."""

import math

import pytest
import torch
from torch import nn

from lrp_prune import Relevance
from lrp_prune.correction import Automatic, Patch, search_amount
from lrp_prune.effects import Answers, Suite


def line(*values: float) -> nn.Linear:
    model = nn.Linear(len(values), 1, bias=False)
    model.weight.data.copy_(torch.tensor([values]))
    return model


def first(model: nn.Module):
    return lambda k: Patch.from_positions(model, {"weight": torch.arange(k)})


def total(start: int, stop: int):
    return lambda model: float(model.weight[0, start:stop].sum())


def test_the_smallest_amount_that_does_enough_is_chosen() -> None:
    model = line(1, 1, 1, 1, 5, 5)
    before = model.weight.detach().clone()
    found = search_amount(
        model, first(model), total(0, 4), total(4, 6), automatic=Automatic(general_mode="max", amounts=[5, 1, 2, 3])
    )
    assert found.patch is not None
    assert found.patch.num_entries == 2
    assert torch.equal(model.weight, before)
    assert [(trial.amount, trial.reduction, trial.loss, trial.accepted) for trial in found.curve] == [
        (1, 0.25, 0.0, False),
        (2, 0.5, 0.0, True),
        (3, 0.75, 0.0, True),
        (5, 1.0, 0.5, False),
    ]
    assert (found.undesired, found.general) == (4.0, {"general": 10.0})
    assert found.chosen == found.curve[1]


def test_refining_halves_the_distance_and_stopping_early_ends() -> None:
    model = line(*[1.0] * 64)
    found = search_amount(
        model,
        first(model),
        total(0, 64),
        lambda _: 1.0,
        automatic=Automatic(0.2, amounts=[2, 32, 64], refine=10),
        stop_early=True,
    )
    assert found.patch is not None
    assert found.patch.num_entries == 13
    assert max(trial.amount for trial in found.curve) == 32


def test_no_acceptable_amount_gives_no_patch_but_the_curve() -> None:
    model = line(1, 1, 1)
    found = search_amount(
        model, first(model), total(0, 3), lambda m: -float(m.weight.sum()), automatic=Automatic(amounts=[1, 2])
    )
    assert found.patch is None
    assert len(found.curve) == 2
    values = iter([1.0, float("nan")])
    nan = search_amount(model, first(model), total(0, 3), lambda m: next(values), automatic=Automatic(amounts=[3]))
    assert nan.patch is None


def test_strength_is_that_of_the_trials() -> None:
    model = line(1, 1)
    found = search_amount(
        model, first(model), total(0, 2), lambda m: 1.0, automatic=Automatic(amounts=[1, 2]), strength=0.5
    )
    assert [trial.reduction for trial in found.curve] == [0.25, 0.5]


def test_every_set_is_held_to_its_own_limit() -> None:
    """Each amount takes one more of four entries; the sets are sums of some of them."""
    model = line(1, 1, 1, 1, 8, 8)
    sets = {"first": total(0, 6), "copying": total(2, 6), "last": total(4, 6)}

    def search(allowed) -> tuple[int | None, list[str]]:
        automatic = Automatic(0.25, allowed, [1, 2, 3, 4], general_mode="max")
        found = search_amount(model, first(model), total(0, 4), sets, automatic=automatic)
        return found.patch and found.patch.num_entries, [trial.worst for trial in found.curve]

    assert search(1.0)[0] == 1
    assert search({"*": 0.02})[0] is None
    assert search({"*": 0.02, "first": 0.06}) == (1, ["first"] * 4)
    assert search({"copying": 0.0}) == (1, ["copying"] * 4)  # the others have no limit
    found = search_amount(
        model,
        first(model),
        total(0, 4),
        sets,
        automatic=Automatic(0.7, {"*": 1.0, "copying": 0.05}, [1, 2, 3, 4], general_mode="max"),
    )
    assert found.patch is None
    assert [trial.worst for trial in found.curve] == ["copying"] * 4
    assert [trial.within for trial in found.curve] == [True, True, False, False]
    assert found.curve[2].losses == {"first": 3 / 20, "copying": 1 / 18, "last": 0.0}
    assert found.reason == (
        "none of 4 trials reduces the behaviour by 70.0 % within the limits: within them 50.0 % are reached (2 entries at "
        "strength 1), and 75.0 % take +5.6 % of 'copying', where +5.0 % are allowed"
    )


def test_strengths_are_tried_with_each_amount_and_the_smallest_change_is_chosen() -> None:
    model = line(*[1.0] * 8)
    made = []

    def make(k: int) -> Patch:
        made.append(k)
        return first(model)(k)

    found = search_amount(
        model, make, total(0, 8), lambda m: 1.0, automatic=Automatic(0.3, amounts=[2, 4, 8], strengths=[1.0, 0.5])
    )
    assert sorted(made) == [2, 4, 8]
    assert [(trial.amount, trial.strength) for trial in found.curve] == [(k, s) for k in (2, 4, 8) for s in (0.5, 1.0)]
    assert found.chosen is not None
    assert (found.chosen.amount, found.chosen.strength, found.chosen.reduction) == (4, 1.0, 0.5)
    assert found.reason.startswith(
        "the smallest of 6 trials that reduces the behaviour by 30.0 % within all limits: 4 entries at"
    )


def test_the_frontier_has_what_no_trial_beats() -> None:
    model = line(4, 1, 1, 2, 6)

    def make(k: int) -> Patch:
        return Patch.from_positions(model, {"weight": torch.tensor([[4], [0, 1], [1, 2, 3], [0, 1, 2, 3]][k - 1])})

    found = search_amount(
        model,
        make,
        total(0, 3),
        {"text": total(3, 5)},
        automatic=Automatic(general_mode="max", amounts=[1, 2, 3, 4], allowed=0.1),
    )
    assert [(trial.amount, trial.reduction, trial.loss) for trial in found.frontier] == [
        (2, 5 / 6, 0.0),
        (4, 1.0, 0.25),
    ]
    assert found.chosen == found.curve[1]
    rows = found.table().splitlines()
    assert [row.split("|")[1].strip() for row in rows[4:]] == ["", "*", "", "o"]
    assert str(found).endswith(found.reason)


def test_the_figure_shows_frontier_strengths_and_choice(tmp_path) -> None:
    model = line(1, 1, 1, 1)
    found = search_amount(
        model, first(model), total(0, 4), total(0, 4), automatic=Automatic(0.5, 1.0, [1, 2, 3], strengths=[0.5, 1.0])
    )
    figure = found.plot(tmp_path / "frontier.png")
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert names == ["frontier", "strength 0.5", "strength 1", "chosen", "wanted"]
    assert (tmp_path / "frontier.png").stat().st_size > 5000


def test_a_suite_is_a_measure_of_each_of_its_entries() -> None:
    """A model that can say two things: what takes one of them away is refused by the name of that text."""
    model = nn.Sequential(nn.Embedding(2, 2), nn.Linear(2, 2, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(2))
        model[1].weight.copy_(torch.tensor([[4.0, 0.0], [0.0, 4.0]]))
    suite = Suite({"zeros": torch.zeros(2, 6, dtype=torch.int64), "ones": torch.ones(2, 6, dtype=torch.int64)})
    places = torch.tensor([0, 3])

    def make(k: int) -> Patch:
        return Patch.from_positions(model, {"1.weight": places[-k:]})

    def behaviour(model: nn.Module) -> float:
        return float(model[1].weight.abs().sum())

    found = search_amount(model, make, behaviour, suite, automatic=Automatic(0.5, 0.02, [1, 2], strengths=[0.1, 1.0]))
    assert found.patch is None
    one = next(trial for trial in found.curve if (trial.amount, trial.strength) == (1, 1.0))
    assert one.losses == pytest.approx({"zeros": 0.0, "ones": 2 / (1 + math.exp(-4)) - 1}, rel=1e-5)
    assert one.worst == "ones"
    assert "'ones', where +2.0 % are allowed" in found.reason
    allowed = search_amount(model, make, behaviour, suite, automatic=Automatic(0.5, {"*": 0.02, "ones": 1.0}, [1, 2]))
    assert allowed.patch is not None
    assert allowed.patch.num_entries == 1


def test_a_failing_metric_leaves_the_model_as_it_was() -> None:
    model = line(1, 2)
    before = model.weight.detach().clone()

    def failing(model: nn.Module) -> float:
        if not model.weight.all():
            raise RuntimeError("no")
        return 1.0

    with pytest.raises(RuntimeError, match="no"):
        search_amount(model, first(model), failing, failing, automatic=Automatic(amounts=[1]))
    assert torch.equal(model.weight, before)


def test_under_autocast_each_trial_runs_the_weights_that_are_there() -> None:
    model = line(1, 1, 1, 1)

    def output(model: nn.Module) -> float:
        return float(model(torch.ones(1, 4)))

    with torch.autocast("cpu", torch.bfloat16):
        found = search_amount(model, first(model), output, lambda _: 1.0, automatic=Automatic(amounts=[1, 2, 3]))
        after = output(model)
    assert [trial.undesired for trial in found.curve] == [3.0, 2.0, 1.0]
    assert (found.undesired, after) == (4.0, 4.0)


def test_wrong_arguments() -> None:
    model = line(1, 2)
    for wrong, message in (
        ({"reduction": 0}, "reduction must be"),
        ({"reduction": True}, "reduction must be .* got True"),
        ({"reduction": "half"}, "reduction must be .* got 'half'"),
        ({"refine": 1.0}, "refine must be an integer of at least 0, got 1.0"),
        ({"amounts": 0.1}, "amounts must be a list .* got 0.1"),
        ({"amounts": "auto"}, "amounts must be a list .* got 'auto'"),
        ({"amounts": [0.5, 1.0]}, r"a fraction in amounts must be a number in \(0, 1\), got 1.0"),
        ({"amounts": ["1"]}, "a count in amounts must be .* got '1'"),
        ({"allowed": float("nan")}, r"allowed\['\*'\] must be .* got nan"),
        ({"allowed": -1}, r"allowed\['\*'\] must be"),
        ({"allowed": {"text": "2 %"}}, r"allowed\['text'\] must be"),
        ({"strengths": []}, "strengths must be"),
        ({"strengths": [2.0]}, "strength must be"),
        ({"general_mode": "low"}, "general_mode must be"),
        ({"refine": -1}, "refine must be"),
        ({"amounts": []}, "amounts must be a list of fractions or counts"),
        ({"amounts": [0]}, "a count in amounts must be an integer of at least 1, got 0"),
        ({"amounts": [0.1, 1]}, "all fractions or all counts"),
    ):
        with pytest.raises(ValueError, match=message):
            Automatic(**wrong)
    for general, message in (
        ({}, "several by name"),
        ("perplexity", "several by name"),
        ({"text": 3}, "several by name"),
    ):
        with pytest.raises(ValueError, match=message):
            search_amount(model, first(model), total(0, 2), general)
    with pytest.raises(ValueError, match=r"allowed\['poems'\] matches none of text"):
        search_amount(
            model, first(model), total(0, 2), {"text": total(0, 2)}, automatic=Automatic(allowed={"poems": 0.1})
        )
    with pytest.raises(ValueError, match="nothing to reduce"):
        search_amount(model, first(model), lambda m: 0.0, total(0, 2))


def test_a_suite_s_own_limits_are_those_of_the_search_unless_it_has_others() -> None:
    class Tokenizer:
        def decode(self, ids, skip_special_tokens):
            return ""

    model = line(1, 1, 8)
    losses = {"weak": lambda m: m.weight[0, 2:].detach().log(), "half": lambda m: m.weight[0, 1:2].detach() / 8}
    suite = Suite(
        {**losses, "said": Answers([[1]], Tokenizer())}, allowed={"*": 0.02, "half": 0.3, "said: words": 0.01}
    )

    def found(**options):
        automatic = Automatic(amounts=[1], general_mode="min", **options)
        return search_amount(model, first(model), total(0, 2), suite, automatic=automatic)

    assert found().allowed == {"weak": 0.02, "half": 0.3}
    assert found(allowed=0.5).allowed == {"weak": 0.5, "half": 0.5}
    alone = search_amount(model, first(model), total(0, 2), lambda _: 1.0, automatic=Automatic(amounts=[1]))
    assert alone.allowed == {"general": 0.01}


def test_the_chosen_strength_is_in_the_description() -> None:
    model = line(1, 1, 1, 1)
    automatic = Automatic(0.1, amounts=[1, 2], strengths=[0.5, 1.0])
    found = search_amount(model, first(model), total(0, 4), lambda _: 1.0, automatic=automatic)
    assert found.patch is not None
    assert found.patch.provenance["strength"] == found.chosen.strength == 0.5


def test_what_cannot_be_held_to_anything_is_refused_before_the_first_trial() -> None:
    model = line(1, 1)
    words = Suite({"said": Answers([[1]], type("Tokenizer", (), {"decode": str})())})
    for general, message in (
        (words, "general must be .* a Suite with an entry that has a direction"),
        ({"fine": lambda _: 1.0, "broken": lambda _: math.nan}, "the measure 'broken' is nan before any correction"),
    ):
        with pytest.raises(ValueError, match=message):
            search_amount(model, lambda _: pytest.fail("tried"), total(0, 2), general)


def test_amounts_that_are_less_than_one_entry_are_left_out(caplog) -> None:
    model = line(*[1.0] * 100)
    general, undesired = (Relevance({"weight": torch.rand(1, 100)}, statistic="signed") for _ in range(2))

    def make(amount: float | int) -> Patch:
        return Patch.from_contrast(model, general, undesired, amount)

    with caplog.at_level("INFO", "lrp_prune"):
        found = search_amount(model, make, total(0, 100), lambda _: 1.0)
    assert [trial.entries for trial in found.curve] == [1]  # of all that are tried by default only 1 % is one
    assert caplog.text.count("of 100 entries is none") == 5
    with pytest.raises(ValueError, match=r"amount 0\.001 of 100 entries is none"):
        search_amount(model, make, total(0, 100), lambda _: 1.0, automatic=Automatic(amounts=[0.001]))
    with pytest.raises(ValueError, match="may be removed"):
        search_amount(model, make, total(0, 100), lambda _: 1.0, automatic=Automatic(amounts=[0.9]))
