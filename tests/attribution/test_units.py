"""Neurons, heads, blocks and embedding rows: what they are, what their relevance is, and that masks remove just them."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import lrp_prune
from lrp_prune.relevance import Relevance
from tests.support.small_models import CAUSAL, batch_for, build, forward, largest_sum
from tests.support.units import assert_taken_out_as_if_silent


def _inputs(model: nn.Module, batch: dict[str, Tensor], names: list[str], composite: str) -> dict[str, Tensor]:
    """Relevance ``a d`` of the inputs of modules, as latent relevance of identities put before them."""
    modules = dict(model.named_modules())
    found: dict[str, Tensor] = {}
    handles = []
    for name in names:

        def record(module: nn.Module, args: tuple[Tensor, ...], name: str = name) -> tuple[Tensor, ...]:
            copy = args[0].clone()
            found[name] = copy
            return (copy,)

        handles.append(modules[name].register_forward_pre_hook(record))
    with lrp_prune.attributing(model, composite=composite) as propagation:
        value = largest_sum(model, batch)
        gradients = propagation.gradients(value, [found[name] for name in names])
    for handle in handles:
        handle.remove()
    return {name: (found[name] * gradient).detach() for name, gradient in zip(names, gradients, strict=True)}


@pytest.mark.parametrize("composite", ["attnlrp", "gradient"])
@pytest.mark.parametrize("name", CAUSAL)
def test_head_relevance_is_that_of_the_output_projections_input(name: str, composite: str) -> None:
    model, batch = build(name), batch_for(name)
    heads = lrp_prune.attribute(model, [batch], target=largest_sum, granularity="head", composite=composite)
    assert len(heads) == 2 and all(tensor.shape == (4,) for tensor in heads.values())
    inputs = _inputs(model, batch, list(heads), composite)
    for group, values in heads.items():
        expected = inputs[group].reshape(14, 4, 8).sum(-1).abs().sum(0) / 2
        torch.testing.assert_close(values, expected, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_heads_are_found_in_eager_and_fused_attention(attention: str) -> None:
    heads = lrp_prune.attribute(build("mistral", attention), [batch_for("mistral")], granularity="head")
    assert list(heads) == ["model.layers.0.self_attn.o_proj", "model.layers.1.self_attn.o_proj"]


DENSE = [name for name in CAUSAL if name != "mixtral"]


@pytest.mark.parametrize("name", DENSE)
def test_neurons_are_the_hidden_units_of_the_feed_forward_part(name: str) -> None:
    model, batch = build(name), batch_for(name)
    neurons = lrp_prune.attribute(model, [batch], target=largest_sum, granularity="neuron", statistic="squared_token")
    width = 128 if name == "gpt2" else 48
    assert len(neurons) == 2 and all(tensor.shape == (width,) for tensor in neurons.values())
    inputs = _inputs(model, batch, list(neurons), "attnlrp")
    for group, values in neurons.items():
        expected = inputs[group].reshape(14, width).square().sum(0).div(2).sqrt()
        torch.testing.assert_close(values, expected, rtol=1e-3, atol=1e-7)


def _removed(model: nn.Module, group: str, channels: slice, dim: int = -1) -> Callable[[], None]:
    """Zero channels of a module's input."""

    def zero(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        changed = args[0].clone()
        changed.narrow(dim, channels.start, channels.stop - channels.start).zero_()
        return (changed,)

    return dict(model.named_modules())[group].register_forward_pre_hook(zero).remove


def _without(relevance: Relevance, group: str, unit: int) -> lrp_prune.Masks:
    """Masks that prune the one unit."""
    values = {name: torch.ones_like(tensor) for name, tensor in relevance.items()}
    values[group][unit] = 0
    single = Relevance(
        values,
        granularity=relevance.granularity,
        members=relevance.members,
        parameter_shapes=relevance.parameter_shapes,
    )
    return lrp_prune.select(single, sparsity=1 / sum(tensor.numel() for tensor in values.values()), scope="global")


@pytest.mark.parametrize("granularity", ["head", "neuron"])
@pytest.mark.parametrize("name", DENSE)
def test_a_pruned_unit_is_removed_exactly(name: str, granularity: str) -> None:
    model, batch = build(name), batch_for(name)
    relevance = lrp_prune.attribute(model, [batch], granularity=granularity)
    group = list(relevance)[1]
    width = 8 if granularity == "head" else 1
    remove = _removed(model, group, slice(2 * width, 3 * width))
    expected = forward(model, batch)
    remove()
    dense = forward(model, batch)
    _without(relevance, group, 2).apply_(model)
    torch.testing.assert_close(forward(model, batch), expected, rtol=1e-4, atol=1e-6)
    assert not torch.allclose(dense, expected, atol=1e-6)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_a_pruned_block_writes_nothing(name: str) -> None:
    model, batch = build(name), batch_for(name)
    blocks = lrp_prune.attribute(model, [batch], granularity="block", target=largest_sum)
    group = next(iter(blocks))
    _without(blocks, group, 0).apply_(model)
    written: list[Tensor] = []
    handle = dict(model.named_modules())[group].register_forward_hook(lambda _, __, output: written.append(output))
    forward(model, batch)
    handle.remove()
    assert not written[0].any()


def test_neurons_of_a_gated_layer_own_rows_of_both_and_columns_of_the_reader() -> None:
    relevance = lrp_prune.attribute(build("llama"), [batch_for("llama")], granularity="neuron")
    owners = {
        (member.parameter.split(".")[-2], member.dim) for member in relevance.members["model.layers.0.mlp.down_proj"]
    }
    assert owners == {("down_proj", 1), ("gate_proj", 0), ("up_proj", 0)}


def test_neurons_own_their_biases() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 3))
    relevance = lrp_prune.attribute(model, [(torch.randn(8, 4), torch.randint(3, (8,)))], granularity="neuron")
    assert {(member.parameter, member.dim) for member in relevance.members["2"]} == {
        ("2.weight", 1),
        ("0.weight", 0),
        ("0.bias", 0),
    }


def test_channels_of_a_convolution_reach_through_norm_pooling_and_flattening() -> None:
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(4, 5, 2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(20, 3),
    ).eval()
    batch = (torch.randn(6, 1, 8, 8), torch.randint(3, (6,)))
    relevance = lrp_prune.attribute(model, [batch], granularity="neuron")
    assert {group: tuple(tensor.shape) for group, tensor in relevance.items()} == {"4": (4,), "7": (5,)}
    assert next(member for member in relevance.members["7"] if member.parameter == "7.weight").width == 4
    for group, unit, channels in (("4", 2, slice(2, 3)), ("7", 3, slice(12, 16))):
        remove = _removed(model, group, channels, dim=1)
        expected = model(batch[0])
        remove()
        pruned = nn.Sequential(*model)
        state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        _without(relevance, group, unit).apply_(pruned)
        torch.testing.assert_close(pruned(batch[0]), expected)
        model.load_state_dict(state)


def test_heads_of_torchs_own_attention_are_found() -> None:
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
    model = nn.Sequential(
        nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Flatten(), nn.Linear(80, 3)
    ).eval()
    batch = (torch.randn(3, 5, 16), torch.randint(3, (3,)))
    heads = lrp_prune.attribute(model, [batch], granularity="head")
    assert [name.split(".")[-2:] for name in heads] == [["self_attn", "out_proj"]] * 2
    neurons = lrp_prune.attribute(model, [batch], granularity="neuron")
    assert [name.split(".")[-1] for name in neurons] == ["linear2", "linear2"]


@pytest.mark.slow
@pytest.mark.parametrize("composite", ["gradient", "epsilon", "cp_lrp"])
@pytest.mark.parametrize("name", DENSE)
def test_units_are_found_under_every_composite(name: str, composite: str) -> None:
    for granularity, groups in (("neuron", 2), ("head", 2), ("block", 4)):
        relevance = lrp_prune.attribute(build(name), [batch_for(name)], granularity=granularity, composite=composite)
        assert len(relevance) == groups


def test_a_weight_of_one_row_has_its_dimensions_told_apart() -> None:
    model = nn.Sequential(nn.Linear(1, 6), nn.ReLU(), nn.Linear(6, 1), nn.ReLU(), nn.Linear(1, 2))
    relevance = lrp_prune.attribute(model, [(torch.rand(8, 1), torch.randint(2, (8,)))], granularity="neuron")
    owned = {member.parameter: tuple(member.owners.shape) for member in relevance.members["4"]}
    assert owned == {"4.weight": (1, 1), "2.weight": (1, 1), "2.bias": (1,)}
    owned = {member.parameter: tuple(member.owners.shape) for member in relevance.members["2"]}
    assert owned == {"2.weight": (1, 6), "0.weight": (6, 1), "0.bias": (6,)}


def test_slices_and_gates_keep_heads_apart() -> None:
    """Sinks that are cut off the pattern by a slice, and outputs that are gated before they are projected."""

    class Attention(nn.Module):
        def __init__(self, gated: bool) -> None:
            super().__init__()
            self.gated = gated
            self.qkv, self.gate, self.out = nn.Linear(8, 24), nn.Linear(8, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.qkv(x).view(*x.shape[:2], 3, 2, 4).permute(2, 0, 3, 1, 4)
            scores = torch.cat([q @ k.mT, q[..., :1]], -1).softmax(-1)[..., :-1]
            y = (scores @ v).transpose(1, 2).reshape(x.shape)
            y = y * self.gate(x).sigmoid() if self.gated else y
            return self.out(y).mean(1)

    for gated in (False, True):
        relevance = lrp_prune.attribute(
            Attention(gated).eval(), [(torch.randn(2, 5, 8), torch.tensor([0, 1]))], granularity="head"
        )
        (member,) = relevance.members["out"]
        assert (member.parameter, member.dim, member.width) == ("out.weight", 1, 4) and len(relevance["out"]) == 2


def test_heads_that_are_interleaved_are_told_apart() -> None:
    class Interleaved(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.out = nn.Linear(6, 18), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.qkv(x).view(*x.shape[:2], 3, 2, 3).permute(2, 0, 3, 1, 4)
            y = (q @ k.mT).softmax(-1) @ v  # [samples, heads, tokens, width]
            return self.out(y.permute(0, 2, 3, 1).reshape(x.shape)).mean(1)

    relevance = lrp_prune.attribute(
        Interleaved().eval(), [(torch.randn(2, 5, 6), torch.tensor([0, 1]))], granularity="head"
    )
    assert relevance.members["out"][0].owners.tolist() == [[0, 1, 0, 1, 0, 1]]


class Residual(nn.Module):
    """Two blocks, normed before or after, in sequence or side by side, and a head."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form
        self.stem, self.head = nn.Linear(4, 6), nn.Linear(6, 3)
        self.one = nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 6))
        self.two = nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 6), nn.LayerNorm(6))
        self.scale = nn.Parameter(torch.rand(6))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        if self.form == "in sequence":
            x = x + self.scale * self.one(x)
            x = self.two(x) + x
        elif self.form == "side by side":
            x = x + (self.one(x) + self.two(x))
        elif self.form == "in place":
            x += self.one(x)
            x += self.two(x)
        else:
            x = nn.functional.layer_norm(x + self.one(x), (6,)) + self.two(x)
        return self.head(x)


@pytest.mark.parametrize("form", ["in sequence", "side by side", "in place"])
def test_blocks_are_what_layers_write_onto_a_stream(form: str) -> None:
    torch.manual_seed(0)
    model, x = Residual(form).eval(), torch.randn(5, 4)
    with torch.no_grad():
        model.two[4].bias.fill_(0.5)
    blocks = lrp_prune.attribute(model, [(x, torch.zeros(5, dtype=torch.int64))], granularity="block")
    assert list(blocks) == ["one.3", "two.3"]
    assert [member.parameter for member in blocks.members["two.3"]] == [
        "two.3.weight",
        "two.3.bias",
        "two.4.weight",
        "two.4.bias",
    ]
    assert_taken_out_as_if_silent(blocks, {"one.3": model.one, "two.3": model.two}, model, x)
