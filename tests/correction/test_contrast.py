"""The contrast of two relevances: against direct computation, for each option, and on each granularity."""

import pytest
import torch
from torch import Tensor, nn

from lrp_prune import Member, Relevance, attribute
from lrp_prune.correction import Contrast, Guard, Patch
from lrp_prune.relevance.unscored import UNREACHED
from tests.support.small_models import batch_for, build


def pair(seed: int = 0, statistic: str = "signed") -> tuple[Relevance, Relevance]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"a.weight": (40, 30), "b.weight": (7, 11), "b.bias": (13,)}

    def some(scale: float) -> Relevance:
        values = {name: scale * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
        return Relevance(values, statistic=statistic, num_samples=3)

    return some(3.0), some(100.0)


def flat(relevance) -> Tensor:
    return torch.cat([relevance[name].reshape(-1) for name in relevance]).double()


def chosen(contrast: Contrast, amount) -> Tensor:
    found = contrast.lowest(amount)
    names = contrast.names
    return torch.cat(
        [found.get(name, torch.zeros(contrast.general[name].shape, dtype=torch.bool)).reshape(-1) for name in names]
    )


def test_the_papers_contrast_is_the_plain_difference_lowest_first() -> None:
    general, undesired = pair()
    contrast = Contrast(general, undesired, normalize=None, guard=None)
    difference = flat(general) - flat(undesired)
    torch.testing.assert_close(flat(contrast.relevance()), difference, rtol=1e-5, atol=1e-5)
    expected = torch.zeros(len(difference), dtype=torch.bool)
    expected[difference.argsort()[:50]] = True
    assert torch.equal(chosen(contrast, 50), expected)
    assert contrast.relevance().derived


def test_total_normalisation_removes_the_scale_of_the_sets() -> None:
    general, undesired = pair()
    difference = flat(general) / flat(general).abs().sum() - flat(undesired) / flat(undesired).abs().sum()
    torch.testing.assert_close(
        flat(Contrast(general, undesired, guard=None).relevance()), difference, rtol=1e-4, atol=1e-9
    )
    scaled = Contrast(general, undesired * 1000, guard=None)
    assert torch.equal(chosen(scaled, 50), chosen(Contrast(general, undesired, guard=None), 50))


@pytest.mark.parametrize("by", ["mean", "sum", "max"])
def test_other_normalisations_are_tensor_by_tensor(by: str) -> None:
    general, undesired = pair()
    difference = flat(general.normalized(by)) - flat(undesired.normalized(by))
    contrast = Contrast(general, undesired, normalize=by, guard=None)
    torch.testing.assert_close(flat(contrast.relevance()), difference, rtol=1e-4, atol=1e-7)


def test_the_guard_spares_what_matters_generally() -> None:
    general, undesired = pair()
    contrast = Contrast(general, undesired, guard=0.3)
    magnitude = flat(general).abs()
    allowed = torch.zeros(len(magnitude), dtype=torch.bool)
    allowed[magnitude.argsort()[: round(0.3 * len(magnitude))]] = True
    assert contrast.num_candidates == int(allowed.sum())
    difference = flat(general) / flat(general).abs().sum() - flat(undesired) / flat(undesired).abs().sum()
    expected = torch.zeros(len(magnitude), dtype=torch.bool)
    expected[difference.masked_fill(~allowed, float("inf")).argsort()[:60]] = True
    assert torch.equal(chosen(contrast, 60), expected)
    assert torch.equal(chosen(contrast, contrast.num_candidates), allowed)
    assert torch.equal(
        chosen(Contrast(general, undesired, guard=1.0), 60), chosen(Contrast(general, undesired, guard=None), 60)
    )


def test_the_guard_by_another_measure_and_by_layer() -> None:
    general, undesired = pair()
    measure, _ = pair(seed=9, statistic="abs_token")
    contrast = Contrast(general, undesired, guard=Guard(0.5, by=measure, scope="layer"))
    found = contrast.lowest(contrast.num_candidates)
    for name in general:
        magnitude = measure[name].abs().reshape(-1)
        allowed = torch.zeros(magnitude.numel(), dtype=torch.bool)
        allowed[magnitude.argsort()[: round(0.5 * magnitude.numel())]] = True
        assert torch.equal(found[name].reshape(-1), allowed)


def test_reverse_asks_what_serves_the_general_behaviour_only() -> None:
    general, undesired = pair()
    reverse = Contrast(general, undesired, reverse=True, guard=0.5)
    swapped = Contrast(undesired, general, guard=0.5)
    assert torch.equal(chosen(reverse, 40), chosen(swapped, 40))


def test_include_and_exclude() -> None:
    general, undesired = pair()
    contrast = Contrast(general, undesired, include=["b"], exclude=["*.bias"], guard=None)
    assert contrast.names == ["b.weight"]
    assert contrast.num_entries == 77
    assert set(contrast.lowest(0.5)) == {"b.weight"}
    for wrong in ({"include": ["c"]}, {"exclude": ["c"]}):
        with pytest.raises(ValueError, match="matches none of"):
            Contrast(general, undesired, **wrong)
    with pytest.raises(ValueError, match="must be a list"):
        Contrast(general, undesired, include="b")
    with pytest.raises(ValueError, match="leave no tensor"):
        Contrast(general, undesired, include=["b"], exclude=["b"])


def test_large_tensors_are_read_in_pieces_and_ties_go_by_position() -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randint(-3, 4, (700, 301), generator=generator).float()
    general = Relevance({"w": torch.ones(700, 301)}, statistic="signed")
    contrast = Contrast(general, Relevance({"w": -values}, statistic="signed"), normalize=None, guard=None)
    k = 1234
    expected = torch.zeros(values.numel(), dtype=torch.bool)
    expected[values.view(-1).argsort(stable=True)[:k]] = True
    assert torch.equal(contrast.lowest(k)["w"].view(-1), expected)


def test_amounts() -> None:
    general, undesired = pair()
    contrast = Contrast(general, undesired, guard=0.1)
    assert contrast.count(0.05) == round(0.05 * contrast.num_entries)
    assert int(chosen(contrast, 0.05).sum()) == round(0.05 * contrast.num_entries)
    assert int(chosen(contrast, 1).sum()) == 1
    for amount, message in (
        (0, "is none"),
        (-1, "is none"),
        (1e-9, "is none"),
        (1.0, r"fraction in \(0, 1\)"),
        (True, "fraction"),
        ("0.1", "fraction"),
        (0.2, "only 129 of 1,290 may be removed"),
    ):
        with pytest.raises(ValueError, match=message):
            contrast.lowest(amount)


def test_what_does_not_belong_together_is_refused() -> None:
    general, undesired = pair()
    zero = Relevance({name: torch.zeros_like(undesired[name]) for name in undesired}, statistic="signed")
    with pytest.raises(ValueError, match="undesired relevance is zero everywhere"):
        Contrast(general, zero)
    with pytest.raises(ValueError, match="undesired relevance holds no tensor: was its reference set empty"):
        Contrast(general, Relevance({}, statistic="signed"))
    with pytest.raises(ValueError, match="statistic 'signed' and 'abs_token'"):
        Contrast(general, pair(statistic="abs_token")[1])
    with pytest.raises(ValueError, match="must be a Relevance, got dict"):
        Contrast(general, {})
    with pytest.raises(ValueError, match=r"'b\.bias' is in one of them only"):
        Contrast(general, Relevance({name: undesired[name] for name in list(undesired)[:2]}, statistic="signed"))
    with pytest.raises(ValueError, match="has shape"):
        Contrast(general, Relevance({name: torch.ones(2) for name in undesired}, statistic="signed"))
    for wrong, message in (
        ({"normalize": "median"}, "normalize must be"),
        ({"guard": 0.0}, r"guard must be None, a Guard, or in \(0, 1\].* got 0.0"),
        ({"guard": 1.5}, r"guard must be None, a Guard, or in \(0, 1\].* got 1.5"),
        ({"guard": "most"}, "guard must be .* got 'most'"),
        ({"guard": Guard(by="abs_token")}, r"pass the relevance of the general set, Guard\(by="),
        ({"reverse": 1}, "reverse must be True or False, got 1"),
    ):
        with pytest.raises(ValueError, match=message):
            Contrast(general, undesired, **wrong)
    for wrong, message in (
        ({"share": None}, r"the guard's share must be in \(0, 1\], got None"),
        ({"share": True}, "the guard's share must be"),
        ({"scope": "row"}, "the guard's scope must be one of .* got 'row'"),
        ({"by": "most"}, "the guard's statistic must be one of .* got 'most'"),
    ):
        with pytest.raises(ValueError, match=message):
            Guard(**wrong)
    with pytest.raises(ValueError, match="infinite or NaN"):
        bad = Relevance({**undesired, "b.bias": torch.full((13,), float("nan"))}, statistic="signed")
        Contrast(general, bad, normalize=None).lowest(5)


def test_a_tensor_that_one_set_never_reached_counts_as_zero() -> None:
    shapes = {"a": (4,), "b": (2,)}
    general = Relevance({"a": torch.ones(4)}, statistic="signed", unscored={"b": UNREACHED}, parameter_shapes=shapes)
    undesired = Relevance({"a": torch.ones(4), "b": torch.ones(2)}, statistic="signed")
    contrast = Contrast(general, undesired, normalize=None, guard=None)
    assert contrast.relevance()["b"].tolist() == [-1, -1]
    assert {name: mask.tolist() for name, mask in contrast.lowest(2).items()} == {"b": [True, True]}


@pytest.mark.parametrize("granularity", ["neuron", "head"])
def test_units_go_by_their_contribution_or_as_a_whole(granularity: str) -> None:
    model = build("llama")
    general, undesired = (
        attribute(
            model,
            [{"input_ids": batch_for("llama")["input_ids"] + shift}],
            granularity=granularity,
            target="next_token",
        )
        for shift in (0, 5)
    )
    include = ["*.mlp.*"] if granularity == "neuron" else None
    contrast = Contrast(general, undesired, include=include, guard=None)
    found = contrast.lowest(3)
    assert sum(int(mask.sum()) for mask in found.values()) == 3
    masks = contrast.masks(3)
    for name, mask in found.items():
        member = general.members[name][0]
        removed = ~masks[member.parameter]
        wanted = torch.zeros_like(removed)
        wanted.index_fill_(member.dim, mask.repeat_interleave(member.width).nonzero().view(-1), True)
        assert torch.equal(removed, wanted)
    assert set(masks) == {general.members[name][0].parameter for name in found}
    whole = contrast.masks(3, removal="all")
    assert set(whole) == {member.parameter for name in found for member in general.members[name]}
    # Both remove the same contributions, so the model computes the same.
    outputs = []
    for removal in ("contribution", "all"):
        patched = build("llama")
        Patch.from_contrast(patched, general, undesired, 3, guard=None, include=include, removal=removal).apply_(
            patched
        )
        outputs.append(patched(**batch_for("llama")).logits)
    torch.testing.assert_close(outputs[0], outputs[1])
    with pytest.raises(ValueError, match="removal must be"):
        contrast.masks(3, removal="half")
    assert isinstance(general.members[name][0], Member)


def test_the_patch_records_how_it_was_made() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    generator = torch.Generator().manual_seed(0)
    general, undesired = (
        attribute(model, [(torch.randn(5, 4, generator=generator), torch.randint(2, (5,)))], statistic="signed")
        for _ in range(2)
    )
    patch = Patch.from_contrast(
        model, general, undesired, amount=0.1, behaviour="errors", references={"set": "validation"}, exclude=["2"]
    )
    assert patch.num_entries == round(0.1 * 32)
    assert patch.provenance["options"]["amount"] == 0.1
    assert patch.provenance["options"]["guard"] == 0.7
    assert patch.provenance["options"]["exclude"] == ["2"]
    assert patch.provenance["references"]["undesired"]["num_samples"] == 5
    assert patch.provenance["references"]["set"] == "validation"
    assert patch.provenance["model"] == "Sequential"
    assert len(patch.provenance["fingerprint"]) == 64
