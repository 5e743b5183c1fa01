"""Which weights are asked for where nothing is said, the same for every method."""

import warnings
from collections.abc import Callable

import pytest
import torch
import transformers as tf
from torch import Tensor, nn

import lrp_prune
from lrp_prune.attribution.candidates import candidates
from lrp_prune.pruning import METHODS, scorer
from tests.support.small_models import batch_for, build


class Holding(nn.Module):
    """A layer, and beside it a parameter of any name and shape."""

    def __init__(self, name: str, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.register_parameter(name, nn.Parameter(torch.ones(shape)))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "bert", "vit", "t5", "resnet"])
def test_all_methods_have_the_same_candidates(name: str) -> None:
    model, batch = build(name), batch_for(name)
    if name in ("bert", "vit", "resnet"):
        batch = {**batch, "labels": torch.tensor([0, 1])}
    if name == "t5":
        batch = {**batch, "labels": batch["input_ids"]}
    found = {}
    for method in METHODS:
        scores = scorer(method, model)
        scores.update(batch)
        relevance = scores.compute()
        found[method] = {*relevance, *relevance.unscored}
    assert all(names == set(candidates(model)) for names in found.values())


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("cls_token", (1, 1, 8)),
        ("position_embeddings", (1, 5, 8)),
        ("positions", (5, 8)),
        ("relative_position_bias_table", (9, 2)),
        ("attention_biases", (2, 9)),
        ("gate_up_proj_bias", (4, 8)),
        ("latents", (6, 8)),
        ("query_tokens", (1, 6, 8)),
        ("probe", (1, 8)),
        ("layer_scale", (8, 1, 1)),
        ("gamma", (8, 1, 1)),
        ("weight", (1, 1, 1, 8)),  # a scale, as in ConvNeXt's response normalization
        ("A_log", (8, 4)),
        ("rel_pos_h", (7, 8)),
    ],
)
def test_data_are_no_candidates_unless_named_alone(name: str, shape: tuple[int, ...]) -> None:
    model = Holding(name, shape)
    assert list(candidates(model)) == ["layer.weight"]
    assert list(candidates(model, include=["*"])) == ["layer.weight"]
    assert list(candidates(model, include=[name])) == [name]


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("weight", (4, 8)),
        ("weight", (1, 8)),  # of one output
        ("router_weight", (1, 8)),
        ("weight", (1, 3, 3, 3)),  # a convolution with one output
        ("gate_up_proj", (4, 8, 16)),
        ("w1", (4, 8, 16)),
        ("in_proj_weight", (24, 8)),
        ("input_gate_weight", (2, 4, 4)),
        ("relative_position_weight", (4, 8)),
    ],
)
def test_weights_that_modules_hold_themselves_are_candidates(name: str, shape: tuple[int, ...]) -> None:
    assert set(candidates(Holding(name, shape))) == {"layer.weight", name}


def test_layers_of_one_channel_norms_and_lists() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.position = nn.Linear(8, 1)  # a layer, whatever it is called
            self.depthwise = nn.Conv2d(4, 4, 3, groups=4)
            self.single = nn.Conv2d(1, 1, 3)
            self.recurrent = nn.LSTM(4, 1, bidirectional=True)
            self.norm = nn.LayerNorm((4, 4))
            self.embedding, self.bag = nn.Embedding(5, 4), nn.EmbeddingBag(5, 4)
            self.position_tables = nn.ParameterList([nn.Parameter(torch.ones(6, 4))])
            self.attention = nn.MultiheadAttention(4, 2, add_bias_kv=True)

    assert set(candidates(Model())) == {
        "position.weight",
        "depthwise.weight",
        "single.weight",
        *(f"recurrent.weight_{end}_l0{way}" for end in ("ih", "hh") for way in ("", "_reverse")),
        "attention.in_proj_weight",
        "attention.out_proj.weight",
    }
    assert set(candidates(Model(), embeddings=True)) == {"embedding.weight", "bag.weight"}
    assert set(candidates(Model(), include=["embedding"])) == {"embedding.weight"}


def test_a_mixture_with_biases_of_experts() -> None:
    config = tf.GptOssConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, head_dim=8,
        num_local_experts=4, vocab_size=50,
    )  # fmt: skip
    model = tf.GptOssForCausalLM(config).eval()
    names = {name.rpartition("layers.0.")[2] for name in candidates(model)}
    assert names == {
        *(f"self_attn.{name}_proj.weight" for name in "qkvo"),
        "mlp.router.weight",
        "mlp.experts.gate_up_proj",
        "mlp.experts.down_proj",
    }


def test_patterns_that_name_no_weight_say_what_they_name() -> None:
    model = build("llama")
    with pytest.raises(ValueError, match=r"pattern '\*\.fc9' matches no parameter"):
        candidates(model, include=["*.fc9"])
    with pytest.raises(ValueError, match=r"'model\.norm' names nothing that can be scored: .* shape \(32,\)"):
        candidates(model, include=["*.mlp", "model.norm"])
    with pytest.raises(ValueError, match=r"no weight to score: include=\['\*\.mlp'\], exclude=\['model'\]"):
        candidates(model, include=["*.mlp"], exclude=["model"])


def test_a_tied_weight_is_named_by_its_first_name() -> None:
    config = tf.LlamaConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=50)
    config.tie_word_embeddings = True
    model = tf.LlamaForCausalLM(config)
    with pytest.raises(ValueError, match=r"names lm_head\.weight, which is tied to model\.embed_tokens\.weight"):
        candidates(model, include=["lm_head"])
    with pytest.raises(ValueError, match=r"use 'model\.embed_tokens\.weight'"):
        candidates(model, exclude=["lm_head"])
    assert list(candidates(model, include=["model.embed_tokens.weight"])) == ["model.embed_tokens.weight"]


def _dynamic() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Sequential(nn.LSTM(4, 4)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.ao.quantization.quantize_dynamic(model, {nn.Linear, nn.LSTM})


def _static() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[0].weight = nn.Parameter(torch.ones(4, 4, dtype=torch.int8), requires_grad=False)
    return model


def _packed() -> nn.Module:
    model = nn.Sequential(nn.Module(), nn.Linear(4, 4))
    model[0].register_buffer("qweight", torch.ones(4, 4, dtype=torch.int32))
    return model


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (_dynamic, r"0\.weight is quantized \(DynamicQuantizedLinear\)"),
        (_static, r"0\.weight is quantized \(torch\.int8\)"),
        (_packed, r"0\.weight is quantized \(Module\)"),
    ],
)
def test_quantized_layers_are_refused_by_name(make: Callable[[], nn.Module], message: str) -> None:
    model = make()
    with pytest.raises(ValueError, match=message):
        candidates(model)
    with pytest.raises(ValueError, match=message):
        lrp_prune.prune(model, [torch.ones(1, 4)], method="magnitude")
    if make is not _dynamic:
        assert list(candidates(model, exclude=["0"] if make is _static else None, include=["1"])) == ["1.weight"]


def test_a_complex_weight_is_refused_as_such_and_can_be_left_out() -> None:
    class Filtering(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.filter, self.last = nn.Parameter(torch.randn(8, 8, dtype=torch.complex64)), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.last((x.to(torch.complex64) @ self.filter).real + x)
            return result

    batch = (torch.randn(3, 8), torch.tensor([0, 1, 2]))
    with pytest.raises(ValueError, match=r"filter is complex \(torch.complex64\).*exclude="):
        lrp_prune.attribute(Filtering(), [batch], target="class")
    found = lrp_prune.attribute(Filtering(), [batch], target="class", exclude=["filter"], unruled="ignore")
    assert list(found) == ["last.weight"]


def test_a_quantized_recurrent_layer_is_named_once() -> None:
    from lrp_prune.engine.quantized import quantized_modules

    assert quantized_modules(_dynamic()) == {"0": "DynamicQuantizedLinear", "2.0": "DynamicQuantizedLSTM"}


def test_ordinary_models_leave_few_weights_unscored() -> None:
    """A pooler that no loss looks at is told of, and keeps nobody from pruning."""
    config = tf.BertConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=50
    )
    model = tf.BertModel(config).eval()

    def target(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        output: Tensor = model(**batch).last_hidden_state
        return output.square().sum()

    relevance = lrp_prune.attribute(model, [batch_for("bert")], target=target)
    assert list(relevance.unscored) == ["pooler.dense.weight"]
    assert "does not depend on it" in relevance.unscored["pooler.dense.weight"]


class Capsules(nn.Module):
    """Predictions of capsules by a weight that is broadcast over the samples."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.W = nn.Parameter(torch.randn(1, 5, 8, 4))
        self.first, self.last = nn.Linear(6, 20), nn.Linear(40, 3)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.last((self.W @ self.first(x).view(-1, 5, 4, 1)).relu().flatten(1))
        return result


class Mixer(nn.Module):
    """Parameters whose names say data, some of which are multiplied like weights."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        shapes = {"embed_proj": (6, 8), "token_mix": (5, 5), "pool_query": (8, 1)}
        shapes |= {"pos": (5, 8), "scale_table": (5, 8), "log_decay": (8, 8), "token_table": (5, 5), "gamma": (8, 1)}
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.rand(shape)))
        self.last = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = x @ self.embed_proj + self.pos
        hidden = (self.token_mix @ hidden) * self.scale_table
        hidden = hidden + hidden @ torch.exp(-self.log_decay) * self.gamma.T
        hidden = hidden + self.token_table @ hidden + self.token_table.mean()
        hidden = torch.cat([hidden, self.token_table[:, :1].T.expand(1, 5) @ hidden], 1)
        weights = (hidden @ self.pool_query).softmax(1)
        result: Tensor = self.last((weights * hidden).sum(1))
        return result


@pytest.mark.parametrize("method", ["lrp", "wanda", "gradient"])
def test_what_is_multiplied_like_a_weight_is_one_whatever_its_name_and_shape(
    method: str, caplog: pytest.LogCaptureFixture
) -> None:
    def scored(model: nn.Module, x: Tensor, **options: object) -> tuple[set[str], set[str]]:
        scores = scorer(method, model, **options)
        scores.update((x, torch.arange(len(x)) % 3))
        relevance = scores.compute()
        return set(relevance), set(relevance.unscored)

    assert scored(Capsules(), torch.randn(7, 6)) == ({"W", "first.weight", "last.weight"}, set())
    weights = {"embed_proj", "token_mix", "pool_query", "last.weight"}
    with caplog.at_level("INFO", "lrp_prune"):
        assert scored(Mixer(), torch.randn(7, 5, 6)) == (weights, set())
    (told,) = [record.message for record in caplog.records if "left alone" in record.message]
    assert "scale_table (is used, but in no product" in told and "log_decay (what is used is computed from it" in told
    assert "token_table (enters as data" in told and "pos (" not in told and "gamma" not in told
    assert scored(Mixer(), torch.randn(7, 5, 6), include=["*"]) == (weights, set())
    assert scored(Mixer(), torch.randn(7, 5, 6), exclude=["token_*"])[0] == weights - {"token_mix"}
    frozen = Mixer()
    frozen.token_mix.requires_grad_(False)
    assert scored(frozen, torch.randn(7, 5, 6), trainable_only=True)[0] == weights - {"token_mix"}


def test_a_bare_table_that_is_looked_up_and_multiplied_is_no_weight() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.token_embedding, self.layer = nn.Parameter(torch.randn(9, 6)), nn.Linear(6, 6)

        def forward(self, input_ids: Tensor) -> Tensor:
            return self.layer(self.token_embedding[input_ids]) @ self.token_embedding.T

    ids = torch.arange(8).view(2, 4)
    assert list(lrp_prune.attribute(Tied(), [{"input_ids": ids, "labels": ids}], target="next_token")) == [
        "layer.weight"
    ]


def test_methods_without_samples_say_what_they_leave_alone(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "lrp_prune"):
        scorer("magnitude", Capsules())
    assert any("W: taken for data by name or shape" in record.message for record in caplog.records)
