"""What is a gate, a pattern or the output of heads stays so through slices, chunks and gates of its own."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lrp_prune
from tests.support.small_models import GATED, batch_for, build, forward


class Gated(nn.Module):
    def __init__(self, gate: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.gate = gate

    def forward(self, gate: Tensor, value: Tensor) -> Tensor:
        return self.gate(gate) * value


WAYS: dict[str, Callable[[Tensor], Tensor]] = {
    "as it is": torch.sigmoid,
    "a slice": lambda x: torch.sigmoid(x.repeat(1, 2))[:, :6],
    "every second": lambda x: torch.sigmoid(x.repeat_interleave(2, -1))[..., ::2],
    "a chunk": lambda x: torch.sigmoid(x.repeat(1, 2)).chunk(2, -1)[0],
    "a part": lambda x: torch.sigmoid(x.repeat(1, 2)).split(6, -1)[1],
    "narrowed": lambda x: torch.sigmoid(x.repeat(1, 2)).narrow(-1, 0, 6),
    "one of several": lambda x: torch.sigmoid(x[:, None].repeat(1, 2, 1)).unbind(1)[0],
    "selected": lambda x: torch.sigmoid(x[:, None].repeat(1, 2, 1)).select(1, 0),
    "by an index": lambda x: torch.sigmoid(x).index_select(-1, torch.arange(6)),
    "turned": lambda x: torch.sigmoid(x.flip(-1)).flip(-1),
    "repeated": lambda x: torch.sigmoid(x[:, :1]).repeat(1, 6),
    "one less": lambda x: 1 - torch.sigmoid(x),
    "one more": lambda x: torch.tanh(x) + 1,
    "in place": lambda x: (x * 1).sigmoid_()[:, :],
    "scaled": lambda x: 2.5 * torch.sigmoid(x) * torch.arange(1.0, 7.0) / 3,
    "in its share of all": lambda x: torch.sigmoid(x) / torch.sigmoid(x).sum(-1, keepdim=True),
    "the largest": lambda x: torch.sigmoid(x).topk(6, -1).values,
    "sorted": lambda x: torch.sigmoid(x).sort(-1)[0],
    "cast": lambda x: torch.sigmoid(x).double().float(),
}


@pytest.mark.parametrize("way", WAYS)
def test_cp_lrp_stops_a_gate_however_it_gets_there(way: str) -> None:
    gate, value = torch.randn(3, 6), torch.randn(3, 6)
    with lrp_prune.attributing(model := Gated(WAYS[way]), "cp_lrp", unruled="error") as propagation:
        output = model(gate, value)
        relevance = propagation.relevance(output.square().sum() / 2)
    torch.testing.assert_close(relevance["value"], output.detach().square())
    assert not relevance["gate"].any()


def test_what_a_gate_is_multiplied_with_in_place_is_no_gate_any_more() -> None:
    class InPlace(nn.Module):
        def forward(self, gate: Tensor, value: Tensor, other: Tensor) -> Tensor:
            product = torch.sigmoid(gate)
            product *= value
            return product * other

    gate, value, other = torch.randn(3, 6), torch.randn(3, 6), torch.randn(3, 6)
    with lrp_prune.attributing(model := InPlace(), "cp_lrp", unruled="error") as propagation:
        output = model(gate, value, other)
        relevance = propagation.relevance(output.sum())
    assert not relevance["gate"].any()
    torch.testing.assert_close(relevance["value"], output.detach() / 2)
    torch.testing.assert_close(relevance["other"], output.detach() / 2)


@pytest.mark.parametrize("composite", ["attnlrp", "gradient"])
def test_other_composites_do_not_ask_what_is_a_gate(composite: str) -> None:
    gate, value = torch.randn(3, 6), torch.randn(3, 6)
    share = {"attnlrp": 0.5, "gradient": 1.0}[composite]
    with lrp_prune.attributing(model := Gated(torch.sigmoid), composite) as propagation:
        output = model(gate, value)
        relevance = propagation.relevance(output.square().sum() / 2)
    torch.testing.assert_close(relevance["value"], share * output.detach().square())


def test_a_unit_that_blends_two_states_by_a_gate_has_its_gate_stopped_on_both_sides() -> None:
    """``(1 - z) * n + z * h``, as gated recurrent units do."""

    class Blend(nn.Module):
        def forward(self, z: Tensor, n: Tensor, h: Tensor) -> Tensor:
            z = torch.sigmoid(z)
            return (1 - z) * n + z * h

    z, n, h = torch.randn(3, 6), torch.randn(3, 6), torch.randn(3, 6)
    with lrp_prune.attributing(model := Blend(), "cp_lrp", unruled="error") as propagation:
        relevance = propagation.relevance(model(z, n, h).sum())
    assert not relevance["z"].any()
    torch.testing.assert_close(relevance["n"], (1 - z.sigmoid()) * n)
    torch.testing.assert_close(relevance["h"], z.sigmoid() * h)


@pytest.mark.parametrize("name", GATED)
def test_heads_are_found_behind_sinks_and_gates(name: str) -> None:
    model, batch = build(name), batch_for(name)
    layers = [index for index, layer in enumerate(model.model.layers) if hasattr(layer, "self_attn")]
    for composite in ("attnlrp", "cp_lrp"):
        heads = lrp_prune.attribute(
            model, [batch], composite=composite, granularity="head", statistic="signed", unruled="ignore"
        )
        assert set(heads) >= {f"model.layers.{index}.self_attn.o_proj" for index in layers}
        assert all(heads[f"model.layers.{index}.self_attn.o_proj"].shape == (4,) for index in layers)


@pytest.mark.parametrize("name", GATED)
def test_what_a_head_has_is_what_its_channels_have(name: str) -> None:
    """Against the input of the output projection times its gradient, recorded by a hook; per sample, of which there are two."""
    model, batch = build(name), batch_for(name)
    index = next(index for index, layer in enumerate(model.model.layers) if hasattr(layer, "self_attn"))
    projection, seen = model.model.layers[index].self_attn.o_proj, []

    def value(model: nn.Module, batch: Any) -> Tensor:
        return forward(model, batch)[:, 1].sum()

    handle = projection.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with lrp_prune.attributing(model, unruled="ignore") as propagation:
        explained = value(model, batch)
        (gradient,) = propagation.gradients(explained, seen[:1])
    handle.remove()
    expected = (seen[0] * gradient).detach().sum((0, 1)).view(4, -1).sum(-1) / 2
    heads = lrp_prune.attribute(
        model, [batch], value, "attnlrp", granularity="head", statistic="signed", unruled="ignore"
    )
    torch.testing.assert_close(heads[f"model.layers.{index}.self_attn.o_proj"], expected, rtol=1e-4, atol=1e-7)


def test_a_pattern_that_is_cut_and_normalised_again_is_a_pattern() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.project, self.out = nn.Linear(8, 24, bias=False), nn.Linear(8, 8, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.project(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
            pattern = F.softmax(torch.cat([q @ k.transpose(-1, -2), torch.ones(*q.shape[:-1], 1)], -1), -1)[..., :-1]
            pattern = pattern / pattern.sum(-1, keepdim=True)
            result: Tensor = self.out((pattern @ v).transpose(1, 2).flatten(2))
            return result

    heads = lrp_prune.attribute(Attention(), [torch.randn(2, 5, 8)], lambda m, x: m(x).sum(), granularity="head")
    assert {name: tuple(values.shape) for name, values in heads.items()} == {"out": (2,)}
