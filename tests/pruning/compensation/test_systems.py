"""Inputs of layers as rows: what a weight is multiplied with, and their sums."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lrp_prune.engine.batch_layout import BatchLayout
from lrp_prune.engine.call import Call
from lrp_prune.engine.origins import Layout
from lrp_prune.engine.uses import WeightUses
from lrp_prune.models.subject import subject_of
from lrp_prune.pruning.choices import Choices
from lrp_prune.pruning.compensation.systems import Systems, taken_of
from lrp_prune.pruning.pairs import Part
from lrp_prune.pruning.passes import outputs_of
from lrp_prune.pruning.places import Place
from lrp_prune.pruning.processes import Processes
from lrp_prune.pruning.products import computed, given

LAYERS = {
    "linear": (nn.Linear(6, 4), (5, 6)),
    "linear on tokens": (nn.Linear(6, 4), (5, 3, 6)),
    "one dimension": (nn.Conv1d(3, 4, 3, stride=2, padding=1), (2, 3, 9)),
    "two dimensions": (nn.Conv2d(3, 4, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2)), (2, 3, 8, 9)),
    "three dimensions": (nn.Conv3d(2, 4, 2, dilation=2), (2, 2, 5, 4, 6)),
    "groups": (nn.Conv2d(4, 6, 3, groups=2, padding=1), (2, 4, 5, 5)),
    "depthwise": (nn.Conv2d(4, 4, 3, groups=4, padding=1), (2, 4, 5, 5)),
    "same": (nn.Conv2d(3, 4, (4, 3), padding="same"), (2, 3, 6, 5)),
    "valid": (nn.Conv1d(3, 4, 4, padding="valid"), (2, 3, 6)),
    "reflected": (nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), (2, 3, 6, 5)),
    "no batch": (nn.Conv2d(3, 4, 3), (3, 6, 5)),
}


class Rows(WeightUses):
    """Asks for the rows of the only layer."""

    def __init__(self, counted: Tensor | None = None) -> None:
        super().__init__(lambda use: [])
        self.batch, self.rows = BatchLayout(), list[Any]()
        self.batch.counted = counted

    def observed(self, call: Call) -> Any:
        found = self._product(call)
        if found is None:
            return None
        result = computed(found)
        part = Part(Place(found.origin.name, Layout((), (), 0), 0, None), None, 1)
        taken = taken_of(found, part, self.batch)
        self.rows.append(None if taken is None else taken.rows)
        return given(found.activation, lambda: result)


def rows(layer: nn.Module, inputs: Tensor, counted: Tensor | None = None) -> Any:
    uses = Rows(counted)
    outputs_of(subject_of(layer).module, inputs, uses, "", Choices())
    return uses.rows[0]


@pytest.mark.parametrize("name", LAYERS)
def test_rows_times_the_weight_are_the_layers_output(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lrp_prune.pruning.compensation.systems._ENTRIES", 2000)  # some samples at a time
    layer, shape = LAYERS[name]
    layer, x = layer.double(), torch.randn(shape, dtype=torch.float64)
    found = torch.cat(rows(layer, x), dim=1)
    weight, bias = layer.weight.detach().reshape(len(found), -1, found.shape[-1]), layer.bias.detach()
    output = torch.cat([(some @ own.T) for some, own in zip(found, weight, strict=True)], dim=1) + bias
    expected = layer(x).detach()
    if not isinstance(layer, nn.Linear):  # channels last
        expected = (expected if expected.dim() == layer.weight.dim() else expected[None]).movedim(1, -1)
    assert torch.allclose(output, expected.reshape(-1, output.shape[1]), atol=1e-12)


def test_padding_is_no_row() -> None:
    layer, x = nn.Linear(6, 4), torch.randn(2, 3, 6)
    counted = torch.tensor([[True, True, False], [True, False, False]])
    (found,) = rows(layer, x, counted)
    assert torch.equal(found[0], x[counted])


def test_what_a_transposed_convolution_is_multiplied_with_is_not_known() -> None:
    assert rows(nn.ConvTranspose2d(3, 4, 3), torch.randn(2, 3, 5, 5)) is None


def test_sums_are_those_of_all_rows() -> None:
    systems, first, second = Systems(), torch.randn(2, 1, 5, 3).double(), torch.randn(2, 1, 7, 3).double()
    systems.add([first[0]], [first[1]])
    systems.add([second[0]], [second[1]])
    systems.over(Processes(None), torch.device("cpu"))
    ours, theirs = (torch.cat([first[index, 0], second[index, 0]]) for index in (0, 1))
    ours, theirs = (torch.cat([entry, torch.ones(12, 1)], dim=1).double() for entry in (ours, theirs))
    assert systems.count == 12 and systems.paired
    assert systems.gram is not None and torch.allclose(systems.gram[0], ours.T @ ours)
    assert systems.crossed is not None and torch.allclose(systems.crossed[0], theirs.T @ ours)


@pytest.mark.parametrize("half", [None, 0, 1])
def test_of_few_rows_halves_are_told_apart(half: int | None) -> None:
    """Of entries as a whole, or in the middle of each, whichever is known; and of many they are one."""
    systems, pieces = Systems(), [torch.randn(1, rows, 3).double() for rows in (6, 4, 1)]
    systems.add([pieces[0]], None, half=half)
    systems.add([pieces[1]], None, half=None if half is None else 1 - half)
    systems.add([pieces[2]], None, half=half)
    systems.over(Processes(None), torch.device("cpu"))
    parts = {
        None: [pieces[0][0, :3], pieces[1][0, :2]],
        0: [pieces[0][0], pieces[2][0]],
        1: [pieces[1][0]],
    }
    first, whole = (torch.cat(entries) for entries in (parts[half], [entry[0] for entry in pieces]))
    assert systems.first is not None and systems.gram is not None
    for found, rows in ((systems.first, first), (systems.gram, whole)):
        ones = torch.cat([rows, torch.ones(len(rows), 1)], 1).double()
        torch.testing.assert_close(found[0], ones.T @ ones)


@pytest.mark.parametrize("sizes", [(29,), (30,), (20, 9), (20, 10), (40, 7)])
def test_of_many_rows_there_is_one_sum(sizes: tuple[int, ...]) -> None:
    systems, pieces = Systems(), [torch.randn(1, rows, 3).double() for rows in sizes]
    for piece in pieces:
        systems.add([piece], None)
    systems.over(Processes(None), torch.device("cpu"))
    assert (systems.first is None) == (sum(sizes) >= 30) and systems.gram is not None
    torch.testing.assert_close(systems.gram[0, :3, :3], (rows := torch.cat(pieces, 1)[0]).T @ rows)


def test_one_half_alone_is_none() -> None:
    systems = Systems()
    systems.add([torch.randn(1, 5, 3)], None, half=1)
    systems.over(Processes(None), torch.device("cpu"))
    assert systems.first is None and systems.gram is not None and systems.gram.shape == (1, 4, 4)


def test_inputs_of_another_number_are_no_pairs() -> None:
    systems = Systems()
    systems.add([torch.randn(1, 5, 3)], [torch.randn(1, 4, 3)])
    systems.over(Processes(None), torch.device("cpu"))
    assert not systems.paired and systems.crossed is None and systems.count == 5
