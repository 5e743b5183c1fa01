"""From relevance to masks: scopes, patterns, structures, units, earlier masks."""

import math

import pytest
import torch

from lrp_prune.pruning import Masks, Scope, select
from lrp_prune.pruning.select import check_selection
from lrp_prune.relevance import Relevance
from lrp_prune.relevance.members import Member
from lrp_prune.selection.scopes import number_to_prune, parse_scope

SHAPES = {
    "layers.0.attention.weight": (6, 8),
    "layers.0.mlp.weight": (10, 12),
    "layers.1.mlp.weight": (5, 16),
}


def relevance_of(shapes=SHAPES, seed=0, ties=True, **options):
    generator = torch.Generator().manual_seed(seed)
    values = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    if ties:
        values = {name: (value * 3).round() / 3 for name, value in values.items()}
    return Relevance(values, statistic="signed", **options)


def first(values, k, order="absolute", alive=None):
    """The mask of one comparison set by a stable sort."""
    key = values.reshape(-1).double()
    key = key.abs() if order == "absolute" else key
    if alive is not None:
        key = key.masked_fill(~alive.reshape(-1), -math.inf)
    kept = torch.ones(key.numel(), dtype=torch.bool)
    kept[torch.sort(key, stable=True).indices[:k]] = False
    return kept.view(values.shape)


@pytest.mark.parametrize("order", ["absolute", "signed"])
@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.5, 0.77, 0.999])
def test_each_scope_prunes_exactly_its_share_of_each_set(sparsity, order):
    relevance = relevance_of()
    layer = select(relevance, sparsity, scope=Scope("layer", order=order))
    row = select(relevance, sparsity, scope=Scope("row", order=order))
    column = select(relevance, sparsity, scope=Scope("column", order=order))
    for name in SHAPES:
        values = relevance[name]
        rows, columns = values.shape
        assert torch.equal(layer[name], first(values, round(sparsity * values.numel()), order))
        assert torch.equal(row[name], torch.stack([first(v, round(sparsity * columns), order) for v in values]))
        expected = torch.stack([first(v, round(sparsity * rows), order) for v in values.t()], dim=1)
        assert torch.equal(column[name], expected)
    total = sum(math.prod(shape) for shape in SHAPES.values())
    together = select(relevance, sparsity, scope=Scope("global", 0, order))
    everything = torch.cat([relevance[name].view(-1) for name in SHAPES])
    assert together.num_pruned == round(sparsity * total)
    expected = first(everything, round(sparsity * total), order)
    assert torch.equal(torch.cat([together[name].view(-1) for name in SHAPES]), expected)


def test_the_nearest_count_is_pruned():
    assert [number_to_prune(rate, 100) for rate in (0.29, 0.57, 0.7)] == [29, 57, 70]
    assert number_to_prune(0.999, 10) == 10


def test_convolutions_stacks_vectors_and_transposed_weights_have_their_own_rows():
    shapes = {"conv": (4, 6, 3, 3), "experts": (3, 5, 8), "bias": (10,), "conv1d": (8, 5)}
    relevance = relevance_of(shapes)
    relevance.layouts = {"conv1d": "transposed"}
    row = select(relevance, 0.5, scope="row")
    assert torch.equal(row["conv"], torch.stack([first(v, 27) for v in relevance["conv"]]))
    experts = relevance["experts"]
    assert torch.equal(row["experts"], torch.stack([torch.stack([first(v, 4) for v in m]) for m in experts]))
    assert torch.equal(row["bias"], first(relevance["bias"], 5))
    assert torch.equal(row["conv1d"], torch.stack([first(v, 4) for v in relevance["conv1d"].t()], dim=1))
    del relevance.layouts
    relevance = Relevance({name: relevance[name] for name in ("conv", "experts")}, statistic="signed")
    column = select(relevance, 0.5, scope="column")
    assert torch.equal(column["conv"], torch.stack([first(v, 18) for v in relevance["conv"].transpose(0, 1)], dim=1))
    columns = [torch.stack([first(v, 2) for v in matrix.t()], dim=1) for matrix in experts]
    assert torch.equal(column["experts"], torch.stack(columns))
    with pytest.raises(ValueError, match=r"bias has shape \(10,\): scope 'column' needs matrices"):
        select(relevance_of(shapes), 0.5, scope="column")


@pytest.mark.parametrize(("kept", "size"), [(2, 4), (1, 4), (4, 8), (1, 2), (3, 3), (5, 20), (1, 3)])
def test_n_of_m_consecutive_inputs_are_kept(kept, size):
    shapes = {"linear": (7, 2 * size), "conv": (3, 2 * size, 3), "kernels": (3, size, 2, 2), "conv1d": (2 * size, 5)}
    relevance = relevance_of(shapes)
    relevance.layouts = {"conv1d": "transposed", "conv": "convolution"}
    masks = select(relevance, 1 - kept / size, scope=f"{kept}:{size}")
    inputs = {"linear": 1, "conv": 1, "kernels": 1, "conv1d": 0}
    for name, dim in inputs.items():
        groups = masks[name].movedim(dim, -1).reshape(-1, size)
        assert (groups.sum(dim=1) == kept).all()
        values = relevance[name].movedim(dim, -1).reshape(-1, size)
        assert torch.equal(groups, torch.stack([first(v, size - kept) for v in values]))


def test_unreachable_structures_are_refused():
    relevance = relevance_of()
    with pytest.raises(ValueError, match=r"0.7 is unreachable with scope '2:4'.*exactly 0.5"):
        select(relevance, 0.7, scope="2:4")
    with pytest.raises(ValueError, match=r"attention.weight has 8 inputs, which 3 does not divide, .*: pass exclude="):
        select(relevance, 1 / 3, scope="2:3")
    for scope in ("5:4", "0:4", "2:4:8", "rows", "", "N:M", None):
        with pytest.raises(ValueError, match="scope must be"):
            select(relevance, 0.5, scope=scope)
    assert parse_scope("8:16") == (8, 16)


def test_each_pattern_is_selected_at_its_own_rate():
    relevance = relevance_of()
    masks = select(relevance, {"layers.0.mlp": 0.25, "*.mlp": 0.75}, scope="global")
    assert list(masks) == ["layers.0.mlp.weight", "layers.1.mlp.weight"]
    assert masks.pruned_in("layers.0.mlp.weight") == 30
    assert masks.pruned_in("layers.1.mlp.weight") == 60
    together = select(relevance, {"*.mlp": 0.5}, scope="global")
    assert together.num_pruned == 100
    assert together.pruned_in("layers.0.mlp.weight") != 60
    with pytest.raises(ValueError, match=r"sparsity\['\*.norm'\] matches no tensor"):
        select(relevance, {"*.mlp": 0.5, "*.norm": 0.5})
    with pytest.raises(ValueError, match="matches only tensors that earlier patterns took"):
        select(relevance, {"*.mlp": 0.5, "layers.0.mlp": 0.5})
    with pytest.raises(ValueError, match=r"sparsity\['\*.mlp'\] must be a number in \[0, 1\), got 1.5"):
        select(relevance, {"*.mlp": 1.5})
    with pytest.raises(ValueError, match="no pattern"):
        select(relevance, {})


@pytest.mark.parametrize("sparsity", [1.0, -0.1, 1.5, math.nan, "0.5", None, True])
def test_a_sparsity_out_of_range_is_refused(sparsity):
    with pytest.raises(ValueError, match=r"sparsity must be a number in \[0, 1\)"):
        select(relevance_of(), sparsity)


def test_normalisation_matters_between_tensors():
    values = torch.rand(100, generator=torch.Generator().manual_seed(0)) + 0.1
    relevance = Relevance({"a": values, "b": values * 1000}, statistic="signed")
    assert select(relevance, 0.5, scope=Scope(floor=0)).pruned_in("a") == 100
    for by in ("mean", "sum", "max"):
        assert abs(select(relevance, 0.5, scope=Scope(normalize=by)).pruned_in("a") - 50) <= 1
    with pytest.raises(ValueError, match="normalize must be None or one of"):
        select(relevance, 0.5, Scope(normalize="median"))


@pytest.mark.parametrize("scope", ["global", "layer", "row", "column", "1:4"])
@pytest.mark.parametrize("order", ["absolute", "signed"])
def test_sparsity_is_total_over_rounds_and_what_is_pruned_stays_pruned(scope, order):
    shapes = {"a": (8, 12), "b": (16, 8)}
    masks = select(relevance_of(shapes), 0.25, scope=Scope("3:4" if scope == "1:4" else scope, order=order))
    again = select(relevance_of(shapes, seed=1), 0.75, scope=Scope(scope, order=order), existing=masks)
    direct = select(relevance_of(shapes, seed=1), 0.75, scope=Scope(scope, order=order))
    assert again.num_pruned == direct.num_pruned
    assert again & masks == again
    assert again != direct
    same = select(relevance_of(shapes, seed=2), 0.75, scope=Scope(scope, order=order), existing=again)
    assert same == again
    if scope in ("global", "layer", "row", "column"):
        with pytest.raises(ValueError, match="pruned already, more than the"):
            select(relevance_of(shapes), 0.5, scope=scope, existing=again)


def test_the_second_round_is_the_sort_of_what_is_left():
    relevance = relevance_of()
    before = select(relevance_of(seed=1), 0.3, scope="layer")
    after = select(relevance, 0.6, scope="layer", existing=before)
    for name in SHAPES:
        expected = first(relevance[name], round(0.6 * relevance[name].numel()), alive=before[name])
        assert torch.equal(after[name], expected)


def test_masks_of_other_parameters_are_taken_over():
    other = Masks({"elsewhere": torch.tensor([True, False]), "layers.0.attention.weight": torch.zeros(6, 8) > 0})
    masks = select(relevance_of(), {"*.mlp": 0.5}, existing=other)
    assert torch.equal(masks["elsewhere"], other["elsewhere"])
    assert masks.sparsity_of("layers.0.attention.weight") == 1.0
    wrong = Masks({"layers.0.mlp.weight": torch.ones(3, 4) > 0})
    with pytest.raises(ValueError, match=r"existing mask of layers.0.mlp.weight has shape \(3, 4\)"):
        select(relevance_of(), 0.5, existing=wrong)


@pytest.mark.parametrize("scope", ["global", "layer", "row", "column", "2:4"])
def test_what_is_not_finite_is_refused_by_name(scope):
    relevance = relevance_of()
    values = {name: relevance[name] for name in SHAPES}
    values["layers.0.mlp.weight"][1, 2] = math.nan
    with pytest.raises(ValueError, match=r"layers.0.mlp.weight has values that are infinite or NaN"):
        select(Relevance(values, statistic="signed"), 0.5, scope=scope)


def neurons(**values):
    members, shapes = {}, {}
    for name, value in values.items():
        n = value.numel()
        shapes |= {f"{name}.up": (n, 5), f"{name}.up_bias": (n,), f"{name}.down": (5, n), f"{name}.other": (3,)}
        owned = ((f"{name}.up", 0), (f"{name}.up_bias", 0), (f"{name}.down", 1))
        members[name] = tuple(Member.of_slices(each, shapes[each], dim, n) for each, dim in owned)
    return Relevance(values, granularity="neuron", statistic="signed", members=members, parameter_shapes=shapes)


def test_neurons_lose_all_that_belongs_to_them():
    relevance = neurons(m0=torch.tensor([1.0, -5.0, 2.0, 4.0]), m1=torch.tensor([0.5, 9.0, 0.1, 8.0, 7.0, 6.0]))
    masks = select(relevance, 0.3, scope="global")
    assert masks.granularity == "neuron"
    assert set(masks) == {f"m{i}.{part}" for i in (0, 1) for part in ("up", "up_bias", "down")}
    alive = {"m0": torch.tensor([False, True, True, True]), "m1": torch.tensor([False, True, False, True, True, True])}
    for name, kept in alive.items():
        assert torch.equal(masks[f"{name}.up"], kept[:, None].expand(-1, 5))
        assert torch.equal(masks[f"{name}.up_bias"], kept)
        assert torch.equal(masks[f"{name}.down"], kept.expand(5, -1))
    layer = select(relevance, 0.5, scope=Scope("layer", order="signed"))
    assert layer["m0.up_bias"].tolist() == [False, False, True, True]
    assert layer["m1.up_bias"].tolist() == [False, True, False, True, True, False]


def test_heads_own_blocks_of_indices():
    shapes = {"q": (12, 6), "o": (6, 12)}
    members = {"attention": (Member.of_slices("q", (12, 6), 0, 3), Member.of_slices("o", (6, 12), 1, 3))}
    values = {"attention": torch.tensor([3.0, 1.0, 2.0])}
    relevance = Relevance(values, granularity="head", members=members, parameter_shapes=shapes)
    masks = select(relevance, 0.34, scope="layer")
    expected = torch.tensor([True] * 4 + [False] * 4 + [True] * 4)
    assert torch.equal(masks["q"], expected[:, None].expand(-1, 6))
    assert torch.equal(masks["o"], expected.expand(6, -1))


def test_units_pruned_earlier_stay_pruned_and_count():
    relevance = neurons(m0=torch.tensor([1.0, 5.0, 2.0, 4.0]))
    earlier = select(neurons(m0=torch.tensor([9.0, 0.0, 9.0, 9.0])), 0.25, scope="layer")
    single = {name: earlier[name] for name in earlier}
    for mask in single.values():
        mask.view(-1)[0] = False
    single = Masks(single)
    masks = select(relevance, 0.5, scope="layer", existing=single)
    assert masks["m0.up_bias"].tolist() == [False, False, True, True]
    assert masks & single == masks
    with pytest.raises(ValueError, match="1 of 4 entries are pruned already, more than the 0 asked for"):
        select(relevance, 0.0, scope="layer", existing=earlier)


def test_units_fit_only_scopes_that_compare_them():
    relevance = neurons(m0=torch.tensor([1.0, 5.0, 2.0, 4.0]))
    for scope in ("row", "column", "2:4"):
        with pytest.raises(ValueError, match=r"about neurons: use 'global' or 'layer'"):
            select(relevance, 0.5, scope=scope)


def test_members_that_do_not_fit_are_refused():
    values = {"attention": torch.ones(4)}
    with pytest.raises(ValueError, match="which parameters the heads of attention own"):
        select(Relevance(values, granularity="head"), 0.5, scope="layer")
    members = {"attention": (Member.of_slices("q", (16, 6), 0, 4),)}
    with pytest.raises(ValueError, match="shape of q, which attention owns"):
        select(Relevance(values, granularity="head", members=members), 0.5, scope="layer")
    relevance = Relevance(values, granularity="head", members=members, parameter_shapes={"q": (12, 6)})
    with pytest.raises(
        ValueError, match=r"owners of q in attention have shape \(16, 1\), which does not fit .*\(12, 6\)"
    ):
        select(relevance, 0.5, scope="layer")
    members = {"attention": (Member.of_slices("q", (12, 6), 0, 6),)}
    relevance = Relevance(values, granularity="head", members=members, parameter_shapes={"q": (12, 6)})
    with pytest.raises(ValueError, match=r"q has entries of unit 5 of attention, which has 4 heads"):
        select(relevance, 0.5, scope="layer")


def test_relevance_that_is_read_in_pieces_selects_the_same():
    class InPieces(Relevance):
        def read(self, name, index):
            pieces.append(index)
            return self[name].reshape(-1)[index]

    pieces = []
    plain = relevance_of()
    relevance = InPieces({name: plain[name] for name in plain}, statistic="signed")
    for scope in ("global", "layer"):
        assert select(relevance, 0.4, scope=scope) == select(plain, 0.4, scope=scope)
    assert pieces


def test_an_empty_relevance_and_an_unknown_ranking_are_refused():
    with pytest.raises(ValueError, match="holds no tensor"):
        select(Relevance({}), 0.5)
    with pytest.raises(ValueError, match="order must be one of"):
        select(relevance_of(), 0.5, Scope(order="largest"))


def test_layouts_of_more_than_there_is_do_no_harm() -> None:
    values = torch.tensor([[1.0, 3.0], [2.0, 0.5], [5.0, 4.0]])
    relevance = Relevance({"a": values}, statistic="signed", layouts={"a": "transposed", "b": "linear"})
    check_selection(relevance, 0.5, "row")
    assert select(relevance, 1 / 3, "row")["a"].sum(0).tolist() == [2, 2]
    with pytest.raises(ValueError, match="b"):
        check_selection(relevance, {"a": 0.5, "b": 0.5}, "row")


@pytest.mark.parametrize("target", ["class", ""], ids=["of a target", "of none, as by wanda"])
def test_relevance_that_explains_nothing_is_told(target: str, recwarn: pytest.WarningsRecorder) -> None:
    relevance = Relevance({"a": torch.zeros(2, 4)}, statistic="signed", target=target, num_samples=3)
    select(relevance, 0.5)
    said = [str(each.message) for each in recwarn if "relevance is zero everywhere" in str(each.message)]
    assert len(said) == bool(target)
