"""Heads go with all that makes them, or stay with what they share."""

import re
from typing import Any

import pytest
import torch

import lrp_prune
from lrp_prune.shrinking import load_shrunk
from tests.support.shrinking import keeping, masked, masks_of, sizes, value
from tests.support.small_models import CAUSAL, batch_for, build, forward, llama

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


def test_every_causal_model_can_be_shrunk_by_its_heads() -> None:
    assert {name for name in CAUSAL if name not in HEADS} == {"qwen2", "gemma"}


@pytest.mark.parametrize("keys", [4, 1])
def test_heads_that_no_configuration_can_say_go_by_the_shapes_beside_the_weights(keys: int, tmp_path: Any) -> None:
    """A Llama's configuration refuses three heads of a width that three does not divide."""
    model, batch = llama(hidden_size=32, num_attention_heads=4, num_key_value_heads=keys).eval(), batch_for("llama")
    batch = {"input_ids": batch["input_ids"] % 26}
    masks = keeping(model, batch, "head", {f"{layer}.self_attn.o_proj": [0, 1, 2] for layer in range(2)})
    shrunk = lrp_prune.shrink(model, masks, [batch], uniform=True)
    model.config.validate()
    assert not shrunk.loads_plainly and model.config.num_attention_heads == 4
    shrunk.save(tmp_path)
    dense = type(model)(type(model.config).from_pretrained(tmp_path))
    assert torch.equal(forward(load_shrunk(tmp_path, dense).eval(), batch), forward(model, batch))
