"""Several named sets of wanted behaviour in one contrast."""

import gc
import weakref

import pytest
import torch
from torch import Tensor, nn

from lrp_prune import Relevance
from lrp_prune.correction import Guard, Patch, together
from lrp_prune.correction.several import Together


def relevance(*values: float, name: str = "weight", **options) -> Relevance:
    return Relevance({name: torch.tensor([values])}, **{"statistic": "signed", **options})


def test_sets_count_alike_whatever_their_scale_and_number() -> None:
    small, large = relevance(3.0, -1.0, 0.0), relevance(0.0, 0.0, 500.0, num_samples=4)
    found = together({"small": small, "large": large})
    assert found["weight"].tolist() == [[0.375, -0.125, 0.5]]
    assert found.num_samples == 5
    assert together({"only": small})["weight"].tolist() == [[0.75, -0.25, 0.0]]


def test_the_largest_is_of_absolute_values() -> None:
    found = together({"a": relevance(3.0, -1.0, 0.0), "b": relevance(-1.0, 1.0, 2.0)}, "largest")
    assert found["weight"].tolist() == [[0.75, 0.25, 0.5]]


def test_weights_protect_a_set_more() -> None:
    sets = {"a": relevance(1.0, 0.0), "b": relevance(0.0, 1.0)}
    assert together(sets, weights={"b": 3})["weight"].tolist() == [[0.25, 0.75]]
    assert together(sets, "largest", {"b": 3})["weight"].tolist() == [[1.0, 3.0]]


def test_a_tensor_that_a_set_does_not_reach_is_zero_for_it() -> None:
    found = together({"a": relevance(1.0, 1.0), "b": relevance(2.0, 2.0, name="expert")})
    assert {name: found[name].tolist() for name in found} == {"weight": [[0.25, 0.25]], "expert": [[0.25, 0.25]]}


def test_of_sets_one_after_the_other_only_the_first_and_the_sum_are_held() -> None:
    found = Together()
    kept = []
    for name, values in (("a", (1.0, 3.0)), ("b", (2.0, 0.0)), ("c", (0.0, 4.0))):
        values = torch.tensor([values])
        kept.append(weakref.ref(values))
        found.add(name, Relevance({"weight": values}, statistic="signed"))
        del values
        gc.collect()
    assert [tensor() is None for tensor in kept] == [False, True, True]
    assert found.compute()["weight"][0].tolist() == pytest.approx([1.25 / 3, 1.75 / 3])
    with pytest.raises(ValueError, match="'d' were collected with statistic"):
        found.add("d", relevance(1.0, statistic="abs_token"))
    with pytest.raises(ValueError, match="none is named"):
        Together("largest").compute()


def test_what_matters_to_one_set_only_is_spared() -> None:
    """The mean over three sets would hide what one of them depends on."""
    model = nn.Linear(4, 1, bias=False)
    undesired = relevance(5.0, 4.0, 3.0, 0.1)
    sets = {
        "text": relevance(0.5, 8.0, 1.0, 4.0),
        "more text": relevance(0.6, 8.0, 1.0, 4.0),
        "copying": relevance(9.0, 0.0, 1.0, 4.0),
    }

    def chosen(general, by=None) -> list[int]:
        return Patch.from_contrast(model, general, undesired, 1, guard=Guard(0.25, by))["weight"].positions.tolist()

    assert chosen(sets) == [2]
    assert chosen(sets["text"]) == [0]
    assert chosen(sets, by=sets["text"]) == [0]
    assert chosen(sets["text"], by=sets) == [2]


def test_in_reverse_what_matters_to_the_undesired_behaviour_is_spared() -> None:
    model = nn.Linear(3, 1, bias=False)
    general, undesired = relevance(9.0, 4.0, 0.1), relevance(5.0, 0.0, 0.1)

    def chosen(sets) -> list[int]:
        patch = Patch.from_contrast(model, sets, undesired, 1, guard=Guard(0.67), reverse=True)
        return patch["weight"].positions.tolist()

    assert chosen({"text": general}) == chosen(general) == [1]


def test_the_description_names_the_sets() -> None:
    model = nn.Linear(2, 1, bias=False)
    sets = {"text": relevance(1.0, 2.0, num_samples=3), "copying": relevance(2.0, 1.0, target="next_token")}
    patch = Patch.from_contrast(model, sets, relevance(4.0, 0.1), 1)
    references = patch.provenance["references"]
    assert references["sets"]["text"]["num_samples"] == 3
    assert references["sets"]["copying"]["target"] == "next_token"
    assert references["general"]["target"] == "mean of text, copying"
    assert references["guard_by"]["target"] == "largest of text, copying"


def test_sets_that_do_not_belong_together_are_refused_by_name() -> None:
    def tensor(values: Tensor) -> Relevance:
        return Relevance({"weight": values}, statistic="signed")

    good = relevance(1.0, 2.0)
    for call, message in (
        (lambda: together({}), "none is named"),
        (lambda: together({"a": good, "b": None}), "'b' must be a Relevance"),
        (
            lambda: together({"a": good, "b": relevance(1.0, 2.0, statistic="abs_token")}),
            "'a' and 'b'.*statistic 'signed'",
        ),
        (lambda: together({"a": good, "b": tensor(torch.ones(3))}), "'a' and 'b' together: 'weight': shapes"),
        (lambda: together({"a": good, "b": Relevance({}, statistic="signed")}), "'b' holds no tensor"),
        (lambda: together({"a": good, "b": relevance(0.0, 0.0)}), "'b' is zero everywhere"),
        (lambda: together({"a": good}, "sum"), "combination must be"),
        (lambda: together({"a": good}, weights={"b": 1}), "weights has 'b'"),
        (lambda: together({"a": good}, weights={"a": 0}), "positive number, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
