"""Units of convolutions are the channels they claim: removing each of them is ablating its activation."""

import warnings
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as tf
from torch import Tensor, nn

import lrp_prune
from lrp_prune.relevance import Relevance
from tests.support.units import channels_of, makers, randomized, silenced, without


def conv_bn(inputs: int, outputs: int, kernel: int = 1, **options: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, kernel, **options), nn.BatchNorm2d(outputs))


class Net(nn.Module):
    """Layers by name, and a function that runs them."""

    def __init__(self, run: Callable[["Net", Tensor], Tensor], **layers: nn.Module | nn.Parameter) -> None:
        super().__init__()
        self._run = run
        for name, layer in layers.items():
            setattr(self, name, layer)
        self.head = nn.Linear(int(self.head_inputs()), 3)

    def head_inputs(self) -> int:
        with torch.no_grad():
            self.head = nn.Identity()
            return self(torch.zeros(2, 4, 6, 6)).shape[-1]

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self._run(self, x))


def pooled(x: Tensor) -> Tensor:
    return x.mean((2, 3))


def shuffled(x: Tensor, groups: int) -> Tensor:
    """ShuffleNet's."""
    samples, channels, height, width = x.shape
    return x.view(samples, groups, channels // groups, height, width).transpose(1, 2).reshape(x.shape)


# name: network, and for each group of units the modules whose output channels they are (unit u is channel u).
NETS: dict[str, tuple[Callable[[], nn.Module], dict[str, list[str]]]] = {
    "grouped": (
        lambda: Net(
            lambda n, x: pooled(n.b(n.a(x).relu()).relu()), a=nn.Conv2d(4, 8, 1), b=nn.Conv2d(8, 8, 1, groups=2)
        ),
        {"b": ["a"], "head": ["b"]},
    ),
    "grouped in the middle": (
        lambda: Net(
            lambda n, x: pooled(n.c(n.b(n.a(x).relu()).relu()).relu()),
            a=nn.Conv2d(4, 6, 3),
            b=nn.Conv2d(6, 9, 1, groups=3),
            c=nn.Conv2d(9, 4, 1),
        ),
        {"b": ["a"], "c": ["b"], "head": ["c"]},
    ),
    "depthwise with batch norm": (
        lambda: Net(
            lambda n, x: pooled(n.c(n.b(n.a(x).relu()).relu()).relu()),
            a=conv_bn(4, 6, 3),
            b=conv_bn(6, 6, 3, groups=6),
            c=conv_bn(6, 5),
        ),
        {"c.0": ["a.1", "b.1"], "head": ["c.1"]},
    ),
    "depthwise with two filters a channel": (
        lambda: Net(
            lambda n, x: pooled(n.c(n.b(n.a(x).relu()).relu()).relu()),
            a=nn.Conv2d(4, 3, 3),
            b=nn.Conv2d(3, 6, 3, groups=3),
            c=nn.Conv2d(6, 5, 1),
        ),
        {"b": ["a"], "c": ["b"], "head": ["c"]},
    ),
    "transposed": (
        lambda: Net(
            lambda n, x: pooled(n.c(n.b(n.a(x).relu()).relu()).relu()),
            a=nn.Conv2d(4, 6, 3),
            b=nn.ConvTranspose2d(6, 4, 2, groups=2),
            c=nn.ConvTranspose2d(4, 5, 2),
        ),
        {"b": ["a"], "c": ["b"], "head": ["c"]},
    ),
    "flattened": (
        lambda: Net(lambda n, x: n.a(x).relu().flatten(1), a=conv_bn(4, 5, 3)),
        {"head": ["a.1"]},
    ),
    "residual": (
        lambda: Net(
            lambda n, x: pooled((n.c(n.b((s := n.a(x).relu()))).relu() + s).relu()),
            a=conv_bn(4, 6, 3),
            b=conv_bn(6, 3),
            c=conv_bn(3, 6),
        ),
        {"b.0": ["a.1", "c.1"], "c.0": ["b.1"]},
    ),
    "projected residual": (
        lambda: Net(
            lambda n, x: pooled((n.c(n.b((s := n.a(x).relu())).relu()) + n.d(s)).relu()),
            a=conv_bn(4, 6, 3),
            b=conv_bn(6, 3),
            c=conv_bn(3, 5),
            d=conv_bn(6, 5),
        ),
        {"b.0": ["a.1"], "c.0": ["b.1"], "head": ["c.1", "d.1"]},
    ),
    "shuffled": (
        lambda: Net(
            lambda n, x: pooled(n.c(shuffled(n.b(shuffled(n.a(x).relu(), 2)).relu(), 3)).relu()),
            a=nn.Conv2d(4, 6, 1),
            b=nn.Conv2d(6, 6, 1, groups=2),
            c=nn.Conv2d(6, 4, 1, groups=2),
        ),
        {"b": ["a"], "c": ["b"], "head": ["c"]},
    ),
    "squeeze and excite": (
        lambda: Net(
            lambda n, x: pooled(
                n.b((y := n.a(x).relu()) * n.e(n.s(y.mean((2, 3), keepdim=True)).relu()).sigmoid()).relu()
            ),
            a=conv_bn(4, 6, 3),
            s=nn.Conv2d(6, 2, 1),
            e=nn.Conv2d(2, 6, 1),
            b=nn.Conv2d(6, 5, 1),
        ),
        {"s": ["a.1"], "e": ["s"], "head": ["b"]},
    ),
    "padded, pooled and resized": (
        lambda: Net(
            lambda n, x: pooled(
                n.b(
                    F.interpolate(F.max_pool2d(F.pad(n.a(x).relu(), (1, 1, 1, 1), "reflect"), 2), scale_factor=2.0)
                ).relu()
            ),
            a=nn.Conv2d(4, 5, 3),
            b=nn.Conv2d(5, 4, 3, padding=1),
        ),
        {"b": ["a"], "head": ["b"]},
    ),
    "concatenated and split": (
        lambda: Net(
            lambda n, x: pooled(
                torch.cat([n.c((z := torch.cat([n.a(x), n.b(x)], 1).relu())[:, :6]), n.d(z[:, 6:])], 1).relu()
            ),
            a=nn.Conv2d(4, 4, 1),
            b=nn.Conv2d(4, 5, 1),
            c=nn.Conv2d(6, 3, 1),
            d=nn.Conv2d(3, 2, 1),
        ),
        {"c(a)": ["a"], "c(b)": ["b"], "head(c)": ["c"], "head(d)": ["d"]},
    ),
    "used twice": (
        lambda: Net(
            lambda n, x: pooled(n.b(n.b(n.a(x).relu()).relu()).relu()),
            a=nn.Conv2d(4, 5, 1),
            b=nn.Conv2d(5, 5, 3, padding=1),
        ),
        {"b": ["a", "b"]},
    ),
    "shifted and scaled by hand": (
        lambda: Net(
            lambda n, x: pooled(n.b((n.a(x) * n.scale.view(1, -1, 1, 1) + n.shift.view(-1, 1, 1)).relu()).relu()),
            a=nn.Conv2d(4, 5, 3, bias=False),
            b=nn.Conv2d(5, 4, 1),
            scale=nn.Parameter(torch.zeros(5)),
            shift=nn.Parameter(torch.zeros(5)),
        ),
        {"b": ["a+shift"], "head": ["b"]},
    ),
    "in place": (
        lambda: Net(lambda n, x: pooled(n.b(n.a(x).relu_().mul_(2)).relu_()), a=conv_bn(4, 5), b=nn.Conv2d(5, 4, 1)),
        {"b": ["a.1"], "head": ["b"]},
    ),
    "rearranged to depth": (
        lambda: Net(
            lambda n, x: pooled(n.b(F.pixel_shuffle(n.a(x).relu(), 2)).relu()),
            a=nn.Conv2d(4, 12, 1),
            b=nn.Conv2d(3, 4, 1),
        ),
        {"head": ["b"]},
    ),
}


def units(model: nn.Module, batch: Any, granularity: str = "neuron", **options: Any) -> Relevance:
    if isinstance(batch, Tensor):
        batch = (batch, torch.zeros(len(batch), dtype=torch.int64))
    return lrp_prune.attribute(model, [batch], target="class", granularity=granularity, matmul_dtype=None, **options)


@pytest.mark.filterwarnings("ignore:.*no units that could be removed")
@pytest.mark.parametrize("name", NETS)
def test_removing_a_unit_is_ablating_its_channel(name: str) -> None:
    build, expected = NETS[name]
    torch.manual_seed(0)
    model, x = randomized(build()), torch.randn(3, 4, 6, 6, dtype=torch.float64)
    relevance, dense, changed = units(model, x), model(x), 0
    assert {group: len(values) for group, values in relevance.items()} == {
        group: channels_of(model, lambda: model(x), modules[0].partition("+")[0]) for group, modules in expected.items()
    }
    for group, modules in expected.items():
        for unit in range(len(relevance[group])):
            with ExitStack() as stack:
                for module, _, shift in (module.partition("+") for module in modules):
                    stack.enter_context(silenced(model, [module], unit))
                    if shift:  # what the model itself adds to the channel
                        stack.enter_context(Zeroed(model.get_parameter(shift), unit))
                wanted = model(x)
            with without(relevance, group, unit, model):
                torch.testing.assert_close(model(x), wanted, rtol=1e-9, atol=1e-9)
            changed += not torch.allclose(wanted, dense)
    assert changed > sum(len(values) for values in relevance.values()) / 2  # dead channels apart, each unit matters


class Zeroed:
    """One entry of a parameter is zero."""

    def __init__(self, parameter: nn.Parameter, index: int) -> None:
        self.entry = parameter.detach()[index]

    def __enter__(self) -> None:
        self.before = self.entry.clone()
        self.entry.zero_()

    def __exit__(self, *_: object) -> None:
        self.entry.copy_(self.before)


@pytest.mark.parametrize("name", ["grouped", "depthwise with batch norm", "residual", "flattened"])
def test_the_relevance_of_a_unit_is_that_of_its_channels_where_layers_read_them(name: str) -> None:
    build, expected = NETS[name]
    torch.manual_seed(0)
    model, x = randomized(build()), torch.randn(3, 4, 6, 6, dtype=torch.float64)
    relevance = units(model, x, composite="gradient", statistic="signed")
    for group in expected:
        wanted = torch.zeros(len(relevance[group]), dtype=torch.float64)
        readers = {member.parameter.rpartition(".")[0] for member in relevance.members[group] if member.reads}
        for reader in readers:
            kept: list[Tensor] = []

            def keep(module: nn.Module, args: tuple[Tensor, ...], kept: list[Tensor] = kept) -> tuple[Tensor]:
                kept.append(args[0].clone())  # what goes by another way does not count
                return (kept[0],)

            handle = model.get_submodule(reader).register_forward_pre_hook(keep)
            with torch.enable_grad():
                value = model(x.requires_grad_())[:, 0].sum()
                (gradient,) = torch.autograd.grad(value, kept)
            handle.remove()
            wanted += (kept[0] * gradient).reshape(3, len(wanted), -1).sum((0, 2)) / 3
        torch.testing.assert_close(relevance[group].double(), wanted, rtol=1e-5, atol=1e-7)


def test_what_is_alive_stays_where_its_neighbour_is_dead() -> None:
    """Two units of a convolution in groups, of which only one does anything."""
    model = NETS["grouped"][0]().eval()
    with torch.no_grad():
        model.a.weight[[0, 3, 5, 6]] = 0
        model.a.bias[[0, 3, 5, 6]] = 0
    masks = lrp_prune.prune(
        model, [(torch.randn(8, 4, 6, 6), torch.zeros(8, dtype=torch.int64))], 0.25, granularity="neuron"
    )
    assert [bool(row.any()) for row in masks["a.weight"]] == [False, True, True, False, True, False, False, True]


def test_pruned_filters_put_out_nothing() -> None:
    """Filter, bias, scale and shift: a channel that is gone can be taken out of the network."""
    torch.manual_seed(0)
    model, x = randomized(NETS["depthwise with batch norm"][0]()).float(), torch.randn(4, 4, 6, 6)
    masks = lrp_prune.prune(model, [(x, torch.zeros(4, dtype=torch.int64))], 0.5, granularity="neuron", scope="layer")
    for layer in ("a", "b", "c"):
        gone = ~masks[f"{layer}.0.weight"].flatten(1).any(1)
        assert int(gone.sum()) == len(gone) // 2
        written: list[Tensor] = []
        handle = model.get_submodule(layer).register_forward_hook(
            lambda *args, written=written: written.append(args[2])
        )
        model(x)
        handle.remove()
        assert not written[0][:, gone].any() and written[0][:, ~gone].any()


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


def test_outputs_of_the_model_are_no_units() -> None:
    class Features(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 5), nn.Linear(5, 3)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            hidden = self.a(x).relu()
            return self.b(hidden), hidden

    def first(model: nn.Module, batch: Tensor) -> Tensor:
        return model(batch)[0].sum()

    with pytest.raises(ValueError, match=r"no neuron that could be removed.*outputs of the model"):
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
