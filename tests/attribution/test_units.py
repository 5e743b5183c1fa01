"""Neurons, heads, blocks and embedding rows: what they are, what their relevance is, and that masks remove just them."""

from collections.abc import Callable

import pytest
import torch
from small_models import CAUSAL, batch_for, build, forward
from torch import Tensor, nn

import lrp_prune
from lrp_prune.relevance import Relevance


def _value(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return forward(model, batch).amax(-1).sum()


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
        value = _value(model, batch)
        gradients = propagation.gradients(value, [found[name] for name in names])
    for handle in handles:
        handle.remove()
    return {name: (found[name] * gradient).detach() for name, gradient in zip(names, gradients, strict=True)}


@pytest.mark.parametrize("composite", ["attnlrp", "gradient"])
@pytest.mark.parametrize("name", CAUSAL)
def test_head_relevance_is_that_of_the_output_projections_input(name: str, composite: str) -> None:
    model, batch = build(name), batch_for(name)
    heads = lrp_prune.attribute(model, [batch], target=_value, granularity="head", composite=composite)
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
    neurons = lrp_prune.attribute(model, [batch], target=_value, granularity="neuron", statistic="squared_token")
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
    blocks = lrp_prune.attribute(model, [batch], granularity="block", target=_value)
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


def test_rows_of_an_embedding_are_scored_by_the_tokens_that_occur() -> None:
    model, batch = build("llama"), batch_for("llama")
    rows = lrp_prune.attribute(model, [batch], granularity="embedding", target=_value)["model.embed_tokens.weight"]
    with lrp_prune.attributing(model) as propagation:
        relevance = propagation.relevance(_value(model, batch))["model.embed_tokens"]
    expected = torch.zeros(50).index_add_(0, batch["input_ids"].flatten(), relevance.sum(-1).abs().flatten()) / 2
    torch.testing.assert_close(rows, expected)
    assert (rows > 0).sum() <= batch["input_ids"].unique().numel()


def test_units_are_chosen_by_patterns_of_their_layers() -> None:
    model, batch = build("llama"), batch_for("llama")
    neurons = lrp_prune.attribute(model, [batch], granularity="neuron", include=["model.layers.1.*"])
    assert list(neurons) == ["model.layers.1.mlp.down_proj"]
    with pytest.raises(ValueError, match="no head received relevance"):
        lrp_prune.attribute(
            nn.Sequential(nn.Linear(3, 3)), [(torch.randn(2, 3), torch.tensor([0, 1]))], granularity="head"
        )


def test_abs_sample_separates_samples() -> None:
    model, ids = build("llama"), torch.randint(3, 50, (4, 6))
    together = lrp_prune.attribute(model, [{"input_ids": ids}], granularity="neuron", statistic="abs_sample")
    apart = lrp_prune.attribute(
        model, [{"input_ids": row[None]} for row in ids], granularity="neuron", statistic="abs_sample"
    )
    signed = lrp_prune.attribute(model, [{"input_ids": ids}], granularity="neuron", statistic="signed")
    for group in together:
        torch.testing.assert_close(together[group], apart[group], rtol=1e-4, atol=1e-8)
        assert (together[group] >= signed[group].abs() - 1e-7).all()


@pytest.mark.parametrize("composite", ["gradient", "epsilon", "cp_lrp"])
@pytest.mark.parametrize("name", DENSE)
def test_units_are_found_under_every_composite(name: str, composite: str) -> None:
    for granularity, groups in (("neuron", 2), ("head", 2), ("block", 4)):
        relevance = lrp_prune.attribute(build(name), [batch_for(name)], granularity=granularity, composite=composite)
        assert len(relevance) == groups


def test_a_weight_of_one_row_has_its_dimensions_told_apart() -> None:
    model = nn.Sequential(nn.Linear(1, 6), nn.ReLU(), nn.Linear(6, 1), nn.ReLU(), nn.Linear(1, 2))
    relevance = lrp_prune.attribute(model, [(torch.rand(8, 1), torch.randint(2, (8,)))], granularity="neuron")
    assert {(member.parameter, member.dim) for member in relevance.members["4"]} >= {("4.weight", 1), ("2.weight", 0)}
