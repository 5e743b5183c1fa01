"""Models of other libraries conserve: torch's transformer and, where installed, of graphs, diffusion and TransformerLens."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lrp_prune
from lrp_prune.names import is_called_bias

EDGES = torch.tensor([[0, 1, 2, 3, 0, 2], [1, 0, 3, 2, 2, 1]])


def _conserves(model: nn.Module, call: Callable[[nn.Module], Tensor], composite: str = "cp_lrp") -> dict[str, Tensor]:
    """Relevance, of a model in float64 without biases; the forward is what it was, and nothing is without a rule."""
    model = model.double().eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            owner, _, own = name.rpartition(".")
            if is_called_bias(own, model.get_submodule(owner)):
                parameter.zero_()
            elif not bool(parameter.any()):  # layers that begin as nothing
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
        expected = call(model)
    with lrp_prune.attributing(model, composite, unruled="error") as propagation:
        output = call(model)
        assert torch.equal(output, expected)
        value = output.flatten(1).amax(-1).sum()
        relevance = propagation.relevance(value)
    torch.testing.assert_close(sum(tensor.sum() for tensor in relevance.values()), value.detach(), rtol=1e-6, atol=1e-9)
    return relevance


def test_an_encoder_and_a_decoder_of_torch_s_own() -> None:
    torch.manual_seed(0)
    model = nn.Transformer(16, 2, 2, 2, 32, batch_first=True, bias=False)
    source, target = torch.randn(2, 5, 16).double(), torch.randn(2, 4, 16).double()
    mask = nn.Transformer.generate_square_subsequent_mask(4, dtype=torch.float64)
    relevance = _conserves(model, lambda model: model(source, target, tgt_mask=mask))
    assert set(relevance) == {"src", "tgt"} and all(bool(tensor.any()) for tensor in relevance.values())


class Attention(nn.Module):
    """Graph attention by hand: a softmax over the edges that arrive at a node, by exponentials that are summed up there."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.source, self.target = (nn.Linear(6, size, bias=False) for size in (5, 1, 1))
        self.head = nn.Linear(5, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        source, target = EDGES
        scores = nn.functional.leaky_relu(self.source(x)[source] + self.target(x)[target])
        weights = (scores - scores.amax()).exp()
        weights = weights / torch.zeros(4, 1, dtype=x.dtype).index_add(0, target, weights)[target]
        hidden = torch.zeros(4, 5, dtype=x.dtype).index_add(0, target, weights * self.layer(x)[source])
        result: Tensor = self.head(torch.relu(hidden))
        return result


def test_attention_over_edges() -> None:
    x = torch.randn(4, 6).double()
    relevance = _conserves(Attention(), lambda model: model(x))
    assert bool(relevance["x"].any())


@pytest.mark.parametrize("composite", ["cp_lrp", "attnlrp"])
@pytest.mark.parametrize("name", ["GCNConv", "GATConv", "GATv2Conv", "SAGEConv", "TransformerConv"])
def test_layers_of_graphs(name: str, composite: str) -> None:
    layers = pytest.importorskip("torch_geometric.nn")

    class Graph(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.layer, self.head = getattr(layers, name)(6, 5, bias=False), nn.Linear(5, 3, bias=False)

        def forward(self, x: Tensor, edges: Tensor) -> Tensor:
            result: Tensor = self.head(torch.relu(self.layer(x, edges)))
            return result

    x = torch.randn(4, 6).double()
    _conserves(Graph(), lambda model: model(x, EDGES), composite)


def _unet(models: Any) -> nn.Module:
    model: nn.Module = models.UNet2DModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4,
    )
    return model


def _dit(models: Any) -> nn.Module:
    sizes = {"num_attention_heads": 2, "attention_head_dim": 4, "num_layers": 2, "sample_size": 8, "patch_size": 2}
    model: nn.Module = models.DiTTransformer2DModel(in_channels=3, out_channels=3, num_embeds_ada_norm=10, **sizes)
    return model


@pytest.mark.slow
@pytest.mark.parametrize("make", [_unet, _dit])
def test_models_of_diffusion(make: Callable[[Any], nn.Module]) -> None:
    models = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    image, classes = torch.randn(2, 3, 8, 8).double(), torch.tensor([1, 2])
    named = {"class_labels": classes} if make is _dit else {}
    _conserves(make(models), lambda model: model(image, timestep=torch.tensor([3, 7]), **named).sample)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_split_qkv_input": True},
        {"attn_only": True, "act_fn": None},
        {
            "gated_mlp": True,
            "act_fn": "silu",
            "normalization_type": "RMS",
            "positional_embedding_type": "rotary",
            "n_key_value_heads": 2,
        },
    ],
    ids=["as GPT-2", "einsum", "attention only", "as Llama"],
)
def test_a_hooked_transformer_of_transformer_lens(options: dict[str, Any]) -> None:
    lens = pytest.importorskip("transformer_lens", exc_type=ImportError)
    torch.manual_seed(0)
    sizes = {"n_layers": 2, "d_model": 16, "n_ctx": 9, "d_head": 4, "n_heads": 4, "d_mlp": 20, "d_vocab": 15}
    config = lens.HookedTransformerConfig(
        **{"act_fn": "gelu", "normalization_type": "LN", "device": "cpu", "dtype": torch.float64, **sizes, **options}
    )
    model, ids = lens.HookedTransformer(config), torch.randint(15, (3, 8))
    relevance = _conserves(model, lambda model: model(ids)[:, -1])
    assert bool(relevance["embed"].any())
    batches = [{"input": ids, "labels": ids}]
    weights = lrp_prune.attribute(model, batches, target="next_token")
    assert not weights.unscored and {name.rpartition(".")[2].strip("_")[:3] for name in weights} >= {
        "W_Q",
        "W_K",
        "W_V",
        "W_O",
    }
    heads = lrp_prune.attribute(model, batches, granularity="head", target="next_token")
    assert {name: len(values) for name, values in heads.items()} == {f"blocks.{block}.attn.W_O": 4 for block in (0, 1)}
