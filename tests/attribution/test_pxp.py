"""How Pruning by eXplaining reduces relevance: filters over their maps, linear layers by token, heads at their patterns."""

import pytest
import torch
from torch import Tensor, nn

import lrp_prune
from lrp_prune import Statistic
from lrp_prune.relevance import Relevance


class Attention(nn.Module):
    """Patches by a convolution, one attention whose pattern is a module's output, an MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.qkv, self.out = nn.Conv2d(3, 8, 4, 4), nn.Linear(8, 24), nn.Linear(8, 8)
        self.softmax, self.mlp = nn.Softmax(-1), nn.Sequential(nn.Linear(8, 10), nn.GELU(), nn.Linear(10, 5))

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).mT
        q, k, v = self.qkv(tokens).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        read = self.softmax(q @ k.mT) @ v
        return self.mlp(tokens + self.out(read.transpose(1, 2).flatten(2))).mean(1)


def scored(model: nn.Module, x: Tensor, granularity: str, statistic: str, composite: str = "attnlrp") -> Relevance:
    labels = torch.zeros(len(x), dtype=torch.int64)
    options = {"target": "class", "composite": composite, "matmul_dtype": None}
    return lrp_prune.attribute(model, [(x, labels)], granularity=granularity, statistic=statistic, **options)


@pytest.mark.parametrize(("composite", "share"), [("attnlrp", 0.5), ("gradient", 1.0)])
def test_heads_have_the_relevance_of_their_patterns(composite: str, share: float) -> None:
    torch.manual_seed(0)
    model, x = Attention().double().eval(), torch.randn(3, 3, 8, 8, dtype=torch.float64)
    (heads,) = scored(model, x, "head", "pxp", composite).values()
    with lrp_prune.attributing(model, composite, latent=["softmax"]) as propagation:
        pattern = propagation.relevance(model(x)[:, 0].sum())["softmax"]  # [samples, heads, queries, keys]
    wanted = pattern.sum(-1).abs().sum((0, 2)) / 3
    torch.testing.assert_close(share * heads.double(), wanted, rtol=1e-6, atol=1e-9)


def test_filters_are_summed_over_their_maps_and_linear_neurons_are_not() -> None:
    torch.manual_seed(0)
    convolutional = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 5)
    )
    x = torch.randn(3, 3, 8, 8)
    for granularity in ("neuron", "weight"):
        by_map, by_sample, by_token = (
            scored(convolutional, x, granularity, statistic) for statistic in ("pxp", "abs_sample", "abs_token")
        )
        assert list(by_map) == list(by_sample)
        for name in by_map:
            torch.testing.assert_close(by_map[name], by_sample[name])
            if name != list(by_map)[-1]:  # the last one reads no maps
                assert by_token[name].sum() > 1.01 * by_map[name].sum()
    model = Attention().eval()
    by_map, by_sample, by_token = (scored(model, x, "neuron", each) for each in ("pxp", "abs_sample", "abs_token"))
    assert list(by_map) == ["qkv", "mlp.2"]
    for name in by_map:
        torch.testing.assert_close(by_map[name], by_token[name])
        assert not torch.allclose(by_map[name], by_sample[name])


def test_maps_add_over_batches_and_need_no_samples() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 3, 3))
    images = torch.randn(3, 2, 6, 6)

    def target(model: nn.Module, batch: Tensor) -> Tensor:
        return model(batch).sum()

    for granularity in ("neuron", "weight"):
        options = {"target": target, "statistic": "pxp", "granularity": granularity, "matmul_dtype": None}
        together = lrp_prune.attribute(model, [images], **options)
        apart = lrp_prune.attribute(model, [image[None] for image in images], **options)
        bare = lrp_prune.attribute(model, list(images), **options)
        for name in together:
            torch.testing.assert_close(together[name], apart[name])
            torch.testing.assert_close(bare[name] * bare.num_samples, together[name] * 3)


def test_maps_are_absolute_relevance() -> None:
    with pytest.raises(ValueError, match="by_map=True is about absolute relevance"):
        Statistic("squared_map", power=2, by_map=True)
