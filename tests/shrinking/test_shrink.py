"""Shrinking: what masks of units prune is taken out, and the model computes what it computed under them."""

import copy
import re
from typing import Any

import lightning
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lrp_prune
from lrp_prune.models.batches import tensors
from lrp_prune.models.calling import run
from lrp_prune.shrinking.proof import Proof
from tests.support.channel_nets import NETS, Net, conv_bn, pooled
from tests.support.sharding import sharded, together
from tests.support.small_models import CAUSAL, batch_for, build, forward, llama
from tests.support.units import randomized

CLASSES = torch.zeros(3, dtype=torch.int64)


def masks_of(
    model: nn.Module, batch: Any, granularity: str, sparsity: float = 0.5, scope: str = "layer", **options: Any
) -> lrp_prune.Masks:
    """Masks by magnitude; the model stays as it is."""
    return lrp_prune.prune(
        copy.deepcopy(model),
        [batch],
        sparsity,
        "magnitude",
        scope,
        granularity=granularity,
        recalibrate=False,
        progress=False,
        **options,
    )


def masked(model: nn.Module, masks: lrp_prune.Masks) -> nn.Module:
    pruned = copy.deepcopy(model)
    masks.apply_(pruned)
    return pruned


def value(model: nn.Module, batch: Any) -> Tensor:
    """Something to explain: which units there are does not depend on it."""
    output = run(model, batch)
    return next(each for each in tensors(output) if each.is_floating_point()).sum()


def keeping(model: nn.Module, batch: Any, granularity: str, kept: dict[str, list[int]]) -> lrp_prune.Masks:
    """Masks that leave these units of each layer, by the end of its name, and all of other layers."""
    options: dict[str, Any] = {"statistic": "squared_token", "include": ["*"], "unruled": "ignore"}
    relevance = lrp_prune.attribute(model, [batch], target=value, granularity=granularity, **options)
    values = {name: torch.ones(len(each)) for name, each in relevance.items()}
    for end, units in kept.items():
        (name,) = (name for name in values if name.endswith(end))
        values[name] = torch.zeros(len(values[name])).index_fill(0, torch.tensor(units), 1.0)
    number = sum(int((each == 0).sum()) for each in values.values())
    scores = relevance.with_values(values, "given")
    return lrp_prune.select(scores, number / sum(len(each) for each in values.values()), scope="global")


def sizes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


@pytest.mark.filterwarnings("ignore:.*no units that could be removed")
@pytest.mark.filterwarnings("ignore::lrp_prune.pruning.emptied.EmptiedWeightsWarning")
@pytest.mark.parametrize("name", [name for name in NETS if name != "shuffled"])  # by a number of channels that it needs
def test_filters_go_with_all_that_is_theirs(name: str) -> None:
    torch.manual_seed(0)
    model, x = randomized(NETS[name][0]()), torch.randn(3, 4, 6, 6, dtype=torch.float64)
    masks = masks_of(model, (x, CLASSES), "neuron")
    expected, before = masked(model, masks)(x), sizes(model)
    shrunk = lrp_prune.shrink(model, masks, [(x, CLASSES)])
    torch.testing.assert_close(model(x), expected, rtol=1e-10, atol=1e-10)
    changed = {name: (size, before[name]) for name, size in sizes(model).items() if size != before[name]}
    assert changed and all(all(new <= old for new, old in zip(*pair, strict=True)) for pair in changed.values())
    assert (
        shrunk.after.parameters == sum(parameter.numel() for parameter in model.parameters()) < shrunk.before.parameters
    )
    for layer in (layer for layer in model.modules() if isinstance(layer, nn.Conv2d)):
        assert (layer.out_channels, layer.in_channels // layer.groups) == tuple(layer.weight.shape[:2])
    for layer in (layer for layer in model.modules() if isinstance(layer, nn.BatchNorm2d)):
        assert {layer.num_features} == {len(value) for value in (layer.weight, layer.bias, layer.running_mean)}


NEURONS = {"llama": 24, "gpt2": 64, "phi3": 24, "gemma": 24, "opt": 24, "bert": 24, "vit": 24, "t5": 24, "bart": 24}


@pytest.mark.slow
@pytest.mark.parametrize("name", NEURONS)
def test_neurons_of_transformers_go_and_the_configuration_says_so(name: str, tmp_path: Any) -> None:
    model, batch = build(name), batch_for(name)
    only = {"exclude": ["*pooler*"]} if name == "bert" else {}  # as wide as the stream, whatever goes
    masks = masks_of(model, batch, "neuron", **only)
    expected = forward(masked(model, masks), batch)
    shrunk = lrp_prune.shrink(model, masks, [batch], uniform=True)
    torch.testing.assert_close(forward(model, batch), expected, rtol=1e-4, atol=1e-5)
    assert {layer.units - layer.taken for layer in shrunk.layers} == {NEURONS[name]}
    assert not shrunk.left and shrunk.loads_plainly
    shrunk.save(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    assert sizes(again) == sizes(model)
    assert torch.equal(forward(again, batch), forward(model, batch))


HEADS = ["llama", "mistral", "qwen3", "phi3", "mixtral", "gpt2", "opt", "bert", "vit", "bart"]


@pytest.mark.slow
@pytest.mark.parametrize("name", HEADS)
def test_heads_go_with_their_queries_keys_and_values(name: str) -> None:
    model, batch = build(name), batch_for(name)
    grouped = name in ("llama", "mistral", "qwen3", "phi3", "mixtral")
    relevance = lrp_prune.attribute(model, [batch], target=value, granularity="head", statistic="squared_token")
    # Of grouped-query attention the heads that share the first key.
    kept = {group: [2, 3] if grouped else [1, 2] for group in relevance}
    masks = keeping(model, batch, "head", kept)
    expected, before = forward(masked(model, masks), batch), sizes(model)
    shrunk = lrp_prune.shrink(model, masks, [batch])
    torch.testing.assert_close(forward(model, batch), expected, rtol=1e-4, atol=1e-5)
    assert shrunk.taken == 2 * len(relevance) and not shrunk.left
    made = [name for name, size in sizes(model).items() if size != before[name] and name.rsplit(".", 2)[1] != "attn"]
    rows = {re.sub(r"^.*?([a-z_]+)\.weight", r"\1", name) for name in made if name.endswith("weight")}
    expected_rows = {
        "gpt2": {"c_attn", "c_proj"},
        "phi3": {"qkv_proj", "o_proj"},
        "bert": {"query", "key", "value", "dense"},
        "bart": {"q_proj", "k_proj", "v_proj", "out_proj"},
        "opt": {"q_proj", "k_proj", "v_proj", "out_proj"},
    }
    assert rows == expected_rows.get(name, {"q_proj", "k_proj", "v_proj", "o_proj"})
    for parameter in made:
        assert sum(sizes(model)[parameter]) < sum(before[parameter])


@pytest.mark.slow
def test_a_configuration_says_how_many_heads_are_left(tmp_path: Any) -> None:
    model, batch = build("llama"), batch_for("llama")
    masks = keeping(model, batch, "head", {"0.self_attn.o_proj": [2, 3], "1.self_attn.o_proj": [0, 1]})
    shrunk = lrp_prune.shrink(model, masks, [batch])
    assert (model.config.num_attention_heads, model.config.num_key_value_heads, model.config.head_dim) == (2, 1, 8)
    assert "num_attention_heads 4 -> 2" in str(shrunk)
    shrunk.save(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    assert torch.equal(forward(again, batch), forward(model, batch))
    generated = [each.generate(batch["input_ids"], max_new_tokens=5, do_sample=False) for each in (model, again)]
    assert torch.equal(*generated)  # with its cache of keys and values


@pytest.mark.slow
def test_shapes_alone_do_not_make_a_configuration(tmp_path: Any) -> None:
    """Half as many heads have the shapes of as many heads of half the width."""
    model, batch = build("mixtral"), batch_for("mixtral")
    kept = {"0.self_attn.o_proj": [2, 3], "1.self_attn.o_proj": [0, 1]}
    shrunk = lrp_prune.shrink(model, keeping(model, batch, "head", kept), [batch])
    assert (model.config.num_attention_heads, model.config.num_key_value_heads, model.config.head_dim) == (2, 1, 8)
    shrunk.save(tmp_path)
    assert torch.equal(forward(type(model).from_pretrained(tmp_path).eval(), batch), forward(model, batch))


class Grouped:
    """What becomes of a Llama with two sets of two heads, by which of its heads are left."""

    CASES = (
        ([0, 1, 3], 0, 4, 2),  # one of a set: its key is needed, and the other set would have more heads
        ([1, 3], 2, 2, 2),  # one of each set
        ([0, 1], 2, 2, 1),  # a whole set
        ([1], 3, 1, 1),  # a whole set, and of the only one that is left one more
    )


@pytest.mark.slow
@pytest.mark.parametrize(("kept", "taken", "queries", "keys"), Grouped.CASES)
def test_heads_that_share_a_key_go_together_or_evenly(kept: list[int], taken: int, queries: int, keys: int) -> None:
    model, batch = build("llama"), batch_for("llama")
    other = {} if taken else {"1.self_attn.o_proj": [1, 3]}  # so that layers differ, which no configuration says
    masks = keeping(model, batch, "head", {"0.self_attn.o_proj": kept, **other})
    expected = forward(masked(model, masks), batch)
    shrunk = lrp_prune.shrink(model, masks, [batch])
    torch.testing.assert_close(forward(model, batch), expected, rtol=1e-4, atol=1e-5)
    (first,) = (layer for layer in shrunk.layers if "layers.0" in layer.name)
    assert first.taken == taken
    attention = model.model.layers[0].self_attn
    assert (attention.q_proj.out_features, attention.k_proj.out_features) == (8 * queries, 8 * keys)
    assert attention.num_key_value_groups == queries // keys
    assert ("share rows of" in first.why) == (taken < 4 - len(kept))


@pytest.mark.slow
def test_heads_that_share_position_biases_go_where_they_are_dead_in_all_layers() -> None:
    model, batch = build("t5"), batch_for("t5")
    kept = {"encoder.block.0.layer.0.SelfAttention.o": [0, 1], "encoder.block.1.layer.0.SelfAttention.o": [0, 3]}
    masks = keeping(model, batch, "head", kept)
    expected = forward(masked(model, masks), batch)
    shrunk = lrp_prune.shrink(model, masks, [batch])
    torch.testing.assert_close(forward(model, batch), expected, rtol=1e-4, atol=1e-5)
    encoder = [layer.layer[0].SelfAttention for layer in model.encoder.block]
    assert [(each.q.out_features, each.n_heads) for each in encoder] == [(24, 3)] * 2  # head 2 is gone
    assert tuple(encoder[0].relative_attention_bias.weight.shape) == (32, 3)
    assert all("is shared with" in why for why in shrunk.left.values()) and len(shrunk.left) == 2


@pytest.mark.slow
def test_numbers_that_no_output_depends_on_are_those_of_a_model_of_the_new_sizes() -> None:
    model, batch = (
        build("t5"),
        batch_for("t5"),
    )  # inner_dim is the number of heads times their width, and the width of the stream
    groups = [name for name in lrp_prune.attribute(model, [batch], target=value, granularity="head")]
    shrunk = lrp_prune.shrink(model, keeping(model, batch, "head", {name: [0, 2, 3] for name in groups}), [batch])
    assert shrunk.loads_plainly and model.config.num_heads == 3
    attentions = [module for module in model.modules() if hasattr(module, "inner_dim")]
    assert {(each.n_heads, each.inner_dim, each.d_model) for each in attentions} == {(3, 24, 32)}


@pytest.mark.slow
def test_neurons_and_heads_of_one_model_go_together() -> None:
    model, batch = build("llama"), batch_for("llama")
    masks = masks_of(model, batch, "neuron")
    heads = keeping(model, batch, "head", {"0.self_attn.o_proj": [0, 1], "1.self_attn.o_proj": [0, 1]})
    heads.apply_(model)
    masks.apply_(model)
    expected = forward(model, batch)
    shrunk = lrp_prune.shrink(model, None, [batch])  # what is zero in the model
    torch.testing.assert_close(forward(model, batch), expected, rtol=1e-4, atol=1e-5)
    assert {layer.kind: layer.taken for layer in shrunk.layers} == {"neuron": 24, "head": 2}
    assert shrunk.loads_plainly


@pytest.mark.slow
def test_layers_of_a_kind_lose_the_same_number_if_it_is_to_be_uniform() -> None:
    model, batch = build("llama"), batch_for("llama")
    kept = {"0.mlp.down_proj": list(range(40)), "1.mlp.down_proj": list(range(10))}
    masks = keeping(model, batch, "neuron", kept)
    expected = forward(masked(model, masks), batch)
    uneven, even = (copy.deepcopy(model) for _ in range(2))
    assert "layers differ in" in str(lrp_prune.shrink(uneven, masks, [batch]))
    assert [layer.mlp.down_proj.in_features for layer in uneven.model.layers] == [40, 10]
    assert uneven.config.intermediate_size == 48
    shrunk = lrp_prune.shrink(even, masks, [batch], uniform=True)
    assert [layer.mlp.down_proj.in_features for layer in even.model.layers] == [40, 40]
    assert even.config.intermediate_size == 40 and shrunk.loads_plainly
    assert list(shrunk.left) == ["model.layers.1.mlp.down_proj"]
    for each in (uneven, even):
        torch.testing.assert_close(forward(each, batch), expected, rtol=1e-4, atol=1e-5)


def test_what_is_left_can_be_divided_if_it_is_to_be() -> None:
    model, batch = llama(), {"input_ids": torch.arange(14).view(2, 7)}
    masks = keeping(model, batch, "neuron", {"0.mlp.down_proj": list(range(13)), "1.mlp.down_proj": list(range(23))})
    expected = masked(model, masks)(**batch).logits
    shrunk = lrp_prune.shrink(model, masks, [batch], multiple_of=8)
    torch.testing.assert_close(model(**batch).logits, expected, rtol=1e-4, atol=1e-5)
    assert [layer.mlp.up_proj.out_features for layer in model.model.layers] == [16, 24]
    assert {name: "multiple_of=8" in why for name, why in shrunk.left.items()} == {
        f"model.layers.{layer}.mlp.down_proj": True for layer in (0, 1)
    }
    with pytest.raises(ValueError, match="multiple_of"):
        lrp_prune.shrink(model, None, [batch], multiple_of=0)


class Lightning(lightning.LightningModule):
    """Holds a model, as a training does."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
        return self.model(**batch).loss


def test_the_model_in_a_lightning_module_is_shrunk_and_trains_on() -> None:
    inner, batch = llama(), {"input_ids": torch.arange(14).view(2, 7)}
    module = Lightning(inner)
    masks = masks_of(inner, batch, "neuron")
    expected = masked(inner, masks)(**batch).logits
    assert lrp_prune.shrink(module, masks, [batch]).taken == 24
    torch.testing.assert_close(module.model(**batch).logits, expected)
    module.model.train()
    module.training_step({**batch, "labels": batch["input_ids"]}, 0).backward()
    assert all(
        parameter.grad is not None and parameter.grad.shape == parameter.shape for parameter in inner.parameters()
    )


def test_tied_weights_are_cut_in_all_of_their_places() -> None:
    """Two layers that share the weight by which they read, and the same neurons are dead in both."""

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down, self.again, self.head = (nn.Linear(*size) for size in ((4, 8), (8, 4), (8, 4), (4, 2)))
            self.again.weight = self.down.weight

        def forward(self, x: Tensor) -> Tensor:
            hidden = self.up(x).relu()
            return self.head(self.down(hidden) * self.again(hidden))

    torch.manual_seed(0)
    model, x = Tied().eval(), torch.randn(5, 4)
    masks = keeping(model, (x, torch.zeros(5, dtype=torch.int64)), "neuron", {"down": [1, 4, 6]})
    expected = masked(model, masks)(x)
    lrp_prune.shrink(model, masks, [x])
    torch.testing.assert_close(model(x), expected)
    assert model.down.weight is model.again.weight and tuple(model.down.weight.shape) == (4, 3)
    assert model.again.in_features == 3


def test_whether_parameters_are_trained_is_kept_and_nothing_else_changes() -> None:
    model, batch = build("llama"), batch_for("llama")
    model.model.layers[0].requires_grad_(False)
    model.train()
    masks, before = masks_of(model, batch, "neuron"), copy.deepcopy(model)
    state = torch.get_rng_state()
    lrp_prune.shrink(model, masks, [batch])
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training and all(module.training for module in model.modules())
    after = dict(model.named_parameters())
    for name, parameter in before.named_parameters():
        assert after[name].requires_grad == parameter.requires_grad and after[name].grad is None
        assert torch.equal(after[name], parameter) or ".mlp." in name


def test_what_was_measured_is_printed_and_the_smaller_model_is_left() -> None:
    model = nn.Sequential(nn.Linear(64, 2048), nn.ReLU(), nn.Linear(2048, 64)).eval()
    x = torch.randn(256, 64)
    masks = masks_of(model, (x, torch.zeros(256, dtype=torch.int64)), "neuron", 0.9)
    shrunk = lrp_prune.shrink(model, masks, [x], measure=3)
    assert model[0].out_features == 205
    assert shrunk.speed is not None and shrunk.speed.ratio > 1.2
    assert shrunk.speed.memory_after < 0.2 * shrunk.speed.memory_before
    assert f"{shrunk.speed.ratio:.2f} times faster" in " ".join(str(shrunk).split())


def test_what_would_break_stays_and_is_told() -> None:
    """Channels of one convolution are counted by hand, and those of the others are not."""

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(4, 6, 1), nn.Conv2d(6, 5, 1), nn.Conv2d(5, 4, 1)
            self.register_buffer("scale", torch.rand(6, 1, 1) + 0.5)

        def forward(self, x: Tensor) -> Tensor:
            return pooled(self.c(self.b(self.a(x).relu() * self.scale).relu()))

    torch.manual_seed(0)
    model = Scaled().eval()
    x = torch.randn(3, 4, 5, 5)
    masks = masks_of(model, (x, CLASSES), "neuron")
    expected, before = masked(model, masks)(x), copy.deepcopy(model)
    with pytest.raises(ValueError, match=r"not all units.*can be taken out \(b: the model does not run without them"):
        lrp_prune.shrink(model, masks, [x], strict=True)
    assert all(torch.equal(*pair) for pair in zip(model.parameters(), before.parameters(), strict=True))
    shrunk = lrp_prune.shrink(model, masks, [x])
    torch.testing.assert_close(model(x), expected)
    assert list(shrunk.left) == ["b"] and model.a.out_channels == 6 and model.b.out_channels == 3
    assert re.search(r"still there, as zeros, in b: the\s+model does not run", str(shrunk).replace("\n  ", " "))


def test_outputs_that_would_differ_are_seen() -> None:
    """A channel is read by its place: without the others it is another one, and everything would run."""

    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            hidden = self.a(x).relu()
            return self.b(hidden * (1 + torch.arange(hidden.shape[-1])))

    torch.manual_seed(0)
    model, x = Fixed().eval(), torch.randn(5, 4)
    masks = keeping(model, (x, torch.zeros(5, dtype=torch.int64)), "neuron", {"b": [2, 5]})
    with pytest.raises(ValueError, match=r"none of the units.*b: the outputs would be others without them"):
        lrp_prune.shrink(model, masks, [x])
    assert model.a.out_features == 6 and bool(model.a.weight.all())


def test_numbers_of_modules_change_if_the_outputs_need_it() -> None:
    """One number is the width of the hidden layer, and another one happens to be as large."""

    class Split(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.hidden = self.width = 8
            self.told = (8, 3)
            self.up, self.down = nn.Linear(8, 16), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            gate, value = self.up(x).split(self.hidden, dim=-1)
            return self.down(gate.sigmoid() * value)[:, : self.width]

    torch.manual_seed(0)
    model, x = Split().eval(), torch.randn(5, 8)
    masks = keeping(model, (x, torch.zeros(5, dtype=torch.int64)), "neuron", {"down": [0, 3, 4, 5, 7]})
    expected = masked(model, masks)(x)
    shrunk = lrp_prune.shrink(model, masks, [x])
    torch.testing.assert_close(model(x), expected)
    assert (model.hidden, model.width, model.up.out_features, model.down.in_features) == (5, 8, 10, 5)
    assert shrunk.numbers["hidden"] == 5 and "width" not in shrunk.numbers


def test_a_layer_of_its_own_class_gets_the_numbers_of_its_shape() -> None:
    model, batch = build("gpt2"), batch_for("gpt2")
    masks = keeping(model, batch, "head", {"h.0.attn.c_proj": [0, 2], "h.1.attn.c_proj": [3]})
    expected = forward(masked(model, masks), batch)
    lrp_prune.shrink(model, masks, [batch])
    torch.testing.assert_close(forward(model, batch), expected, rtol=1e-4, atol=1e-5)
    for block, heads in zip(model.transformer.h, (2, 1), strict=True):
        attention = block.attn
        assert (attention.num_heads, attention.split_size, attention.embed_dim) == (heads, 8 * heads, 32)
        assert (attention.c_attn.nf, attention.c_attn.nx) == (24 * heads, 32)
        assert (attention.c_proj.nf, attention.c_proj.nx) == (32, 8 * heads)


def test_attention_of_torch_is_refused_by_name() -> None:
    layer = nn.TransformerEncoderLayer(16, 4, 24, batch_first=True)
    model, x = nn.Sequential(layer, nn.Linear(16, 3)).eval(), torch.randn(2, 5, 16)
    relevance = lrp_prune.attribute(model, [x], target=value, granularity="head")
    masks = lrp_prune.select(relevance, 0.5, scope="layer")
    with pytest.raises(ValueError, match=r"0.self_attn.out_proj: the model does not run without them"):
        lrp_prune.shrink(model, masks, [x])
    neurons = lrp_prune.attribute(model, [x], target=value, granularity="neuron")
    masks = lrp_prune.select(neurons, 0.5, scope="layer")
    expected = masked(model, masks)(x)
    assert lrp_prune.shrink(model, masks, [x]).taken == 12
    torch.testing.assert_close(model(x), expected)
    assert tuple(layer.linear1.weight.shape) == (12, 16)


def test_one_unit_stays_where_all_are_dead() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).eval()
    x = torch.randn(5, 4)
    with torch.no_grad():
        model[0].weight.zero_()
        model[0].bias.zero_()
        model[2].weight.zero_()
    shrunk = lrp_prune.shrink(model, None, [x])
    assert model[0].out_features == 1 and torch.equal(model(x), model[2].bias.expand(5, 3))
    assert "a layer has to have one" in shrunk.left["2"]


def test_groups_of_a_convolution_go_whole_or_evenly() -> None:
    torch.manual_seed(0)
    model = Net(
        lambda n, x: pooled(n.c(n.b(n.a(x).relu()).relu())),
        a=nn.Conv2d(4, 8, 1),
        b=nn.Conv2d(8, 6, 1, groups=2),
        c=nn.Conv2d(6, 4, 1),
    )
    model, x = randomized(model), torch.randn(3, 4, 5, 5, dtype=torch.float64)
    for kept, inputs, outputs, groups in (
        ({"b": [0, 1, 2, 3], "c": [0, 1, 2]}, 4, 3, 1),
        ({"b": [0, 1, 2, 4], "c": [0, 5]}, 6, 2, 2),  # of four inputs two and three are dead, and one of one stays
    ):
        net = copy.deepcopy(model)
        masks = keeping(net, (x, CLASSES), "neuron", kept)
        expected = masked(net, masks)(x)
        shrunk = lrp_prune.shrink(net, masks, [x])
        torch.testing.assert_close(net(x), expected, rtol=1e-10, atol=1e-10)
        assert (net.b.in_channels, net.b.out_channels, net.b.groups) == (inputs, outputs, groups)
        assert ("is in groups" in shrunk.left.get("b", "")) == (groups == 2)


def test_the_shortcut_of_a_residual_keeps_what_one_summand_has() -> None:
    torch.manual_seed(0)
    model = Net(
        lambda n, x: pooled(n.c((n.a(x) + n.b(x)).relu())), a=conv_bn(4, 6), b=conv_bn(4, 6), c=nn.Conv2d(6, 4, 1)
    )
    model, x = randomized(model), torch.randn(3, 4, 5, 5, dtype=torch.float64)
    with torch.no_grad():  # three filters of the one, and of these two of the other
        for branch, dead in ((model.a, [0, 1, 2]), (model.b, [1, 2])):
            branch[0].weight[dead] = 0
            for vector in (branch[0].bias, branch[1].weight, branch[1].bias):
                if vector is not None:
                    vector[dead] = 0
        model.c.weight[:, [1, 2]] = 0
    expected = model(x)
    lrp_prune.shrink(model, None, [x])
    torch.testing.assert_close(model(x), expected, rtol=1e-10, atol=1e-10)
    assert model.a[0].out_channels == model.b[0].out_channels == model.c.in_channels == 4


def test_masks_that_leave_something_of_each_unit_are_refused() -> None:
    model, batch = build("llama"), batch_for("llama")
    masks = lrp_prune.prune(copy.deepcopy(model), [batch], 0.5, "magnitude", recalibrate=False, progress=False)
    with pytest.raises(ValueError, match=r"nothing that the masks prune is a whole neuron.*granularity is 'weight'"):
        lrp_prune.shrink(model, masks, [batch])
    with pytest.raises(KeyError, match="no parameter"):
        lrp_prune.shrink(nn.Linear(2, 2), masks, [torch.randn(1, 2)])
    with pytest.raises(ValueError, match="there are no batches"):
        lrp_prune.shrink(model, masks, [])


def test_an_error_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = build("llama"), batch_for("llama")
    masks, before = masks_of(model, batch, "neuron"), copy.deepcopy(model)
    other = {"input_ids": batch["input_ids"].flip(0)}
    difference = Proof.difference

    def failing(proof: Proof, module: nn.Module, batches: int | None = None) -> float:
        return difference(proof, module, batches) if batches else 1.0  # on another batch than the first

    monkeypatch.setattr(Proof, "difference", failing)
    with pytest.raises(RuntimeError, match=r"not those of the masked one for all batches.*nothing was changed"):
        lrp_prune.shrink(model, masks, [batch, other])
    assert sizes(model) == sizes(before) and model.config.to_dict() == before.config.to_dict()
    assert model.model.layers[0].mlp.down_proj.in_features == model.model.layers[0].mlp.intermediate_size == 48
    for mine, theirs in zip(model.parameters(), before.parameters(), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.ao.quantization is deprecated", "ignore:.*adapters")
def test_models_that_cannot_be_shrunk_are_refused_by_name() -> None:
    from peft import LoraConfig, get_peft_model

    model, batch = build("llama"), batch_for("llama")
    masks = masks_of(model, batch, "neuron")
    adapted = get_peft_model(copy.deepcopy(model), LoraConfig(target_modules=["up_proj"]))
    with pytest.raises(ValueError, match=r"up_proj.* have adapters.*merge_adapters"):
        lrp_prune.shrink(adapted, masks, [batch])
    lrp_prune.merge_adapters(adapted, masks)
    quantized = torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), {nn.Linear}, dtype=torch.qint8)
    with pytest.raises(ValueError, match="is quantized"):
        lrp_prune.shrink(quantized, None, [batch])
    corrected = lrp_prune.CorrectedModule(copy.deepcopy(model))
    with pytest.raises(ValueError, match="CorrectedModule"):
        lrp_prune.shrink(corrected, masks, [batch])


def test_weights_that_are_computed_from_others_stay() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).eval()
    masks = masks_of(model, (torch.randn(5, 4), torch.zeros(5, dtype=torch.int64)), "neuron")
    masks.apply_(model)
    nn.utils.parametrizations.weight_norm(model[0])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError):
        lrp_prune.shrink(model, None, [torch.randn(5, 4)])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_compared_as_it_rounds(dtype: torch.dtype) -> None:
    model, batch = build("llama").to(dtype), batch_for("llama")
    shrunk = lrp_prune.shrink(model, masks_of(model, batch, "neuron"), [batch])
    assert shrunk.taken == 48 and shrunk.difference < shrunk.tolerance == 0.05
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}


def test_every_causal_model_can_be_shrunk_by_its_heads() -> None:
    assert {name for name in CAUSAL if name not in HEADS} == {"qwen2", "gemma"}


def test_forward_says_how_the_model_is_run() -> None:
    class Scored(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))

        def forward(self, left: Tensor, right: Tensor, *, scale: float) -> Tensor:
            return F.softmax(self.net(left - right) * scale, -1)

    model, batch = Scored().eval(), {"a": torch.randn(5, 4), "b": torch.randn(5, 4)}

    def run(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return model(batch["a"], batch["b"], scale=2.0)

    entries = {name: torch.ones_like(each, dtype=torch.bool) for name, each in model.named_parameters()}
    dead = [1, 3]
    entries["net.0.weight"][dead] = False
    entries["net.0.bias"][dead] = False
    entries["net.2.weight"][:, dead] = False
    shrunk = lrp_prune.shrink(model, lrp_prune.Masks(entries), [batch], forward=run)
    assert shrunk.taken == 2 and model.net[0].out_features == 4


@pytest.mark.processes
@pytest.mark.slow
def test_divided_and_copied_models_are_refused_by_name(tmp_path: Any) -> None:
    def refused(mesh: Any) -> list[str]:
        found = []
        model, batch = llama(), {"input_ids": torch.arange(14).view(2, 7)}
        masks = masks_of(model, batch, "neuron")
        for wrapped in (nn.parallel.DistributedDataParallel(copy.deepcopy(model)), sharded(model, mesh)):
            with pytest.raises(ValueError) as error:
                lrp_prune.shrink(wrapped, masks, [batch])
            found.append(str(error.value))
        return found

    copied, divided = together(refused, 2, tmp_path)[0]
    assert "shrink the model before it is wrapped" in copied
    assert "is divided among processes" in divided


def test_adapters_that_were_merged_under_the_masks_are_no_obstacle() -> None:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    model, batch = llama(), {"input_ids": torch.arange(14).view(2, 7)}
    masks = masks_of(model, batch, "neuron")
    adapted = get_peft_model(model, LoraConfig(target_modules=["up_proj", "down_proj"], init_lora_weights=False))
    merged = lrp_prune.merge_adapters(adapted, masks)
    expected = masked(merged, masks)(**batch).logits
    assert lrp_prune.shrink(merged, masks, [batch]).taken == 24
    torch.testing.assert_close(merged(**batch).logits, expected, rtol=1e-4, atol=1e-5)


def test_a_shrunk_model_is_pruned_and_shrunk_again() -> None:
    model, batch = llama(), {"input_ids": torch.arange(14).view(2, 7)}
    for left in (12, 6):
        masks = masks_of(model, batch, "neuron")
        expected = masked(model, masks)(**batch).logits
        lrp_prune.shrink(model, masks, [batch])
        torch.testing.assert_close(model(**batch).logits, expected, rtol=1e-4, atol=1e-5)
        assert model.config.intermediate_size == left


def test_masks_by_the_callbacks_and_by_relevance_are_taken_out_alike() -> None:
    """What decides is what is left of a unit, and not how masks were made."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    batch = (torch.randn(16, 4), torch.randint(3, (16,)))
    masks = lrp_prune.prune(model, [batch], 0.5, granularity="neuron", recalibrate=True, progress=False)
    loaded = lrp_prune.Masks.from_state_dict(masks.state_dict())
    expected = model(batch[0])
    assert lrp_prune.shrink(model, loaded, [batch]).taken == 4
    torch.testing.assert_close(model(batch[0]), expected)
