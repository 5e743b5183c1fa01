"""The search over the amount, on a model whose metrics are known."""

import pytest
import torch
from torch import nn

from lrp_prune.correction import Automatic, Patch, search_amount


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
    assert (found.undesired, found.general) == (4.0, 10.0)


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
    nan = search_amount(model, first(model), total(0, 3), lambda m: float("nan"), automatic=Automatic(amounts=[3]))
    assert nan.patch is None


def test_strength_is_that_of_the_trials() -> None:
    model = line(1, 1)
    found = search_amount(
        model, first(model), total(0, 2), lambda m: 1.0, automatic=Automatic(amounts=[1, 2]), strength=0.5
    )
    assert [trial.reduction for trial in found.curve] == [0.25, 0.5]


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
        ({"allowed_loss": None}, "allowed_loss must be .* got None"),
        ({"allowed_loss": float("nan")}, "allowed_loss must be .* got nan"),
        ({"refine": 1.0}, "refine must be an integer of at least 0, got 1.0"),
        ({"amounts": 0.1}, "amounts must be a list .* got 0.1"),
        ({"amounts": "auto"}, "amounts must be a list .* got 'auto'"),
        ({"amounts": [0.5, 1.0]}, r"a fraction in amounts must be a number in \(0, 1\), got 1.0"),
        ({"amounts": ["1"]}, "a count in amounts must be .* got '1'"),
        ({"allowed_loss": -1}, "allowed_loss must be"),
        ({"general_mode": "low"}, "general_mode must be"),
        ({"refine": -1}, "refine must be"),
        ({"amounts": []}, "amounts must be a list of fractions or counts"),
        ({"amounts": [0]}, "a count in amounts must be an integer of at least 1, got 0"),
        ({"amounts": [0.1, 1]}, "all fractions or all counts"),
    ):
        with pytest.raises(ValueError, match=message):
            Automatic(**wrong)
    with pytest.raises(ValueError, match="nothing to reduce"):
        search_amount(model, first(model), lambda m: 0.0, total(0, 2))
