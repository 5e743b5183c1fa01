"""Recurrent layers: values of torch's own, relevance and statistics of the same steps written out by hand."""

import copy
import math
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence
from torch.utils.checkpoint import checkpoint

import lrp_prune
from lrp_prune.pruning import METHODS, scorer
from lrp_prune.relevance.statistics import OF_RELEVANCE
from lrp_prune.relevance.unscored import GATES
from tests.support.recurrent_layers import Explicit, LastStep

KINDS: dict[str, Any] = {
    "lstm": nn.LSTM,
    "gru": nn.GRU,
    "tanh": nn.RNN,
    "relu": lambda *args, **options: nn.RNN(*args, nonlinearity="relu", **options),
}
SHAPES: dict[str, dict[str, Any]] = {
    "plain": {},
    "batch first": {"batch_first": True},
    "two layers": {"num_layers": 2},
    "both directions": {"bidirectional": True, "batch_first": True},
    "two layers, both directions": {"num_layers": 2, "bidirectional": True},
    "dropout": {"num_layers": 2, "dropout": 0.5, "batch_first": True},
}
LAYERS = [(kind, shape) for kind in KINDS for shape in SHAPES] + [
    ("lstm", "projections"),
    ("lstm", "projections, two layers, both directions"),
]
SHAPES["projections"] = {"proj_size": 3}
SHAPES["projections, two layers, both directions"] = {"proj_size": 3, "num_layers": 2, "bidirectional": True}
COMPOSITES = ("cp_lrp", "attnlrp", "epsilon", "gradient")


def _layer(kind: str, shape: str, bias: bool = True) -> nn.RNNBase:
    torch.manual_seed(0)
    layer: nn.RNNBase = KINDS[kind](4, 6, bias=bias, **SHAPES[shape]).double().eval()
    return layer


def _input(layer: nn.RNNBase) -> Tensor:
    x = torch.randn(3, 5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return x if layer.batch_first else x.transpose(0, 1)


def _states(layer: nn.RNNBase, samples: int = 3) -> tuple[Tensor, ...]:
    """Initial states ``[layers * directions, samples, features]``."""
    generator = torch.Generator().manual_seed(2)
    number = layer.num_layers * (2 if layer.bidirectional else 1)
    widths = [layer.proj_size or layer.hidden_size, layer.hidden_size][: 2 if isinstance(layer, nn.LSTM) else 1]
    return tuple(torch.randn(number, samples, width, dtype=torch.float64, generator=generator) for width in widths)


class Model(nn.Module):
    """A recurrent layer, from its initial states or from zeros, and a value from all that it returns."""

    def __init__(self, layer: nn.RNNBase) -> None:
        super().__init__()
        self.r = layer

    def forward(self, x: Tensor, *state: Tensor) -> Tensor:
        packed = isinstance(self.r, nn.LSTM)
        output, final = self.r(x, (state if packed else state[0]) if state else None)
        return _value(output if self.r.batch_first else output.transpose(0, 1), final if packed else (final,))


def _value(output: Tensor, final: tuple[Tensor, ...]) -> Tensor:
    """Looks at each output and each final state, each with a weight of its own."""
    total = (output * torch.linspace(-1, 2, output.numel(), dtype=output.dtype).view_as(output)).sum()
    for number, entry in enumerate(final):
        total = total + (entry * torch.linspace(1 + number, -1, entry.numel(), dtype=entry.dtype).view_as(entry)).sum()
    return total


def _explicit(layer: nn.RNNBase, composite: str, x: Tensor, state: tuple[Tensor, ...]) -> tuple[Explicit, Tensor]:
    explicit = Explicit(layer, composite)
    output, final = explicit(x if layer.batch_first else x.transpose(0, 1), state)
    return explicit, _value(output, final)


@pytest.mark.parametrize("composite", COMPOSITES)
@pytest.mark.parametrize(("kind", "shape"), LAYERS)
def test_relevance_is_that_of_the_steps_written_out(kind: str, shape: str, composite: str) -> None:
    layer = _layer(kind, shape)
    model, x, state = Model(layer), _input(layer), _states(layer)
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
    layer = _layer(kind, shape, bias=False)
    model, x, state = Model(layer), _input(layer), _states(layer) if given else ()
    with lrp_prune.attributing(model, composite) as propagation:
        value = model(x, *state)
        relevance = propagation.relevance(value)
    assert len(relevance) == 1 + len(state)
    assert all(entry.abs().max() > 1e-3 for entry in relevance.values())
    torch.testing.assert_close(sum(entry.sum() for entry in relevance.values()), value, rtol=1e-9, atol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_relevance_stays_bounded_over_many_steps(kind: str) -> None:
    layer = _layer(kind, "batch first", bias=False)
    x = torch.randn(2, 400, 4, dtype=torch.float64)
    for composite in COMPOSITES:
        with lrp_prune.attributing(layer, composite) as propagation:
            relevance = propagation.relevance(layer(x)[0][:, -1].sum())["input"]
        assert relevance.abs().sum() < 100


@pytest.mark.slow
@pytest.mark.parametrize("statistic", OF_RELEVANCE)
@pytest.mark.parametrize(("kind", "shape"), LAYERS)
def test_weights_are_scored_as_the_steps_written_out(kind: str, shape: str, statistic: str) -> None:
    layer = _layer(kind, shape)
    model, x = Model(layer), _input(layer)
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
    layer = _layer(kind, shape)
    model, x = Model(layer), _input(layer)
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
        return _value(padded, final if isinstance(self.r, nn.LSTM) else (final,))


@pytest.mark.slow
@pytest.mark.parametrize("lengths", [[5, 3, 1], [2, 5, 4]])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", ["batch first", "both directions", "dropout"])
def test_padding_of_packed_sequences_does_not_count(kind: str, shape: str, lengths: list[int]) -> None:
    layer = _layer(kind, shape)
    model, x, state = Packed(layer, lengths, lengths == [5, 3, 1]).eval(), _input(layer), _states(layer)
    zeros = tuple(torch.zeros_like(entry) for entry in state)
    for composite in COMPOSITES:
        with lrp_prune.attributing(model, composite, unruled="error") as propagation:
            value = model(x, *state)
            found = propagation.relevance(value)
        assert torch.equal(value, model(x, *state))
        leaves = [tensor.clone().requires_grad_() for tensor in (x, *state)]
        output, final = Explicit(layer, composite, lengths)(leaves[0], tuple(leaves[1:]))
        expected = _value(output, final)
        torch.testing.assert_close(value, expected)
        for entry, leaf, gradient in zip(found.values(), leaves, torch.autograd.grad(expected, leaves), strict=True):
            torch.testing.assert_close(entry, leaf.detach() * gradient)
    for statistic in ("abs_sample", "abs_token", "signed"):
        options = {"composite": "attnlrp", "statistic": statistic, "target": lambda model, batch: model(batch)}
        relevance = lrp_prune.attribute(model, [x], **options)
        explicit = Explicit(layer, "attnlrp", lengths)
        value = _value(*explicit(x.clone().requires_grad_(), zeros))
        for name, entry in explicit.statistics(value, statistic).items():
            torch.testing.assert_close(relevance[f"r.{name}"].double() * 3, entry, rtol=1e-4, atol=1e-7)
    scores = scorer("wanda", model)
    scores.update(x)
    norms, energies = scores.compute(), explicit.statistics(value, "input_norm")
    for name, entry in energies.items():
        torch.testing.assert_close(norms[f"r.{name}"].double(), (entry / 3).sqrt(), rtol=1e-5, atol=1e-8)


def test_a_packed_batch_is_an_input_like_any_other() -> None:
    layer = _layer("lstm", "batch first", bias=False)
    packed = pack_padded_sequence(_input(layer), torch.tensor([2, 5, 4]), batch_first=True, enforce_sorted=False)

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
        return _value(torch.stack(outputs, 1), final)


CELLS = {
    "lstm": lambda **options: nn.LSTMCell(4, 6, **options),
    "gru": lambda **options: nn.GRUCell(4, 6, **options),
    "tanh": lambda **options: nn.RNNCell(4, 6, **options),
    "relu": lambda **options: nn.RNNCell(4, 6, nonlinearity="relu", **options),
}


@pytest.mark.parametrize("kind", CELLS)
def test_cells_are_layers_of_one_step(kind: str) -> None:
    layer = _layer(kind, "batch first")
    model = Cells(CELLS[kind]()).double().eval()
    model.cell.load_state_dict({name.removesuffix("_l0"): value for name, value in layer.state_dict().items()})
    x, state = _input(layer), _states(layer)
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


class Tagger(nn.Module):
    """Tokens, an LSTM, a linear head; with a mask as tokenizers make it."""

    def __init__(self, kind: Any = nn.LSTM) -> None:
        super().__init__()
        self.embedding, self.r, self.o = nn.Embedding(20, 4), kind(4, 6, batch_first=True), nn.Linear(6, 3)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        result: Tensor = self.o(self.r(self.embedding(input_ids))[0])
        return result


@pytest.mark.parametrize("statistic", ["abs_token", "abs_sample", "geometric"])
def test_masked_tokens_do_not_count(statistic: str) -> None:
    torch.manual_seed(0)
    model = Tagger().double().eval()
    short, long = torch.randint(1, 20, (1, 3)), torch.randint(1, 20, (1, 5))
    ids = torch.cat([nn.functional.pad(short, (0, 2)), long])
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])

    def target(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        value: Tensor = (model(**batch)[..., 0] * batch["attention_mask"]).sum()
        return value

    options = {"target": target, "statistic": statistic}
    together = lrp_prune.attribute(model, [{"input_ids": ids, "attention_mask": mask}], **options)
    apart = lrp_prune.attribute(
        model, [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in (short, long)], **options
    )
    for name in apart:
        torch.testing.assert_close(together[name], apart[name], rtol=1e-4, atol=1e-7)


def _small() -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    return LastStep(), (torch.randn(16, 7, 4), torch.randint(3, (16,)))


@pytest.mark.parametrize("scope", ["global", "layer", "row"])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_prunes_half_of_an_lstm_with_a_head(method: str, scope: str) -> None:
    model, batch = _small()
    masks = lrp_prune.prune(model, [batch], sparsity=0.5, method=method, scope=scope)
    assert (masks.num_pruned, masks.num_entries, masks.sparsity) == (129, 258, 0.5)
    assert sum(int((parameter == 0).sum()) for name, parameter in model.named_parameters() if "weight" in name) == 129
    for name, kept in masks.items():
        assert not model.get_parameter(name)[~kept].any()
    assert torch.isfinite(model(batch[0])).all()


def test_a_recurrent_weight_can_be_named() -> None:
    model, batch = _small()
    masks = lrp_prune.prune(model, [batch], sparsity=0.5, include=["r.weight_hh_l0", "o"], scope="layer")
    assert {name: masks.pruned_in(name) for name in masks} == {"r.weight_hh_l0": 72, "o.weight": 9}


def test_lrp_knows_which_recurrent_weights_matter() -> None:
    """Of two inputs that are as large, the output depends on one: the other's weights go first."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.LSTM(2, 8, batch_first=True))
    layer, x = model[0], torch.randn(32, 6, 2)
    with torch.no_grad():
        for name in ("weight_ih_l0", "weight_hh_l0"):
            getattr(layer, name).view(4, 8, -1)[:, 4:] *= 1.0
        layer.weight_ih_l0.view(4, 8, 2)[:, :4, 1] = 0.0
        layer.weight_hh_l0.view(4, 8, 8)[:, :4, 4:] = 0.0
    relevance = lrp_prune.attribute(model, [x], target=lambda model, x: model(x)[0][:, -1, :4].sum())
    scores = relevance["0.weight_ih_l0"].view(4, 8, 2)
    assert not scores[:, 4:].any() and (scores[:, :4, 0] > 0).all()


@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_stopped_gates_leave_weights_unknown_not_irrelevant(kind: str) -> None:
    torch.manual_seed(0)
    model = Tagger(KINDS[kind])
    batch = {"input_ids": torch.randint(1, 20, (2, 5))}
    options = {"target": lambda model, batch: model(**batch)[..., 0].sum()}
    relevance = lrp_prune.attribute(model, [batch], composite="cp_lrp", **options)
    assert relevance.unscored == {"r.weight_ih_l0": GATES, "r.weight_hh_l0": GATES}
    assert list(relevance) == ["o.weight"]
    with pytest.raises(ValueError, match=r"only 18 of them are scored.*belongs to gates"):
        lrp_prune.select(relevance, 0.5, scope="global")
    simple = lrp_prune.attribute(Tagger(nn.RNN), [batch], composite="cp_lrp", **options)
    assert set(simple) == {"r.weight_ih_l0", "r.weight_hh_l0", "o.weight"}


def test_only_projections_are_scored_where_gates_are_stopped() -> None:
    model = Model(_layer("lstm", "projections"))
    relevance = lrp_prune.attribute(
        model, [_input(model.r)], composite="cp_lrp", target=lambda model, batch: model(batch)
    )
    assert list(relevance) == ["r.weight_hr_l0"] and set(relevance.unscored) == {"r.weight_ih_l0", "r.weight_hh_l0"}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("training", [True, False])
def test_values_are_those_of_torch_in_every_precision(kind: str, dtype: torch.dtype, training: bool) -> None:
    torch.manual_seed(0)
    layer = KINDS[kind](8, 16, 2, batch_first=True, bidirectional=True).to(dtype).train(training)
    x = torch.randn(4, 9, 8).to(dtype)
    plain = layer(x.clone().requires_grad_())[0]
    with lrp_prune.attributing(layer, "attnlrp") as propagation:
        found = layer(x)[0]
        relevance = propagation.relevance(found.float().square().mean())["input"]
    assert torch.equal(found, plain) and relevance.dtype == dtype and torch.isfinite(relevance).all()


def test_dropout_between_layers_is_off_and_nothing_leaks() -> None:
    layer = nn.LSTM(4, 6, 2, dropout=0.5, batch_first=True).double().train()
    quiet = nn.LSTM(4, 6, 2, batch_first=True).double().train()
    quiet.load_state_dict(layer.state_dict())
    x = torch.randn(3, 5, 4, dtype=torch.float64)
    before, state = copy.deepcopy(layer.state_dict()), torch.random.get_rng_state()
    with lrp_prune.attributing(layer, "attnlrp") as propagation:
        output = layer(x)[0]
        propagation.relevance(output.sum())
    assert torch.equal(output, quiet(x)[0]) and torch.equal(state, torch.random.get_rng_state())
    assert all(torch.equal(before[name], value) for name, value in layer.state_dict().items())
    assert all(parameter.grad is None for parameter in layer.parameters()) and layer.dropout == 0.5
    assert not torch.equal(layer(x)[0], layer(x)[0])  # on again


def test_a_checkpointed_layer_is_scored_once() -> None:
    class Checkpointed(nn.Module):
        def __init__(self, on: bool) -> None:
            super().__init__()
            self.first, self.r, self.on = nn.Linear(4, 4), nn.GRU(4, 6, batch_first=True), on

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            return checkpoint(self.r, x, use_reentrant=False)[0] if self.on else self.r(x)[0]

    models = [Checkpointed(on) for on in (True, False)]
    models[1].load_state_dict(models[0].state_dict())
    x = torch.randn(3, 5, 4)
    found = [lrp_prune.attribute(model, [x], target=lambda m, b: m(b).square().sum()) for model in models]
    norms = [scorer("wanda", model) for model in models]
    for scores in norms:
        scores.update(x)
    for one, two in (found, [scores.compute() for scores in norms]):
        assert list(one) == ["first.weight", "r.weight_ih_l0", "r.weight_hh_l0"]
        for name in one:
            torch.testing.assert_close(one[name], two[name])


def test_a_weight_norm_in_a_recurrent_layer_is_refused_and_a_mask_is_not() -> None:
    model, batch = _small()
    nn.utils.weight_norm(model.r, "weight_hh_l0")
    with pytest.raises(ValueError, match=r"cannot prune r\.weight_hh_l0_v"):
        lrp_prune.prune(model, [batch])
    model, batch = _small()
    torch.nn.utils.prune.l1_unstructured(model.r, "weight_hh_l0", 0.3)
    masks = lrp_prune.prune(model, [batch], sparsity=0.5)
    assert "r.weight_hh_l0_orig" in masks and masks.sparsity == 0.5
    model(batch[0])
    assert not model.r.weight_hh_l0[~masks["r.weight_hh_l0_orig"]].any()


def test_a_model_of_transformers_with_an_lstm() -> None:
    config = tf.EncodecConfig(
        num_filters=2, hidden_size=8, codebook_size=8, codebook_dim=8, upsampling_ratios=[2, 2], num_lstm_layers=2,
        norm_type="time_group_norm", target_bandwidths=[1.5],
    )  # fmt: skip
    torch.manual_seed(0)
    encoder = tf.EncodecModel(config).eval().encoder
    relevance = lrp_prune.attribute(
        encoder, [torch.randn(2, 1, 64)], target=lambda model, batch: model(batch).square().sum(), unruled="ignore"
    )
    weights = {name for name in dict(encoder.named_parameters()) if ".lstm.weight" in name}
    assert len(weights) == 4 and weights <= set(relevance)
    assert all(bool((relevance[name] > 0).any()) for name in weights)
