"""Recurrent layers: values of torch's own, relevance and statistics of the same steps written out by hand."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import lrp_prune
from lrp_prune.pruning import scorer
from lrp_prune.relevance.statistics import OF_RELEVANCE
from tests.support.recurrent_layers import Explicit
from tests.support.recurrent_models import KINDS, LAYERS, Model, inputs_for, recurrent_layer, value_of

COMPOSITES = ("cp_lrp", "attnlrp", "epsilon", "gradient")


def _states(layer: nn.RNNBase, samples: int = 3) -> tuple[Tensor, ...]:
    """Initial states ``[layers * directions, samples, features]``."""
    generator = torch.Generator().manual_seed(2)
    number = layer.num_layers * (2 if layer.bidirectional else 1)
    widths = [layer.proj_size or layer.hidden_size, layer.hidden_size][: 2 if isinstance(layer, nn.LSTM) else 1]
    return tuple(torch.randn(number, samples, width, dtype=torch.float64, generator=generator) for width in widths)


def _explicit(layer: nn.RNNBase, composite: str, x: Tensor, state: tuple[Tensor, ...]) -> tuple[Explicit, Tensor]:
    explicit = Explicit(layer, composite)
    output, final = explicit(x if layer.batch_first else x.transpose(0, 1), state)
    return explicit, value_of(output, final)


@pytest.mark.parametrize("composite", COMPOSITES)
@pytest.mark.parametrize(("kind", "shape"), LAYERS)
def test_relevance_is_that_of_the_steps_written_out(kind: str, shape: str, composite: str) -> None:
    layer = recurrent_layer(kind, shape)
    model, x, state = Model(layer), inputs_for(layer), _states(layer)
    with lrp_prune.attributing(model, composite, unruled="error") as propagation:
        value = model(x, *state)
        found = propagation.relevance(value)
    assert torch.equal(value, model(x, *state))
    leaves = [tensor.clone().requires_grad_() for tensor in (x, *state)]
    _, expected = _explicit(layer, composite, leaves[0], tuple(leaves[1:]))
    torch.testing.assert_close(value, expected)
    gradients = torch.autograd.grad(expected, leaves)
    for entry, leaf, gradient in zip(found.values(), leaves, gradients, strict=True):
        torch.testing.assert_close(entry, leaf.detach() * gradient)


@pytest.mark.parametrize("composite", ["cp_lrp", "attnlrp"])
@pytest.mark.parametrize(("kind", "shape"), LAYERS)
@pytest.mark.parametrize("given", [True, False])
def test_relevance_is_conserved_without_biases(kind: str, shape: str, composite: str, given: bool) -> None:
    """What arrives at the input and at both initial states is what was explained."""
    layer = recurrent_layer(kind, shape, bias=False)
    model, x, state = Model(layer), inputs_for(layer), _states(layer) if given else ()
    with lrp_prune.attributing(model, composite) as propagation:
        value = model(x, *state)
        relevance = propagation.relevance(value)
    assert len(relevance) == 1 + len(state)
    assert all(entry.abs().max() > 1e-3 for entry in relevance.values())
    torch.testing.assert_close(sum(entry.sum() for entry in relevance.values()), value, rtol=1e-9, atol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_relevance_stays_bounded_over_many_steps(kind: str) -> None:
    layer = recurrent_layer(kind, "batch first", bias=False)
    x = torch.randn(2, 400, 4, dtype=torch.float64)
    for composite in COMPOSITES:
        with lrp_prune.attributing(layer, composite) as propagation:
            relevance = propagation.relevance(layer(x)[0][:, -1].sum())["input"]
        assert relevance.abs().sum() < 100


@pytest.mark.slow
@pytest.mark.parametrize("statistic", OF_RELEVANCE)
@pytest.mark.parametrize(("kind", "shape"), LAYERS)
def test_weights_are_scored_as_the_steps_written_out(kind: str, shape: str, statistic: str) -> None:
    layer = recurrent_layer(kind, shape)
    model, x = Model(layer), inputs_for(layer)
    state = tuple(torch.zeros_like(entry) for entry in _states(layer))
    samples = x.shape[0]  # of a layer that takes tokens first, a batch looks as if it had as many samples as tokens
    if not layer.batch_first and statistic == "abs_sample":
        pytest.skip("samples cannot be told apart where the batch has tokens first")
    for composite in ("attnlrp", "epsilon", "gradient"):
        options = {"composite": composite, "statistic": statistic, "target": lambda model, batch: model(batch)}
        relevance = lrp_prune.attribute(model, [x], **options)
        explicit, value = _explicit(layer, composite, x.clone().requires_grad_(), state)
        expected = explicit.statistics(value, statistic)
        assert set(relevance) == {f"r.{name}" for name in expected} and not relevance.unscored
        for name, entry in expected.items():
            power = {"squared_token": 0.5, "geometric": 0.0}.get(statistic, 1.0)
            entry = {"squared_token": entry.sqrt()}.get(statistic, entry) / samples**power
            if statistic == "geometric":  # a share of a mean: only the relevance in it is per sample, to the power 2/3
                entry = entry / math.sqrt(samples) ** (2 / 3)
            torch.testing.assert_close(relevance[f"r.{name}"].double(), entry, rtol=1e-4, atol=1e-7)
            assert relevance.layouts[f"r.{name}"] == "linear"


@pytest.mark.parametrize(("kind", "shape"), LAYERS)
def test_input_norms_are_those_of_the_steps_written_out(kind: str, shape: str) -> None:
    layer = recurrent_layer(kind, shape)
    model, x = Model(layer), inputs_for(layer)
    scores = scorer("wanda", model)
    scores.update(x)
    relevance = scores.compute()
    state = tuple(torch.zeros_like(entry) for entry in _states(layer))
    explicit, value = _explicit(layer, "gradient", x.clone().requires_grad_(), state)
    for name, entry in explicit.statistics(value, "input_norm").items():
        expected = (entry / x.shape[0]).sqrt()
        torch.testing.assert_close(relevance[f"r.{name}"].double(), expected, rtol=1e-5, atol=1e-8)


class Packed(nn.Module):
    """Packs its input, in the order of the batch or sorted, and pads the output again."""

    def __init__(self, layer: nn.RNNBase, lengths: list[int], enforce_sorted: bool) -> None:
        super().__init__()
        self.r, self.lengths, self.enforce_sorted = layer, lengths, enforce_sorted

    def forward(self, x: Tensor, *state: Tensor) -> Tensor:
        packed = pack_padded_sequence(
            x, torch.tensor(self.lengths), batch_first=True, enforce_sorted=self.enforce_sorted
        )
        output, final = self.r(packed, (state if isinstance(self.r, nn.LSTM) else state[0]) if state else None)
        padded, _ = pad_packed_sequence(output, batch_first=True, total_length=x.shape[1])
        return value_of(padded, final if isinstance(self.r, nn.LSTM) else (final,))


@pytest.mark.slow
@pytest.mark.parametrize("lengths", [[5, 3, 1], [2, 5, 4]])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", ["batch first", "both directions", "dropout"])
def test_padding_of_packed_sequences_does_not_count(kind: str, shape: str, lengths: list[int]) -> None:
    layer = recurrent_layer(kind, shape)
    model, x, state = Packed(layer, lengths, lengths == [5, 3, 1]).eval(), inputs_for(layer), _states(layer)
    zeros = tuple(torch.zeros_like(entry) for entry in state)
    for composite in COMPOSITES:
        with lrp_prune.attributing(model, composite, unruled="error") as propagation:
            value = model(x, *state)
            found = propagation.relevance(value)
        assert torch.equal(value, model(x, *state))
        leaves = [tensor.clone().requires_grad_() for tensor in (x, *state)]
        output, final = Explicit(layer, composite, lengths)(leaves[0], tuple(leaves[1:]))
        expected = value_of(output, final)
        torch.testing.assert_close(value, expected)
        for entry, leaf, gradient in zip(found.values(), leaves, torch.autograd.grad(expected, leaves), strict=True):
            torch.testing.assert_close(entry, leaf.detach() * gradient)
    for statistic in ("abs_sample", "abs_token", "signed"):
        options = {"composite": "attnlrp", "statistic": statistic, "target": lambda model, batch: model(batch)}
        relevance = lrp_prune.attribute(model, [x], **options)
        explicit = Explicit(layer, "attnlrp", lengths)
        value = value_of(*explicit(x.clone().requires_grad_(), zeros))
        for name, entry in explicit.statistics(value, statistic).items():
            torch.testing.assert_close(relevance[f"r.{name}"].double() * 3, entry, rtol=1e-4, atol=1e-7)
    scores = scorer("wanda", model)
    scores.update(x)
    norms, energies = scores.compute(), explicit.statistics(value, "input_norm")
    for name, entry in energies.items():
        torch.testing.assert_close(norms[f"r.{name}"].double(), (entry / 3).sqrt(), rtol=1e-5, atol=1e-8)


def test_a_packed_batch_is_an_input_like_any_other() -> None:
    layer = recurrent_layer("lstm", "batch first", bias=False)
    packed = pack_padded_sequence(inputs_for(layer), torch.tensor([2, 5, 4]), batch_first=True, enforce_sorted=False)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.r = layer

        def forward(self, batch: PackedSequence) -> Tensor:
            result: Tensor = self.r(batch)[1][0].sum()
            return result

    model = Model()
    with lrp_prune.attributing(model, "cp_lrp", unruled="error") as propagation:
        value = model(packed)
        relevance = propagation.relevance(value)
    (entry,) = relevance.values()
    assert entry.shape == (11, 4)
    torch.testing.assert_close(entry.sum(), value)


class Cells(nn.Module):
    """A cell in a loop, as models for control and decoding write it."""

    def __init__(self, cell: nn.RNNCellBase) -> None:
        super().__init__()
        self.cell = cell

    def forward(self, x: Tensor, *state: Tensor) -> Tensor:
        several = isinstance(self.cell, nn.LSTMCell)
        current: Any = (state if several else state[0]) if state else None
        outputs = []
        for token in range(x.shape[1]):
            current = self.cell(x[:, token], current)
            outputs.append(current[0] if several else current)
        final = tuple(entry[None] for entry in (current if several else (current,)))
        return value_of(torch.stack(outputs, 1), final)


CELLS = {
    "lstm": lambda **options: nn.LSTMCell(4, 6, **options),
    "gru": lambda **options: nn.GRUCell(4, 6, **options),
    "tanh": lambda **options: nn.RNNCell(4, 6, **options),
    "relu": lambda **options: nn.RNNCell(4, 6, nonlinearity="relu", **options),
}


@pytest.mark.parametrize("kind", CELLS)
def test_cells_are_layers_of_one_step(kind: str) -> None:
    layer = recurrent_layer(kind, "batch first")
    model = Cells(CELLS[kind]()).double().eval()
    model.cell.load_state_dict({name.removesuffix("_l0"): value for name, value in layer.state_dict().items()})
    x, state = inputs_for(layer), _states(layer)
    for composite in COMPOSITES:
        with lrp_prune.attributing(model, composite, unruled="error") as propagation:
            value = model(x, *(entry[0] for entry in state))
            found = propagation.relevance(value)
        assert torch.equal(value, model(x, *(entry[0] for entry in state)))
        leaves = [tensor.clone().requires_grad_() for tensor in (x, *state)]
        _, expected = _explicit(layer, composite, leaves[0], tuple(leaves[1:]))
        torch.testing.assert_close(value, expected)
        for entry, leaf, gradient in zip(found.values(), leaves, torch.autograd.grad(expected, leaves), strict=True):
            torch.testing.assert_close(entry, (leaf.detach() * gradient).view_as(entry))
    for statistic in ("signed", "abs_token", "squared_token"):
        options = {"composite": "attnlrp", "statistic": statistic, "target": lambda model, batch: model(batch)}
        relevance = lrp_prune.attribute(model, [x], **options)
        zeros = tuple(torch.zeros_like(entry) for entry in state)
        explicit, value = _explicit(layer, "attnlrp", x.clone().requires_grad_(), zeros)
        for name, entry in explicit.statistics(value, statistic).items():
            entry = (entry / 3).sqrt() if statistic == "squared_token" else entry / 3
            found = relevance[f"cell.{name.removesuffix('_l0')}"].double()
            torch.testing.assert_close(found, entry, rtol=1e-4, atol=1e-7)


def test_cells_without_biases_and_unbatched_inputs() -> None:
    for kind, make in CELLS.items():
        cell = make(bias=False).double()
        x = torch.randn(4, dtype=torch.float64)
        with lrp_prune.attributing(cell, "cp_lrp") as propagation:
            result = cell(x)
            value = (result[0] if kind == "lstm" else result).sum()
            relevance = next(iter(propagation.relevance(value).values()))
        torch.testing.assert_close(relevance.sum(), value)
    layer = nn.GRU(4, 6, bias=False).double()
    x = torch.randn(5, 4, dtype=torch.float64)
    with lrp_prune.attributing(layer, "cp_lrp") as propagation:
        value = layer(x)[0].sum()
        assert torch.isclose(propagation.relevance(value)["input"].sum(), value)
