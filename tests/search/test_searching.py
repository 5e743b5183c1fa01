"""A search: trials are worth what they are, the test part stays unknown, nothing is left behind, and it goes on as it was."""

from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch
from torch import nn

import lrp_prune
from lrp_prune import Scope
from lrp_prune.attribution import Gamma, Where
from lrp_prune.metrics import pruning_area, top_pruning_rate
from lrp_prune.search import SearchSpace, parted, search_composite, searching
from lrp_prune.search.workers import tried
from tests.search.conftest import RATES, accuracy, state, told

OPTIONS = {"rates": RATES, "progress": False}
ONE = {"all": Where("layer")}


@pytest.mark.slow
def test_each_trial_is_worth_what_its_composite_is_and_the_best_wins(model, data) -> None:
    parts, before = parted(data), state(model)
    found = search_composite(model, data, accuracy, trials=6, pruner="none", **OPTIONS)
    assert all(map(torch.equal, state(model), before))
    space = SearchSpace().settled(model, parts.reference)
    for trial in found.tried:
        composite, order = space.composite(trial.chosen), space.order(trial.chosen)
        statistic = "signed" if order == "signed" else "abs_sample"
        relevance = lrp_prune.attribute(
            model, parts.reference, composite=composite, statistic=statistic, granularity="neuron"
        )
        for part, curve in (("selection", trial.curve), ("test", found.searched.test_curve)):
            if part == "selection" or (trial.value == found.searched.selection and trial.chosen == found.chosen):
                expected = lrp_prune.pruning_curve(
                    model, relevance, lambda m, part=part: accuracy(m, getattr(parts, part)), RATES, Scope("global", order=order),
                    progress=False,
                ).scores["relevance"]  # fmt: skip
                assert curve == expected
        assert trial.value == pruning_area(list(trial.curve), list(trial.curve.values()))
    assert len({tuple(trial.chosen.items()) for trial in found.tried}) == 6
    assert found.searched.selection == max(trial.value for trial in found.tried) == found.ranked()[0].value
    assert found.plain.selection == found.tried[0].value and found.plain.selection_curve == found.tried[0].curve
    assert found.composite == space.composite(found.chosen) and found.scope.order == space.order(found.chosen)


@pytest.mark.slow
def test_the_test_part_is_seen_once_the_winner_is_known(model, data) -> None:
    parts, seen = parted(data, seed=5), []

    def noting(pruned: nn.Module, batches) -> float:
        seen.append("test" if batches[0] is parts.test[0] else "selection")
        assert not pruned.training
        return accuracy(pruned, batches)

    search_composite(model, data, noting, trials=4, seed=5, pruner="none", **OPTIONS)
    # The plain base and four trials by three rates, and the dense model; then two curves on the test part.
    assert seen == ["selection"] * (1 + 5 * 3) + ["test"] * (1 + 2 * 3)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("at", [1, 6, 12])
def test_the_model_comes_back_from_an_error_and_from_an_interrupt(error, at, model, data) -> None:
    before, calls = state(model), []

    def failing(pruned: nn.Module, batches) -> float:
        calls.append(torch.rand(1))
        if len(calls) == at:
            raise error("stop")
        return accuracy(pruned, batches)

    with pytest.raises(error, match="stop"):
        search_composite(model, data, failing, trials=4, **OPTIONS)
    assert all(map(torch.equal, state(model), before))


@pytest.mark.parametrize("at", [9, 22])
@pytest.mark.slow
def test_a_search_that_was_interrupted_goes_on_to_the_same_trials(at, model, data, tmp_path, caplog) -> None:
    whole = search_composite(model, data, accuracy, trials=12, **OPTIONS)
    calls = []

    def killed(pruned: nn.Module, batches) -> float:
        calls.append(None)
        if len(calls) == at:
            raise KeyboardInterrupt
        return accuracy(pruned, batches)

    path = tmp_path / "search.log"
    with pytest.raises(KeyboardInterrupt):
        search_composite(model, data, killed, trials=12, storage=path, **OPTIONS)
    assert "the search stopped after" in caplog.text and "best so far" in caplog.text
    fewer = search_composite(model, data, accuracy, trials=8, storage=path, **OPTIONS)
    assert told(fewer) == told(whole)[:8]
    assert told(search_composite(model, data, accuracy, trials=12, storage=path, **OPTIONS)) == told(whole)
    again = search_composite(model, data, None or accuracy, trials=12, storage=path, **OPTIONS)
    assert (again.searched, again.plain, again.importance) == (whole.searched, whole.plain, whole.importance)


@pytest.mark.slow
def test_trials_of_another_search_are_refused_by_what_differs(model, data, tmp_path) -> None:
    path = tmp_path / "search.log"
    search_composite(model, data, accuracy, trials=2, storage=path, **OPTIONS)
    for options, name in (
        ({"seed": 1}, "data, another .*seed"),
        ({"rates": (0.0, 0.5)}, "rates"),
        ({"space": SearchSpace(rules=("gradient", "z_plus"))}, "space"),
        ({"granularity": "weight"}, "granularity, another statistic"),
        ({"metric": "top_rate"}, "metric"),
        ({"higher_is_better": False}, "higher_is_better, another direction"),
        ({"higher_is_better": False, "metric": "top_rate"}, "metric, another higher_is_better:"),
        ({"sampler": "random"}, "sampler"),
        ({"exclude": ["4.weight"]}, "options"),
    ):
        with pytest.raises(ValueError, match=f"of a search with another {name}"):
            search_composite(model, data, accuracy, trials=2, storage=path, **{**OPTIONS, **options})
    with torch.no_grad():
        model[0].weight[0, 0] += 1e-3
    with pytest.raises(ValueError, match="another model"):
        search_composite(model, data, accuracy, trials=2, storage=path, **OPTIONS)


def test_what_is_in_a_storage_and_no_search_is_refused_and_one_without_trials_is_filled(model, data, tmp_path) -> None:
    from optuna import create_study, storages

    def kept(name: str, trials: int, **attributes: str) -> storages.BaseStorage:
        storage = storages.JournalStorage(storages.journal.JournalFileBackend(str(tmp_path / name)))
        study = create_study(storage=storage, study_name="composite", direction="maximize")
        for attribute, value in attributes.items():
            study.set_user_attr(attribute, value)
        study.optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=trials)
        return storage

    options = {"space": SearchSpace(("gradient", "z_plus"), ONE, ["gradient"], ["absolute"]), "trials": 2, **OPTIONS}
    with pytest.raises(ValueError, match="of a search with another model, another data"):
        search_composite(model, data, accuracy, storage=kept("others", 1), **options)
    found = search_composite(model, data, accuracy, storage=kept("killed at once", 0, model="half"), **options)
    assert len(found.tried) == 2


def test_a_storage_that_cannot_be_is_refused_before_anything_is_evaluated(model, data, tmp_path) -> None:
    def never(pruned: nn.Module, batches) -> float:
        raise AssertionError

    (tmp_path / "notes.log").write_text("no trial\nat all\n")
    with pytest.raises(ValueError, match=r"notes\.log is none of trials"):
        search_composite(model, data, never, storage=tmp_path / "notes.log", **OPTIONS)
    for storage in (tmp_path / "missing" / "search.log", "sqlite:///search.db"):
        with pytest.raises(
            FileNotFoundError, match=r"there is no folder .*pass the storage itself, such as .*RDBStorage"
        ):
            search_composite(model, data, never, storage=storage, **OPTIONS)


@pytest.mark.slow
def test_the_plain_base_and_one_rule_everywhere_are_tried_first(model, data) -> None:
    space = SearchSpace(("gradient", "z_plus"), {"first": Where("layer", depth=range(1)), **ONE}, ["gradient"])
    found = search_composite(model, data, accuracy, space, trials=4, **OPTIONS)
    assert [trial.chosen for trial in found.tried[:3]] == list(space.starts())


@pytest.mark.slow
def test_what_is_no_number_is_told_and_is_no_result(model, data) -> None:
    with pytest.raises(ValueError, match=r"area of plain epsilon is nan, of \{0\.0: nan.* on the selection part"):
        search_composite(model, data, lambda pruned, batches: float("nan"), trials=2, **OPTIONS)
    space, calls = SearchSpace(("gradient", "z_plus", "flat"), ONE, orders=["absolute"]), []

    def failing_once(pruned: nn.Module, batches) -> float:  # after the plain base and the first trial
        calls.append(None)
        return float("nan") if len(calls) == 9 else accuracy(pruned, batches)

    found = search_composite(model, data, failing_once, space, trials=3, pruner="none", **OPTIONS)
    assert [trial.why.partition(",")[0] for trial in found.tried] == ["", "area is nan", ""]
    assert [trial.value is None for trial in found.tried] == [False, True, False] and "(1 without" in str(found)


@pytest.mark.slow
def test_bad_trials_are_given_up_at_the_first_rates(model, data) -> None:
    calls = []

    def noting(pruned: nn.Module, batches) -> float:
        calls.append(None)
        return accuracy(pruned, batches)

    found = search_composite(model, data, noting, trials=14, **OPTIONS)
    left = [trial for trial in found.tried if trial.value is None]
    assert left and all("given up after" in trial.why and 1 < len(trial.curve) < len(RATES) for trial in left)
    assert len(calls) < 1 + 15 * 3 + 1 + 2 * 3
    assert f"({len(left)} without a result)" in str(found)


@dataclass(frozen=True)
class Broken(Gamma):
    @property
    def groups(self):
        raise FloatingPointError("relevance is not finite")


@pytest.mark.slow
def test_rules_that_give_no_relevance_are_left_and_named(model, data) -> None:
    space = SearchSpace(("gradient", Broken()), ONE, orders=["absolute"])
    found = search_composite(model, data, accuracy, space, trials=5, **OPTIONS)
    assert found.exhausted and len(found.tried) == 2
    assert found.tried[1].value is None and found.tried[1].why == "relevance is not finite"
    assert "Of all 2 choices (1 without a result)" in str(found) and "prunes as plain epsilon does" in str(found)
    with pytest.raises(ValueError, match="no trial has a result: relevance is not finite"):
        search_composite(model, data, accuracy, SearchSpace((Broken(), Broken(0.5)), ONE), trials=2, **OPTIONS)


def spread(curve: dict[float, float]) -> float:
    return curve[0.0] - curve[0.6]


@pytest.mark.slow
@pytest.mark.parametrize("metric", ["top_rate", spread])
@pytest.mark.parametrize("higher", [True, False])
def test_any_metric_in_its_direction(metric, higher, model, data) -> None:
    def loss(pruned: nn.Module, batches) -> float:
        with torch.no_grad():
            return sum(float(nn.functional.cross_entropy(pruned(x), y)) for x, y in batches)

    options = {"metric": metric, "higher_is_better": higher, "pruner": "none", "trials": 6, **OPTIONS}
    found = search_composite(model, data, accuracy if higher else loss, **options)
    values = [trial.value for trial in found.tried]
    if metric == "top_rate":
        curves = [trial.curve for trial in found.tried]
        assert values == [
            top_pruning_rate(list(curve), list(curve.values()), curve[0.0], higher_is_better=higher) for curve in curves
        ]
        assert found.searched.selection == max(values)
    else:
        assert values == [spread(trial.curve) for trial in found.tried] and found.metric == "spread"
        assert found.searched.selection == (max if higher else min)(values)
    sign = 1 if found.maximized else -1
    assert found.gain == sign * (found.searched.test - found.plain.test)


@pytest.mark.slow
def test_a_sampler_is_made_from_a_seed(model, data) -> None:
    import optuna

    made = []

    def sampler(seed: int) -> optuna.samplers.BaseSampler:
        made.append(seed)
        return optuna.samplers.RandomSampler(seed=seed)

    mine = search_composite(model, data, accuracy, trials=7, sampler=sampler, pruner="none", **OPTIONS)
    assert len(set(made)) >= 1
    assert told(mine) == told(
        search_composite(model, data, accuracy, trials=7, sampler="random", pruner="none", **OPTIONS)
    )
    with pytest.raises(ValueError, match=r"pass a function, such as lambda seed: RandomSampler\(seed=seed\)"):
        search_composite(model, data, accuracy, sampler=optuna.samplers.RandomSampler(), **OPTIONS)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"trials": 0}, "trials must be an integer of at least 1"),
        ({"workers": True}, "workers must be an integer"),
        ({"sampler": "gp"}, "sampler must be one of .*'tpe'"),
        ({"pruner": "mean"}, "pruner must be one of .*'median'"),
        ({"metric": "area_under"}, "metric must be one of .*'top_rate'"),
        ({"rates": (0.0,)}, "rates must have one above 0"),
        ({"higher_is_better": 1}, "higher_is_better must be True or False"),
        ({"scope": "rows"}, "scope"),
        ({"granularity": "filter"}, "granularity must be one of"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_run(options, message, data) -> None:
    class Untouched(nn.Module):
        def forward(self, x):
            raise AssertionError

    with pytest.raises(ValueError, match=message):
        search_composite(Untouched(), data, accuracy, **{**OPTIONS, **options})


def test_without_optuna_it_is_said_how_to_get_it(model, data, monkeypatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "optuna", None)
    with pytest.raises(ImportError, match=r"pip install 'lrp-prune\[search\]'"):
        search_composite(model, data, accuracy)


@pytest.mark.slow
def test_optuna_keeps_its_own_settings(model, data, capfd) -> None:
    import optuna

    before = optuna.logging.get_verbosity()
    search_composite(model, data, accuracy, trials=2, **OPTIONS)
    assert optuna.logging.get_verbosity() == before and capfd.readouterr().err == ""


@contextmanager
def in_one_process(judge, pruner, workers):
    """The rounds of several workers, one trial after the other."""
    yield lambda trials, chosen: [tried(judge, pruner, trials, each) for each in chosen]


@pytest.mark.slow
@pytest.mark.processes
def test_workers_try_in_rounds_what_timing_has_no_part_in_and_leave_the_model(
    model, data, tmp_path, monkeypatch
) -> None:
    before, options = state(model), {**OPTIONS, "workers": 2, "storage": tmp_path / "search.log"}
    found = search_composite(model, data, accuracy, trials=5, **options)
    assert all(map(torch.equal, state(model), before))
    monkeypatch.setattr(searching, "running", in_one_process)
    resumed = search_composite(model, data, accuracy, trials=8, **options)  # from the middle of a round
    whole = search_composite(model, data, accuracy, trials=8, **{**options, "storage": None})
    assert told(resumed)[:5] == told(found) and told(resumed) == told(whole)
    assert len({tuple(trial.chosen.items()) for trial in whole.tried}) == 8


@pytest.mark.slow
def test_what_other_processes_cannot_have_is_refused(model, data) -> None:
    registered = lrp_prune.register_rule(nn.Softshrink, "activation")
    with registered, pytest.raises(ValueError, match="do not know the rule that was registered for Softshrink"):
        search_composite(model, data, accuracy, trials=2, workers=2, **OPTIONS)
    with pytest.raises(ValueError, match=r"one of them cannot be: .*Define functions and classes at the top"):
        search_composite(model, data, lambda m, b: accuracy(m, b), trials=2, workers=2, **OPTIONS)
