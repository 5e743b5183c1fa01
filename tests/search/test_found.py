"""What was found can be used as it is, and says honestly what it gains."""

import json
from dataclasses import replace

import pytest
import torch

import lrp_prune
from lrp_prune.search import search_composite
from tests.search.conftest import RATES, accuracy, made_data, made_model

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def found():
    return search_composite(made_model(), made_data(), accuracy, trials=10, rates=RATES, progress=False)


def test_its_file_is_a_composite_wherever_one_is_asked_for(found, model, data, tmp_path) -> None:
    path = tmp_path / "best.yaml"
    found.save(path)
    assert lrp_prune.Composite.from_yaml(path) == found.composite
    relevance = lrp_prune.attribute(model, data, composite=str(path), granularity="neuron", statistic=found.statistic)
    expected = lrp_prune.attribute(
        model, data, composite=found.composite, granularity="neuron", statistic=found.statistic
    )
    assert all(torch.equal(relevance[name], expected[name]) for name in expected) and relevance.rules == expected.rules
    comments = [line[2:] for line in path.read_text().splitlines() if line.startswith("# ")]
    assert comments[:2] == str(found).splitlines() and f"scope={found.scope!r}" in comments[2]
    masks = lrp_prune.prune(model, data, 0.5, found.method, found.scope, granularity="neuron", recalibrate=False)
    assert masks.granularity == "neuron" and found.method.composite == found.composite
    with pytest.raises(ValueError, match=r"\.yaml"):
        found.save(tmp_path / "best.json")


def test_the_sentence_says_what_was_chosen_and_what_it_gains_or_loses(found) -> None:
    assert all(f"{axis}: {choice}" in str(found) for axis, choice in found.chosen.items())
    better = replace(
        found, searched=replace(found.searched, selection_curve={}, test=0.75), plain=replace(found.plain, test=0.5)
    )
    assert "test part, by which nothing was chosen, is 0.7500, and beats plain epsilon (0.5000) by 0.2500" in str(
        better
    )
    assert "0.7500, and is behind plain epsilon (0.5000) by 0.2500" in str(replace(better, maximized=False))
    equal = replace(better, plain=replace(found.plain, test=0.75))
    unknown = replace(better, plain=replace(found.plain, test=float("nan")))
    assert "and cannot be compared with plain epsilon (nan); on the selection" in str(unknown)
    assert "equals plain epsilon (0.7500) by" not in str(equal) and "equals plain epsilon (0.7500)" in str(equal)


def test_trials_are_a_table_and_plain_values(found) -> None:
    values = json.loads(json.dumps(found.to_dict()))
    assert [trial["number"] for trial in values["trials"]] == list(range(10))
    assert values["epsilon"]["test"] == found.plain.test and values["composite"] == found.composite.description
    first = found.ranked()[0]
    assert f"{first.value:.4f}" in found.table(1) and found.table(1).count("\n") == 2
    assert set(found.importance) == set(found.chosen)
    assert sum(found.importance.values()) == pytest.approx(1.0) and min(found.importance.values()) >= 0


def test_the_figure_shows_trials_importance_and_curves(found, tmp_path) -> None:
    pytest.importorskip("matplotlib")
    figure = found.plot(tmp_path / "search.png")
    history, importance, curves = figure.axes
    known = [(trial.number, trial.value) for trial in found.tried if trial.value is not None]
    assert history.collections[0].get_offsets().tolist() == [list(map(float, pair)) for pair in known]
    assert sorted(patch.get_width() for patch in importance.patches) == pytest.approx(sorted(found.importance.values()))
    assert list(curves.lines[0].get_ydata()) == list(found.searched.test_curve.values())
    assert (tmp_path / "search.png").stat().st_size > 5000
    replace(found, tried=found.tried[:1], importance={}).plot()
