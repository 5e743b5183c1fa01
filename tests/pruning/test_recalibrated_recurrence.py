"""Gates of recurrent layers come back to the dense model's, both weights that feed them together."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

import lrp_prune
from lrp_prune.pruning import scorer
from lrp_prune.pruning.recalibration import recalibrate

HIDDEN = 12


class Reader(nn.Module):
    """Reads a sequence, some of it in packed samples or step by step, and answers from all outputs."""

    def __init__(self, layer: nn.Module, how: str = "plain") -> None:
        super().__init__()
        self.layer, self.how = layer, how
        width = getattr(layer, "proj_size", 0) or HIDDEN
        self.head = nn.Linear(width * (2 if getattr(layer, "bidirectional", False) else 1), 3)

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "cell":
            state: Any = None
            for step in x.unbind(1):
                state = self.layer(step, state)
            outputs = state[0] if isinstance(state, tuple) else state
        elif self.how == "packed":
            lengths = torch.arange(len(x)) % x.shape[1] + 1
            packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
            outputs = self.layer(packed)[0].data.reshape(-1, self.head.in_features)
        else:
            outputs = self.layer(x)[0]
        result: Tensor = self.head(outputs)
        return result


LAYERS: dict[str, Callable[[], Reader]] = {
    "lstm": lambda: Reader(nn.LSTM(6, HIDDEN, num_layers=2, batch_first=True)),
    "lstm without biases": lambda: Reader(nn.LSTM(6, HIDDEN, bias=False, batch_first=True)),
    "lstm, projected": lambda: Reader(nn.LSTM(6, HIDDEN, proj_size=5, batch_first=True)),
    "lstm, packed": lambda: Reader(nn.LSTM(6, HIDDEN, batch_first=True), "packed"),
    "gru": lambda: Reader(nn.GRU(6, HIDDEN, bidirectional=True, batch_first=True)),
    "rnn": lambda: Reader(nn.RNN(6, HIDDEN, batch_first=True)),
    "lstm cell": lambda: Reader(nn.LSTMCell(6, HIDDEN), "cell"),
    "gru cell": lambda: Reader(nn.GRUCell(6, HIDDEN), "cell"),
}


def made(name: str, sparsity: float = 0.6) -> tuple[Reader, lrp_prune.Masks, list[tuple[Tensor]]]:
    torch.manual_seed(0)
    model = LAYERS[name]().eval()
    with torch.no_grad():
        for parameter in model.layer.parameters():
            parameter.mul_(2)
    batches = [(torch.randn(35, 7, 6) + torch.randn(35, 1, 1),) for _ in range(4)]
    return model, lrp_prune.select(scorer(lrp_prune.Random(seed=1), model).compute(), sparsity, scope="layer"), batches


@pytest.mark.parametrize("name", LAYERS)
def test_outputs_come_closer_and_the_forecast_is_right(name: str) -> None:
    model, masks, batches = made(name)
    found = recalibrate(model, masks, batches, "regression")
    assert found.strength > 0
    changed = {entry for entry in masks if "weight_hr" not in entry}
    assert changed <= set(found.parameters) and set(found.left_out) == set(masks) - changed
    sparse = copy.deepcopy(model)
    masks.apply_(sparse)
    plain = copy.deepcopy(sparse)
    found.apply_(sparse)
    with torch.no_grad():
        for strength, entry in ((0.0, plain), (found.strength, sparse)):
            dense, given = model(batches[-1][0]), entry(batches[-1][0])
            off = float((given - dense).square().mean() / dense.var(correction=0))
            assert off == pytest.approx(found.divergences[strength], rel=1e-3)
    assert found.divergences[found.strength] < found.divergences[0.0]
    assert all(not sparse.get_parameter(entry)[~mask].any() for entry, mask in masks.items())


@pytest.mark.parametrize("name", ["lstm", "gru", "rnn", "lstm, packed"])
def test_scales_are_the_least_squares_of_what_gates_get_with_dense_states(name: str) -> None:
    model, masks, batches = made(name)
    found = recalibrate(model, masks, batches, "regression", strengths=(1.0,))
    sparse = copy.deepcopy(model)
    masks.apply_(sparse)
    x = torch.cat([batch[0] for batch in batches[:3]])
    with torch.no_grad():
        outputs = model.layer(x)[0][..., :HIDDEN]
        if name == "lstm":  # whose second layer's are outputs
            first = nn.LSTM(6, HIDDEN, batch_first=True)
            first.load_state_dict({key: value for key, value in model.layer.state_dict().items() if "l0" in key})
            outputs = first(x)[0]
        lengths = torch.arange(len(x)) % 7 + 1 if "packed" in name else torch.full((len(x),), 7)
        there = torch.arange(7) < lengths[:, None]
        states = torch.cat([torch.zeros_like(outputs[:, :1]), outputs[:, :-1]], 1)

        def parts(layer: nn.Module) -> tuple[Tensor, Tensor]:
            from_input = x[there] @ layer.weight_ih_l0.T + layer.bias_ih_l0
            return from_input, states[there] @ layer.weight_hh_l0.T + layer.bias_hh_l0

        dense, pruned = parts(model.layer), parts(sparse.layer)
    size = dense[0].shape[-1]
    summed = size - size // 3 if name == "gru" else size
    pairs = [(dense[0] + dense[1], pruned[0] + pruned[1], slice(0, summed))]
    if name == "gru":
        pairs += [(dense[side], pruned[side], slice(summed, size)) for side in (0, 1)]
    mine = [entry for entry in found.scales if entry.name.endswith("l0")]
    assert len(mine) == len(pairs)
    for place, (target, given, rows) in zip(mine, pairs, strict=True):
        for channel in range(rows.start, rows.stop):
            design = torch.stack([given[..., channel].flatten(), torch.ones(given[..., channel].numel())], 1).double()
            expected = torch.linalg.lstsq(design, target[..., channel].reshape(-1, 1).double()).solution.flatten()
            scale, shift = found.scales[place][channel - rows.start], found.shifts[place][channel - rows.start]
            if 0.05 < expected[0] < 5 and given[..., channel].std() > 1e-3:
                torch.testing.assert_close(torch.stack([scale, shift]), expected, rtol=1e-3, atol=1e-4)


def test_weights_of_two_layers_that_are_one_keep_their_scale() -> None:
    model, _, batches = made("lstm")
    model.layer.weight_hh_l1 = model.layer.weight_hh_l0
    masks = lrp_prune.select(scorer(lrp_prune.Random(seed=1), model).compute(), 0.6, scope="layer")
    found = recalibrate(model, masks, batches, "regression", strengths=(1.0,))
    assert {place.name for place in found.scales} == {"head.weight"}
    assert "something else" in found.left_out["layer.weight_hh_l0"]
