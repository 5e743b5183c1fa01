"""Recurrent layers written out step by step, with rules as tricks of plain autograd: what relevance must equal."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


def _identity(function: Any, x: Tensor, composite: str) -> Tensor:
    """``f(x)`` with the slope ``f(x) / x``; with its own under the plain gradient."""
    value: Tensor = function(x)
    if composite == "gradient":
        return value
    slope = torch.where(x == 0, torch.zeros_like(x), value / x).detach()
    return x * slope + (value - x * slope).detach()


def _gated(x: Tensor, signal: Tensor, composite: str) -> Tensor:
    """``sigmoid(x) * signal``: half of the signal, and a product of which each side has its share."""
    gate = _identity(torch.tanh, x / 2, composite) / 2
    if composite == "cp_lrp":
        return signal / 2 + gate.detach() * signal
    if composite == "attnlrp" and signal.requires_grad:  # by a constant it is only scaled
        product = gate * signal
        return signal / 2 + product / 2 + product.detach() / 2
    return signal / 2 + gate * signal


class Explicit:
    """One pass through a layer of torch's, with what meets each weight.

    Args:
        layer: ``nn.LSTM``, ``nn.GRU`` or ``nn.RNN``.
        composite: name of the rules.
        lengths: tokens of each sample; None for all.
    """

    def __init__(self, layer: nn.RNNBase, composite: str, lengths: Sequence[int] | None = None) -> None:
        self.layer, self.composite, self.lengths = layer, composite, lengths
        self.met: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {}
        """Weight -> for each step the activations, what it is multiplied to, and which samples are there."""

    def __call__(self, x: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """``[samples, tokens, features]`` and initial states ``[layers, samples, features]`` to outputs and final states."""
        layer, ways = self.layer, 2 if self.layer.bidirectional else 1
        finals = []
        for index in range(layer.num_layers):
            outputs = []
            for way in range(ways):
                place = index * ways + way
                suffix = f"l{index}{'_reverse' if way else ''}"
                output, final = self._one(x, tuple(entry[place] for entry in state), suffix, way == 1)
                outputs.append(output)
                finals.append(final)
            x = torch.cat(outputs, -1)
        return x, tuple(torch.stack(entries) for entries in zip(*finals, strict=True))

    def _meet(self, name: str, a: Tensor, present: Tensor) -> Tensor:
        weight = getattr(self.layer, name).detach()
        result = a @ weight.T
        if a.requires_grad:
            result = result + torch.zeros_like(result, requires_grad=True)
        self.met.setdefault(name, []).append((a.detach(), result, present))
        bias = getattr(self.layer, name.replace("weight", "bias"), None) if self.layer.bias else None
        return result if bias is None else result + bias.detach()

    def _one(
        self, x: Tensor, state: tuple[Tensor, ...], suffix: str, backwards: bool
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        tokens = x.shape[1]
        outputs: dict[int, Tensor] = {}
        for token in reversed(range(tokens)) if backwards else range(tokens):
            lengths = self.lengths or [tokens] * len(x)
            present = torch.tensor([token < length for length in lengths])
            given = self._meet(f"weight_ih_{suffix}", x[:, token], present)
            kept = self._meet(f"weight_hh_{suffix}", state[0], present)
            new = self._step(given, kept, state)
            if getattr(self.layer, "proj_size", 0):
                new = (self._meet(f"weight_hr_{suffix}", new[0], present), *new[1:])
            state = tuple(torch.where(present[:, None], n, o) for n, o in zip(new, state, strict=True))
            outputs[token] = torch.where(present[:, None], new[0], torch.zeros_like(new[0]))
        return torch.stack([outputs[token] for token in range(tokens)], 1), state

    def _step(self, given: Tensor, kept: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        rules = self.composite
        if isinstance(self.layer, nn.LSTM):
            i, f, g, o = (given + kept).split(self.layer.hidden_size, 1)
            c = _gated(f, state[1], rules) + _gated(i, _identity(torch.tanh, g, rules), rules)
            return _gated(o, _identity(torch.tanh, c, rules), rules), c
        if isinstance(self.layer, nn.GRU):
            (xr, xz, xn), (hr, hz, hn) = (entry.split(self.layer.hidden_size, 1) for entry in (given, kept))
            new = _identity(torch.tanh, xn + _gated(xr + hr, hn, rules), rules)
            return (_gated(-(xz + hz), new, rules) + _gated(xz + hz, state[0], rules),)
        function = torch.relu if self.layer.nonlinearity == "relu" else torch.tanh
        return (_identity(function, given + kept, rules),)

    def statistics(self, value: Tensor, statistic: str) -> dict[str, Tensor]:
        """What each weight's relevance is for the explained value, summed over samples and steps by definition."""
        found = {}
        for name, steps in self.met.items():
            weight = getattr(self.layer, name).detach()
            gradients = [
                torch.autograd.grad(value, result, retain_graph=True, allow_unused=True)[0]
                if result.requires_grad
                else None
                for _, result, _ in steps
            ]
            parts = [
                weight * torch.einsum("so,si->soi", torch.zeros_like(result) if d is None else d, a)
                * present[:, None, None]
                for (a, result, present), d in zip(steps, gradients, strict=True)
            ]  # fmt: skip
            each = torch.stack(parts, 1)  # [samples, steps, out, in]
            energy = sum((a * present[:, None]).square().sum(0) for a, _, present in steps)
            if statistic == "signed":
                found[name] = each.sum((0, 1))
            elif statistic == "abs_sample":
                found[name] = each.sum(1).abs().sum(0)
            elif statistic in ("abs_token", "pxp"):  # there are no maps
                found[name] = each.abs().sum((0, 1))
            elif statistic == "input_norm":
                found[name] = weight.square() * energy
            else:
                found[name] = each.square().sum((0, 1))
                if statistic == "geometric":
                    share = weight.abs() * energy.sqrt() / (weight.abs().mean(0) * energy.sqrt()).mean()
                    found[name] = found[name].sqrt().pow(2 / 3) * share.pow(1 / 3)
        return found


class LastStep(nn.Module):
    """A recurrent layer whose last output a linear head reads; if not told otherwise, an LSTM of 240 weights and a head of 18."""

    def __init__(self, recurrent: nn.Module | None = None, head: nn.Module | None = None) -> None:
        super().__init__()
        self.r = recurrent or nn.LSTM(4, 6, batch_first=True)
        self.o = head or nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.o(self.r(x)[0][:, -1])
        return result
