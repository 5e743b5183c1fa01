"""Small recurrent layers of every kind, and a model around one."""

from typing import Any

import torch
from torch import Tensor, nn

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
OF_LSTM: dict[str, dict[str, Any]] = {
    "projections": {"proj_size": 3},
    "projections, two layers, both directions": {"proj_size": 3, "num_layers": 2, "bidirectional": True},
}
LAYERS = [(kind, shape) for kind in KINDS for shape in SHAPES] + [("lstm", shape) for shape in OF_LSTM]


def recurrent_layer(kind: str, shape: str, bias: bool = True) -> nn.RNNBase:
    torch.manual_seed(0)
    layer: nn.RNNBase = KINDS[kind](4, 6, bias=bias, **(SHAPES | OF_LSTM)[shape]).double().eval()
    return layer


def inputs_for(layer: nn.RNNBase) -> Tensor:
    x = torch.randn(3, 5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return x if layer.batch_first else x.transpose(0, 1)


class Model(nn.Module):
    """A recurrent layer, from its initial states or from zeros, and a value from all that it returns."""

    def __init__(self, layer: nn.RNNBase) -> None:
        super().__init__()
        self.r = layer

    def forward(self, x: Tensor, *state: Tensor) -> Tensor:
        packed = isinstance(self.r, nn.LSTM)
        output, final = self.r(x, (state if packed else state[0]) if state else None)
        return value_of(output if self.r.batch_first else output.transpose(0, 1), final if packed else (final,))


def value_of(output: Tensor, final: tuple[Tensor, ...]) -> Tensor:
    """Looks at each output and each final state, each with a weight of its own."""
    total = (output * torch.linspace(-1, 2, output.numel(), dtype=output.dtype).view_as(output)).sum()
    for number, entry in enumerate(final):
        total = total + (entry * torch.linspace(1 + number, -1, entry.numel(), dtype=entry.dtype).view_as(entry)).sum()
    return total
