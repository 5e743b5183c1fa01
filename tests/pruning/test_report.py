"""What is said of masks: the table, what is in danger, the figure, the warning."""

import warnings
from pathlib import Path

import pytest
import torch

import lrp_prune
from lrp_prune.pruning import EmptiedWeightsWarning, Masks, Scope, select
from lrp_prune.pruning.emptied import cut_off
from lrp_prune.relevance import Relevance
from lrp_prune.relevance.members import Member
from lrp_prune.relevance.unscored import UNREACHED
from tests.support.sharding import together


def transformer(dead=3):
    """Masks of four blocks: the queries of the first are gone, the values have dead rows and columns."""
    masks = {}
    for block in range(4):
        generator = torch.Generator().manual_seed(block)
        masks[f"model.layers.{block}.query.weight"] = torch.rand(10, 20, generator=generator) > (
            1.0 if not block else 0.5
        )
        value = torch.rand(10, 20, generator=generator) > 0.3
        value[:dead], value[:, : 2 * dead] = False, False
        masks[f"model.layers.{block}.value.weight"] = value
    return Masks(masks | {"head.weight": torch.ones(3, 10) > 0}, unscored={"head.weight": UNREACHED})


def test_the_report_has_a_row_for_each_kind_and_names_what_is_in_danger():
    masks = transformer()
    lines = masks.report().splitlines()
    assert (
        lines[0] == f"total sparsity {masks.sparsity:.2%}: {masks.num_pruned:,} of {masks.num_entries:,} weights pruned"
    )
    assert lines[1].startswith("not scored and kept: 30 of 1,630 weights (1.8 %): head.weight")
    rows = {words[0]: words[1:] for line in lines if (words := line.split()) and len(words) == 7}
    assert list(rows) == ["layers", "model.layers.*.query", "model.layers.*.value", "head"]
    names = [name for name in masks if "query" in name]
    pruned = sum(masks.pruned_in(name) for name in names)
    lowest = min(map(masks.sparsity_of, names))
    shares = [f"{value:.2%}" for value in (pruned / 800, lowest, 1.0)]
    assert rows["model.layers.*.query"] == ["4", "800", f"{pruned}", *shares]
    assert rows["head"] == ["1", "30", "0", "0.00%", "0.00%", "0.00%"]
    text = " ".join(masks.report().split())
    assert "1 of 9 tensors lose more than 95 %, 1 of them all: model.layers.0.query.weight (100.0 %)" in text
    # Ten rows and twenty columns of the queries, three and six of each of four values.
    assert (
        "22 of 83 outputs without any input: model.layers.*.value (12 of 40), model.layers.*.query (10 of 40)" in text
    )
    assert (
        "44 of 170 inputs that nothing reads: model.layers.*.value (24 of 80), model.layers.*.query (20 of 80)" in text
    )


def test_nothing_in_danger_is_said_and_units_have_no_outputs_without_inputs():
    masks = Masks({"a.weight": torch.eye(4) > 0, "bias": torch.tensor([True, False])})
    assert masks.report().endswith("no tensor loses more than 95 %, and no output or input all of its weights")
    rows = torch.tensor([[True, True], [False, False]])
    assert "outputs" in Masks({"a": rows}).report()
    units = Masks({"a": rows}, granularity="neuron").report()
    assert "outputs" not in units and "1 of" not in units and ", by neuron" in units


@pytest.mark.parametrize(
    ("layout", "shape"),
    [
        ("linear", (5, 7)),
        ("transposed", (7, 5)),
        ("stacked", (2, 5, 7)),
        ("stacked_transposed", (2, 7, 5)),
        ("convolution", (5, 7, 3)),
    ],
)
def test_outputs_and_inputs_are_those_of_the_layout(layout, shape):
    kept = torch.ones(shape, dtype=torch.bool)
    axes = {
        "linear": (0, 1),
        "transposed": (1, 0),
        "stacked": (1, 2),
        "stacked_transposed": (2, 1),
        "convolution": (0, 1),
    }
    outputs, inputs = axes[layout]
    kept.index_fill_(outputs, torch.tensor([1]), False).index_fill_(inputs, torch.tensor([0, 3]), False)
    stack = shape[0] if layout.startswith("stacked") else 1
    assert cut_off(kept, layout) == (stack, 5 * stack, 2 * stack, 7 * stack)
    assert cut_off(torch.ones(3) > 0) is None
    masks = Masks({"w": kept})
    masks.layouts = {"w": layout}
    assert (
        f"{stack} of {5 * stack} outputs" in masks.report() and f"{2 * stack} of {7 * stack} inputs" in masks.report()
    )


def test_masks_keep_the_layouts_of_the_relevance(tmp_path):
    values = {"conv1d": torch.rand(8, 5), "other": torch.rand(6, 4)}
    masks = select(Relevance(values, layouts={"conv1d": "transposed"}), 0.5)
    masks.save(tmp_path / "masks.safetensors")
    later = select(Relevance({"other": values["other"]}), 0.6, existing=masks, scope="layer")
    read = (
        Masks.load(tmp_path / "masks.safetensors"),
        Masks.from_state_dict(masks.state_dict()),
        masks & ~~masks,
        later,
    )
    assert all(each.layouts == {"conv1d": "transposed"} for each in (masks, *read))


@pytest.mark.slow
def test_the_figure_has_a_bar_for_each_tensor_in_order(tmp_path):
    pytest.importorskip("matplotlib")
    masks = transformer()
    figure = masks.plot(tmp_path / "sparsity.png")
    assert (tmp_path / "sparsity.png").read_bytes()[:4] == b"\x89PNG"
    (axes,) = figure.axes
    bars = {round(bar.get_x() + bar.get_width() / 2): bar for container in axes.containers for bar in container}
    assert [bars[place].get_height() for place in range(9)] == [masks.sparsity_of(name) for name in masks]
    assert len({bar.get_facecolor() for bar in bars.values()}) == 3
    assert [label.get_text() for label in axes.get_xticklabels()][:2] == [
        "model.layers.0.query",
        "model.layers.0.value",
    ]
    many = Masks({f"layers.{block}.{kind}": torch.rand(2, 2) > 0.5 for block in range(40) for kind in "qkv"})
    ticks = many.plot().axes[0].get_xticklabels()
    assert [tick.get_text() for tick in ticks] == [str(block) for block in range(0, 40, 2)]
    assert [tick.get_position()[0] for tick in ticks] == list(range(0, 120, 6))


def faint(**scales):
    generator = torch.Generator().manual_seed(0)
    return Relevance({name: torch.rand(20, 30, generator=generator) * scale for name, scale in scales.items()})


def test_a_selection_that_empties_tensors_warns_by_name_with_the_way_out():
    relevance = faint(**{f"layers.{block}.key": 1e-4 for block in range(2)}, up=1.0, down=1.0, head=1.0)
    with pytest.warns(EmptiedWeightsWarning) as caught:
        masks = select(relevance, 0.5, Scope(floor=0))
    (message,) = [str(each.message) for each in caught]
    assert message.startswith(
        "2 of 5 tensors lose more than 95 % of their weights, 2 of them all, where 50 % was asked for of all together: "
        "layers.*.key (2 tensors, up to 100.0 %)"
    )
    assert "floor=1.0" in message and "exclude=['layers.*.key']" in message and "scope='layer'" in message
    with warnings.catch_warnings():
        warnings.simplefilter("error", EmptiedWeightsWarning)
        select(relevance, 0.6, Scope(floor=0), existing=masks)  # was said of these tensors
        select(relevance, 0.5)
        select(relevance, 0.97)  # asked for
        select(relevance, 0.97, scope="layer")
    with pytest.warns(EmptiedWeightsWarning, match="3 of 5 tensors lose more than 95 %"):
        select(faint(a=1e-4, b=1e-4, c=1e-4, d=1.0, e=1.0), 0.62, Scope(floor=0), existing=None)
    with pytest.warns(
        EmptiedWeightsWarning, match="1 of 5 tensors lose more than 95 % of their weights, 1 of them all, where 97 %"
    ):
        select(faint(a=1e-4, b=1.0, c=1.0, d=1.0, e=1.0), 0.97, Scope(floor=0))


def test_a_tensor_that_keeps_next_to_nothing_is_told_unless_as_much_was_asked_for():
    relevance = faint(key=1e-4, up=1.0, down=1.0)
    values = {name: relevance[name].clone() for name in relevance}
    values["key"][0, :9] = 10.0  # nine of 600 are kept
    relevance = Relevance(values)
    with pytest.warns(EmptiedWeightsWarning, match=r"1 of 3 tensors .* weights, where 50 % .*: key \(98.5 %\)\. With"):
        select(relevance, 0.5, Scope(floor=0))
    with warnings.catch_warnings():
        warnings.simplefilter("error", EmptiedWeightsWarning)
        select(relevance, 0.96, Scope(floor=0))


def test_units_warn_of_layers_without_any_and_blocks_do_not():
    shapes = {"a": (4, 6), "b": (4, 6), "bias": (4,)}
    values = {"first": torch.full((4,), 1e-3), "second": torch.ones(4)}
    owned = {"first": ("a", "bias"), "second": ("b",)}
    members = {group: tuple(Member.of_slices(name, shapes[name], 0, 4) for name in owned[group]) for group in owned}
    options = {"members": members, "parameter_shapes": shapes}
    with pytest.warns(EmptiedWeightsWarning, match="1 of 3 tensors lose more than 95 %") as caught:
        select(Relevance(values, granularity="neuron", **options), 0.5)
    assert "floor" not in str(caught[0].message) and "exclude=['a']" in str(caught[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error", EmptiedWeightsWarning)
        select(Relevance(values, granularity="block", **options), 0.5)


@pytest.mark.processes
@pytest.mark.parametrize("processes", [2])
def test_divided_masks_have_the_report_and_the_warning_of_whole_ones(tmp_path: Path, processes: int) -> None:
    relevance = faint(key=1e-4, up=1.0, down=1.0)
    with pytest.warns(EmptiedWeightsWarning) as caught:
        expected = select(relevance, 0.5, Scope(floor=0))

    def check(mesh):
        from torch.distributed.tensor import Shard

        from lrp_prune.distributed.sharding import Sharding

        dims = {"key": 0, "up": 1}
        shardings = {name: Sharding((20, 30), mesh, (Shard(dim),)) for name, dim in dims.items()}
        parts = {
            name: shardings[name].part(relevance[name]).clone() if name in dims else relevance[name]
            for name in relevance
        }
        whole = {name: (20, 30) for name in parts}
        with pytest.warns(EmptiedWeightsWarning) as here:
            masks = lrp_prune.select(Relevance(parts, shardings=shardings, parameter_shapes=whole), 0.5, Scope(floor=0))
        assert [str(each.message) for each in here] == [str(each.message) for each in caught]
        assert masks.report() == expected.report()

    together(check, processes, tmp_path)
