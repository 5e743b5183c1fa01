"""Sparsity is of everything that was asked for: exactly, or refused, and never without a word."""

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import nn

import lrp_prune
from lrp_prune import Relevance
from lrp_prune.pruning import METHODS, Masks, select
from lrp_prune.relevance.unscored import UNREACHED, UNUSED, UnscoredWeightsWarning

COMPUTED = "what is used is computed from it (by Orthogonal), and its zeros would be none there"


def relevance_of(scored: dict[str, tuple[int, ...]], unscored: dict[str, tuple[int, ...]], reason: str = UNREACHED) -> Relevance:  # fmt: skip  # noqa: E501
    generator = torch.Generator().manual_seed(0)
    values = {name: torch.randn(shape, generator=generator) for name, shape in scored.items()}
    shapes = {name: shape for name, shape in sorted({**scored, **unscored}.items())}
    reasons = dict.fromkeys(unscored, reason)
    return Relevance(values, statistic="signed", parameter_shapes=shapes, unscored=reasons)


def quietly(relevance: Relevance, *args: Any, **options: Any) -> Masks:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnscoredWeightsWarning)
        return select(relevance, *args, **options)


def test_globally_the_scored_weights_make_up_for_the_others() -> None:
    relevance = relevance_of({"a": (10, 10), "c": (20, 5)}, {"b": (7, 10)})
    with pytest.warns(
        UnscoredWeightsWarning, match=r"70 of 270 weights \(25\.9 %\) are not scored and stay dense: b \(no rel"
    ):
        masks = select(relevance, 0.5, scope="global")
    assert masks.num_pruned == 135 and masks.num_entries == 270 and masks.sparsity == 0.5
    assert list(masks) == ["a", "b", "c"] and masks.pruned_in("b") == 0 and masks["b"].all()
    assert masks.unscored == {"b": UNREACHED}
    values = torch.cat([relevance[name].view(-1) for name in ("a", "c")]).abs()
    kept = torch.cat([masks[name].view(-1) for name in ("a", "c")])
    assert values[~kept].max() < values[kept].min()


def test_the_warning_says_by_how_much_they_do_and_how_to_leave_them_out() -> None:
    relevance = relevance_of({"a": (10, 10)}, {"layers.0.q": (5, 5), "layers.1.q": (5, 5)})
    with pytest.warns(UnscoredWeightsWarning) as told:
        select(relevance, 0.5, scope="global")
    assert len(told) == 1
    message = str(told[0].message)
    assert "The others are pruned to 75.00%, which is 50.00% of all" in message
    assert "exclude=['layers.*.q']" in message


def test_without_unscored_weights_nothing_is_said() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert select(relevance_of({"a": (10, 10)}, {}), 0.5, scope="global").unscored == {}


@pytest.mark.parametrize("sparsity", [0.6, 0.9])
def test_more_than_all_that_is_scored_is_refused(sparsity: float) -> None:
    relevance = relevance_of({"a": (6, 10)}, {"b": (4, 10)})
    with pytest.raises(
        ValueError, match=rf"sparsity {sparsity} of 100 weights is .*only 60 of them are scored.*exclude=\['b'\]"
    ):
        select(relevance, sparsity, scope="global")
    assert quietly(relevance, 0.59, scope="global").num_pruned == 59


@pytest.mark.parametrize(("scope", "sparsity"), [("layer", 0.5), ("row", 0.5), ("column", 0.5), ("2:4", 0.5)])
def test_scopes_that_cannot_make_up_for_many_are_refused(scope: str, sparsity: float) -> None:
    few = relevance_of({"a": (20, 8), "c": (20, 8)}, {"b": (2, 8)})
    with pytest.warns(
        UnscoredWeightsWarning, match=r"16 of 336 weights \(4\.8 %\).*pruned to 50\.00%, which is 47\.62% of all"
    ):
        masks = select(few, sparsity, scope=scope)
    assert masks.num_pruned == 160 and masks.sparsity == pytest.approx(160 / 336)
    many = relevance_of({"a": (20, 8), "c": (20, 8)}, {"b": (3, 8)})
    with pytest.raises(ValueError, match=r"sparsity 0\.5 cannot be reached.*24 of 344 weights.*scope='global'"):
        select(many, sparsity, scope=scope)


def test_each_pattern_of_a_mapping_is_of_what_it_names() -> None:
    relevance = relevance_of({"a.one": (10, 10), "b.one": (10, 10)}, {"a.two": (5, 10), "c.one": (2, 2)})
    masks = quietly(relevance, {"a": 0.5, "b": 0.25}, scope="global")
    assert masks.pruned_in("a.one") == 75 and masks.pruned_in("b.one") == 25
    assert set(masks) == {"a.one", "a.two", "b.one"} and set(masks.unscored) == {"a.two"}
    with pytest.raises(
        ValueError, match=r"sparsity\['c\.\*'\] = 0\.5 is of weights that are not scored: c\.one \(no relevance"
    ):
        select(relevance, {"b": 0.5, "c.*": 0.5}, scope="global")
    with pytest.raises(ValueError, match=r"sparsity\['a'\] = 0\.7 of 150 weights is 105, and only 100"):
        select(relevance, {"b": 0.5, "a": 0.7}, scope="global")
    with pytest.raises(ValueError, match=r"sparsity\['d'\] matches no tensor"):
        select(relevance, {"d": 0.5}, scope="global")


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_weights_whose_zeros_would_be_none_are_refused_however_few(scope: str) -> None:
    relevance = relevance_of({"a": (100, 10)}, {"b": (1, 10)}, COMPUTED)
    with pytest.raises(ValueError, match=r"cannot prune b \(what is used is computed .*exclude=\['b'\]"):
        select(relevance, 0.5, scope=scope)
    assert select(relevance, {"a": 0.5}, scope=scope).sparsity == 0.5


def test_what_an_earlier_round_pruned_stays_and_counts() -> None:
    """An expert that tokens went to in the first round and not in the second."""
    shapes = {"a": (10, 10), "b": (10, 10)}
    first = select(relevance_of(shapes, {}), 0.4, scope="global")
    second = quietly(relevance_of({"a": (10, 10)}, {"b": (10, 10)}, UNUSED), 0.6, scope="global", existing=first)
    assert torch.equal(second["b"], first["b"]) and second.num_pruned == 120
    assert second.unscored == {}  # what it matters was known once
    never = quietly(relevance_of({"a": (10, 10)}, {"b": (10, 10)}, UNUSED), 0.2, scope="global")
    again = quietly(relevance_of({"a": (10, 10)}, {"b": (10, 10)}, UNUSED), 0.3, scope="global", existing=never)
    assert again.unscored == {"b": UNUSED} and again.num_pruned == 60
    assert not again["a"][~never["a"]].any()
    layerwise = select(relevance_of({"a": (10, 10)}, {"b": (10, 10)}, UNUSED), 0.5, scope="layer", existing=first)
    assert torch.equal(layerwise["b"], first["b"]) and layerwise.pruned_in("a") == 50
    heavy = Masks({"b": torch.zeros(10, 10, dtype=torch.bool)})
    with pytest.raises(ValueError, match="is 20, but 100 are pruned already in b alone"):
        select(relevance_of({"a": (10, 10)}, {"b": (10, 10)}, UNUSED), 0.1, scope="global", existing=heavy)


def test_masks_carry_what_is_unscored_everywhere(tmp_path: Any) -> None:
    masks = quietly(relevance_of({"a": (10, 10)}, {"b": (10, 10)}), 0.25, scope="global")
    masks.save(tmp_path / "masks.safetensors")
    for other in (
        Masks.load(tmp_path / "masks.safetensors"),
        Masks.from_state_dict(masks.state_dict()),
        masks.gathered(),
        masks.divided({}),
        copy.deepcopy(masks),
        masks & masks,
        masks | masks,
        ~~masks,
    ):
        assert other == masks and other.unscored == {"b": UNREACHED}
    assert "1 unscored" in repr(masks)
    inverted = ~masks
    assert inverted.num_pruned == 50 and inverted["b"].all()  # nobody knows what it matters on either side
    known = Masks({"a": masks["a"], "b": torch.ones(10, 10, dtype=torch.bool)})
    assert (masks & known).unscored == {} and (known | masks).unscored == {}
    state = masks.state_dict()
    del state["unscored"]  # as an earlier version wrote it
    assert Masks.from_state_dict(state) == masks


def test_relevance_keeps_the_reasons(tmp_path: Any) -> None:
    relevance = relevance_of({"a": (3, 3)}, {"b": (2, 2)})
    relevance.save(tmp_path / "relevance.safetensors")
    loaded = Relevance.load(tmp_path / "relevance.safetensors")
    for other in (loaded, relevance + relevance, relevance * 2, relevance.normalized()):
        assert other.unscored == {"b": UNREACHED} and other.parameter_shapes["b"] == (2, 2)
    assert "1 tensors unscored" in repr(loaded)


class TwoHeads(nn.Module):
    """One of the heads is never looked at."""

    def __init__(self, unused: int) -> None:
        super().__init__()
        self.body, self.head, self.other = nn.Linear(8, 16), nn.Linear(16, 2), nn.Linear(16, unused)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.body(x).relu()
        return self.head(hidden)


def test_every_method_prunes_the_same_number() -> None:
    batches = [(torch.randn(8, 8), torch.randint(2, (8,)))]
    for method in METHODS:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UnscoredWeightsWarning)
            masks = lrp_prune.prune(TwoHeads(2), batches, sparsity=0.5, method=method, scope="global")
        assert (masks.num_pruned, masks.num_entries) == (96, 192)
        assert list(masks) == ["body.weight", "head.weight", "other.weight"]


def test_a_later_round_that_cannot_be_met_is_refused_before_the_first_changes_anything() -> None:
    torch.manual_seed(0)
    model, batches = TwoHeads(8), [(torch.randn(8, 8), torch.randint(2, (8,)))]
    before = copy.deepcopy(model.state_dict())
    calls: list[int] = []
    model.register_forward_hook(lambda *_: calls.append(1))
    with pytest.raises(ValueError, match=r"sparsity 0\.8 of 288 weights is 230, and only 160.*other\.weight"):
        lrp_prune.prune(model, batches, sparsity=0.8, method=lrp_prune.LRP(target="class"), rounds=4)
    assert len(calls) == 1
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_rounds_say_it_once() -> None:
    batches = [(torch.randn(8, 8), torch.randint(2, (8,)))]
    with pytest.warns(UnscoredWeightsWarning) as told:
        lrp_prune.prune(TwoHeads(2), batches, sparsity=0.5, rounds=4)
    assert sum(issubclass(entry.category, UnscoredWeightsWarning) for entry in told) == 1


def test_patterns_of_unscored_weights_are_refused() -> None:
    batches = [(torch.randn(8, 8), torch.randint(2, (8,)))]
    for function in (lrp_prune.attribute, lrp_prune.prune):
        with pytest.raises(
            ValueError, match=r"include pattern 'oth\*' names only weights that are not scored: other\.weight"
        ):
            function(TwoHeads(2), batches, include=["body", "oth*"])
    relevance = lrp_prune.attribute(TwoHeads(2), batches, include=["*"])
    assert list(relevance.unscored) == ["other.weight"] and relevance.unscored["other.weight"] == UNUSED
