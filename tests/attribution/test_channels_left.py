"""Channels that are no units, units of vision models, and what is left alone by name."""

import warnings
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as tf
from torch import Tensor, nn

import lrp_prune
from tests.support.channel_nets import NETS, Net, pooled, units
from tests.support.units import makers, randomized, silenced, without

# What mixes channels, or leaves something of them: run, and what is said.
REFUSED: dict[str, tuple[Callable[[nn.Module, Tensor], Tensor], str]] = {
    "layer norm": (
        lambda n, x: pooled(n.b(F.layer_norm(n.a(x).relu().movedim(1, -1), (6,)).movedim(-1, 1))),
        "layer_norm",
    ),
    "group norm": (lambda n, x: pooled(n.b(F.group_norm(n.a(x), 2))), "group_norm"),
    "softmax": (lambda n, x: pooled(n.b(n.a(x).softmax(1))), "softmax"),
    "a sum over channels": (lambda n, x: pooled(n.b(n.a(x).relu() - n.a(x).relu().mean(1, keepdim=True))), "mean"),
    "a constant that remains": (
        lambda n, x: pooled(n.b(y := n.a(x).sigmoid())) * pooled(y).mean(1, keepdim=True),
        "mean still has something of its channels",
    ),
    "squeezed in place, of which axes is not told": (
        lambda n, x: pooled(n.b(n.a(x).relu().unsqueeze_(0).squeeze_())),
        "squeeze",
    ),
    # A layer reads the channels as they are as well; what mixes them makes something of a channel of zeros.
    "layer norm besides": (
        lambda n, x: (
            pooled(n.b(y := n.a(x).relu())) * F.layer_norm(y.movedim(1, -1), (6,)).mean((1, 2)).mean(1, keepdim=True)
        ),
        "layer_norm still has something of its channels",
    ),
    "group norm besides": (
        lambda n, x: pooled(n.b(y := n.a(x).relu())) * pooled(F.group_norm(y, 2)).mean(1, keepdim=True),
        "group_norm still has something of its channels",
    ),
    "softmax besides": (
        lambda n, x: pooled(n.b(y := n.a(x).relu())) * pooled(y.softmax(1)).mean(1, keepdim=True),
        "softmax still has something of its channels",
    ),
    "sorting besides": (
        lambda n, x: pooled(n.b(y := n.a(x).relu())) * pooled(y.sort(1).values).mean(1, keepdim=True),
        "sort still has something of its channels",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_traced_is_left_alone_by_name(name: str) -> None:
    run, why = REFUSED[name]
    torch.manual_seed(0)
    model = Net(run, a=nn.Conv2d(4, 6, 1), b=nn.Conv2d(6, 5, 1)).eval()
    x = torch.randn(3, 4, 6, 6)
    with pytest.warns(
        UserWarning, match=rf"1 convolution has no units that could be removed and is left alone: a \(.*({why})"
    ):
        relevance = units(model, x)
    assert list(relevance) == ["head"]
    masks = lrp_prune.select(relevance, 0.5, scope="global")
    assert "a.weight" not in masks
    with pytest.raises(ValueError, match=rf"no neuron that could be removed \(a: .*({why})"):
        units(model, x, include=["a"])


class Stacked(nn.Module):
    """A feed-forward part, and two of them in one weight each, as those of the experts of a mixture are."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 6), nn.Linear(6, 4)
        self.experts, self.back = (nn.Parameter(torch.randn(2, *size)) for size in ((4, 5), (5, 4)))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.down(self.up(x).relu())
        hidden = torch.bmm(x.expand(2, *x.shape), self.experts).relu()
        return torch.bmm(hidden, self.back).mean(0)


def test_neurons_of_experts_are_left_alone_by_name() -> None:
    torch.manual_seed(0)
    model, x = Stacked(), torch.randn(3, 4)
    with pytest.warns(UserWarning, match=r"2 stacked weights have no units .* left alone: experts \(it holds several"):
        relevance = units(model, x, include=["*"])
    assert list(relevance) == ["down"]
    with pytest.raises(ValueError, match=r"no neuron that could be removed \(experts, back: it holds several layers"):
        units(model, x, include=["experts", "back"])


class OtherUses(nn.Module):
    """A layer ``b`` reads the channels of ``a``, and something else as well."""

    def __init__(self, run: Callable[["OtherUses", Tensor], Tensor]) -> None:
        super().__init__()
        self.run = run
        self.a, self.b, self.c, self.head = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 5), nn.Linear(6, 3)
        self.table = nn.Embedding(5, 6)
        self.register_buffer("memory", torch.randn(3, 2, 6))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.layer_norm(self.run(self, x), (6,)).mean(1))


def _assigned(m: OtherUses, x: Tensor) -> Tensor:
    hidden = torch.cat([m.a(x), torch.zeros(3, 1, 6)], 1)
    hidden[:, -1] = m.memory[:, 0]
    return m.b(hidden)


def _filled(m: OtherUses, x: Tensor) -> Tensor:
    hidden = torch.cat([m.a(x), torch.zeros(3, 1, 6)], 1)
    hidden[:, -1] = 1.0
    return m.b(hidden)


OTHER_USES: dict[str, Callable[[OtherUses, Tensor], Tensor]] = {
    "at another depth": lambda m, x: m.b(F.layer_norm(m.b(m.a(x)), (6,))),
    "at another depth before": lambda m, x: m.b(m.a(F.layer_norm(m.b(x.repeat(1, 1, 2)[..., :6]), (6,))[..., :4])),
    "of tokens that are given": lambda m, x: m.b(torch.cat([m.a(x), m.memory], 1)),
    "of what is assigned": _assigned,
    "of a number that is": _filled,
    "to look up what is added": lambda m, x: (
        F.linear(m.a(x), m.table.weight).softmax(-1) @ torch.ones(5, 6) + m.table(torch.zeros(3, 2, dtype=torch.int64))
    ),
}


@pytest.mark.parametrize("name", OTHER_USES)
def test_channels_read_by_weights_that_have_other_uses_are_no_units(name: str) -> None:
    torch.manual_seed(0)
    model, x = OtherUses(OTHER_USES[name]), torch.randn(3, 2, 4)
    with pytest.raises(
        ValueError, match=r"could be removed .*\ba: its channels go into (b, which|table, which|linear)"
    ):
        units(model, x, include=["*"])


def test_such_channels_go_by_what_makes_them_where_another_layer_reads_them_too() -> None:
    torch.manual_seed(0)
    model, x = (
        OtherUses(lambda m, x: m.b(F.layer_norm(m.b(y := m.a(x)), (6,))) + F.pad(m.c(y), (0, 1))),
        torch.randn(3, 2, 4),
    )
    relevance, dense = units(model, x, include=["a", "b", "c"]), model(x)
    assert {member.parameter for member in relevance.members["c"]} == {"a.weight", "a.bias", "c.weight"}
    for unit in range(6):
        with silenced(model, ["a"], unit):
            wanted = model(x)
        with without(relevance, "c", unit, model):
            torch.testing.assert_close(model(x), wanted)
        assert not torch.allclose(wanted, dense)


@dataclass(slots=True)
class Returned:
    logits: Tensor
    states: list[Tensor]

    def __getitem__(self, index: int) -> Tensor:
        return self.logits


class Private:
    """Gives what it keeps by properties."""

    def __init__(self, logits: Tensor, hidden: Tensor) -> None:
        self._logits, self._more, self._circle = logits, SimpleNamespace(hidden=hidden), self

    def __getitem__(self, index: int) -> Tensor:
        return self._logits


@pytest.mark.parametrize(
    "returned",
    [
        lambda logits, hidden: (logits, hidden),
        lambda logits, hidden: (logits, {"hidden": hidden}),
        lambda logits, hidden: Returned(logits, [hidden]),
        Private,
    ],
    ids=["tuple", "dict", "dataclass", "object"],
)
def test_outputs_of_the_model_are_no_units(returned: Callable[[Tensor, Tensor], Any]) -> None:
    class Features(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 5), nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Any:
            hidden = self.a(x).relu()
            return returned(self.b(hidden), hidden)

    def first(model: nn.Module, batch: Tensor) -> Tensor:
        return model(batch)[0].sum()

    with pytest.raises(ValueError, match=r"no neuron that could be removed.*model's output"):
        lrp_prune.attribute(Features(), [torch.randn(2, 4)], target=first, granularity="neuron")


VISION: dict[str, Callable[[], nn.Module]] = {
    "resnet": lambda: tf.ResNetForImageClassification(
        tf.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[2, 1], layer_type="bottleneck")
    ),
    "mobilenet_v2": lambda: tf.MobileNetV2ForImageClassification(
        tf.MobileNetV2Config(depth_multiplier=0.125, min_depth=4)
    ),
    "efficientnet": lambda: tf.EfficientNetForImageClassification(
        tf.EfficientNetConfig(
            image_size=32, width_coefficient=0.25, depth_coefficient=0.3, hidden_dim=320, num_block_repeats=[1] * 7
        )
    ),
    "regnet": lambda: tf.RegNetForImageClassification(
        tf.RegNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 2], groups_width=4)
    ),
    "convnext": lambda: tf.ConvNextForImageClassification(
        tf.ConvNextConfig(hidden_sizes=[8, 16], depths=[1, 1], num_stages=2)
    ),
    "poolformer": lambda: tf.PoolFormerForImageClassification(
        tf.PoolFormerConfig(hidden_sizes=[8, 16, 16, 16], depths=[1, 1, 1, 1])
    ),
    "swin": lambda: tf.SwinForImageClassification(
        tf.SwinConfig(image_size=32, patch_size=4, embed_dim=8, depths=[1, 1], num_heads=[2, 2], window_size=2)
    ),
    "mobilevit": lambda: tf.MobileViTForImageClassification(
        tf.MobileViTConfig(image_size=64, hidden_sizes=[16, 16, 16], neck_hidden_sizes=[8] * 7)
    ),
}
FOUND = {
    "resnet": (8, 0, 3),
    "mobilenet_v2": (25, 0, 10),
    "efficientnet": (22, 0, 0),
    "regnet": (12, 0, 3),
    "convnext": (2, 0, 2),
    "poolformer": (4, 0, 4),
    "swin": (2, 2, 4),
    "mobilevit": (31, 9, 21),
}
"""Groups of neurons, heads and blocks; no block where the stream changes its width everywhere (efficientnet here)."""


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*no units that could be removed")
@pytest.mark.parametrize("name", VISION)
def test_units_of_vision_models_are_what_their_members_say(name: str) -> None:
    torch.manual_seed(0)
    model, size = randomized(VISION[name]()), 64 if name in ("poolformer", "mobilevit") else 32
    x = torch.randn(2, 3, size, size, dtype=torch.float64)
    found = []
    for granularity in ("neuron", "head", "block"):
        try:
            relevance = units(model, {"pixel_values": x, "labels": torch.tensor([0, 1])}, granularity)
        except ValueError as error:
            assert f"has no {granularity}" in str(error)
            found.append(0)
            continue
        found.append(len(relevance))
        for group, values in relevance.items():
            unit = len(values) // 2
            with ExitStack() as stack:
                if granularity == "head":
                    (member,) = relevance.members[group]
                    channels = (member.owners.view(-1) == unit).nonzero().view(-1)
                    module = model.get_submodule(group)
                    handle = module.register_forward_pre_hook(
                        lambda _, args, channels=channels: (args[0].index_fill(-1, channels, 0.0),)
                    )
                    stack.callback(handle.remove)
                else:
                    for module, channels in makers(relevance, group, unit, model):
                        channels = channels if granularity == "neuron" else slice(None)
                        stack.enter_context(silenced(model, [module], channels))
                wanted = model(pixel_values=x).logits
            with without(relevance, group, unit, model):
                torch.testing.assert_close(model(pixel_values=x).logits, wanted, rtol=1e-8, atol=1e-8)
    assert tuple(found) == FOUND[name]


def test_a_plain_network_has_no_blocks() -> None:
    with pytest.raises(ValueError, match=r"Net has no block: none of its layers writes onto a residual stream"):
        units(NETS["depthwise with batch norm"][0]().eval(), torch.randn(2, 4, 6, 6), "block")


def test_the_model_is_the_same_in_every_pass() -> None:
    """Numbers of channels are given once, so that batches of other sizes and shapes add up."""
    torch.manual_seed(0)
    model = randomized(NETS["residual"][0]()).float()
    batches = [(torch.randn(n, 4, 6, 6), torch.zeros(n, dtype=torch.int64)) for n in (3, 1, 2)]
    together = lrp_prune.attribute(model, batches, granularity="neuron", statistic="signed", matmul_dtype=None)
    apart = [
        lrp_prune.attribute(model, [batch], granularity="neuron", statistic="signed", matmul_dtype=None)
        for batch in batches
    ]
    merged = apart[0] + apart[1] + apart[2]
    assert merged.members == together.members
    for group in together:
        torch.testing.assert_close(together[group], merged[group])


def test_nothing_is_said_where_all_convolutions_have_units() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        units(NETS["grouped"][0]().eval(), torch.randn(2, 4, 6, 6))


class _TwoPrecisions(nn.Module):
    """Hidden units that a layer reads in double precision, and another in single."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.precise, self.rough = nn.Linear(4, 6).double(), nn.Linear(6, 3).double(), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x).relu()
        return self.precise(hidden) + self.rough(hidden.to(self.rough.weight.dtype))


def test_units_that_are_read_in_two_precisions_have_the_sum_of_both() -> None:
    torch.manual_seed(0)
    x = torch.randn(5, 4, dtype=torch.float64)

    def found(model: nn.Module) -> Tensor:
        relevance = lrp_prune.attribute(
            model,
            [x],
            lambda model, batch: model(batch).sum(),
            statistic="signed",
            granularity="neuron",
            matmul_dtype=None,
        )
        (values,) = relevance.values()
        return values.double()

    model = _TwoPrecisions()
    expected = found(model.double())
    assert bool(expected.any())
    model.rough.float()
    torch.testing.assert_close(found(model), expected, rtol=1e-5, atol=1e-6)
