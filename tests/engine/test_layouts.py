"""What is propagated does not depend on how tensors lie in memory: a batch of one, channels last, transposed, expanded."""

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lrp_prune
from lrp_prune.engine import operations
from tests.support.small_models import Single

IMAGE = (4, 6, 6)
TOKENS = (5, 6)


def weight(x: Tensor, *shape: int) -> Tensor:
    """The same numbers each time, in the precision of ``x``."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64).to(x.dtype)


def running(x: Tensor) -> tuple[Tensor, Tensor]:
    return weight(x, 4), weight(x, 4, 1)[:, 0].abs() + 0.5


def scale_and_shift(x: Tensor) -> tuple[Tensor, Tensor]:
    return weight(x, 4, 2)[:, 0], weight(x, 4, 3)[:, 0]


def attend(x: Tensor) -> Tensor:
    query = x.transpose(0, 1)
    packed, out = weight(x, 18, 6), weight(x, 6, 6)
    attended, _ = F.multi_head_attention_forward(
        query, query, query, 6, 2, packed, None, None, None, False, 0.0, out, None, need_weights=False
    )
    return attended


OPERATIONS: dict[str, tuple[tuple[int, ...], Callable[[Tensor], Tensor]]] = {
    "conv1d": ((4, 8), lambda x: F.conv1d(x, weight(x, 6, 4, 3), weight(x, 6), padding=1)),
    "conv1d grouped": ((4, 8), lambda x: F.conv1d(x, weight(x, 6, 2, 3), groups=2)),
    "conv2d": (IMAGE, lambda x: F.conv2d(x, weight(x, 6, 4, 3, 3), weight(x, 6))),
    "conv2d strided": (IMAGE, lambda x: F.conv2d(x, weight(x, 6, 4, 3, 3), stride=2, padding=1)),
    "conv2d dilated": (IMAGE, lambda x: F.conv2d(x, weight(x, 6, 4, 3, 3), dilation=2)),
    "conv2d of points": (IMAGE, lambda x: F.conv2d(x, weight(x, 6, 4, 1, 1))),
    "conv2d grouped": (IMAGE, lambda x: F.conv2d(x, weight(x, 6, 2, 3, 3), groups=2)),
    "conv2d depthwise": (IMAGE, lambda x: F.conv2d(x, weight(x, 4, 1, 3, 3), groups=4)),
    "conv3d": ((4, 4, 5, 5), lambda x: F.conv3d(x, weight(x, 6, 4, 2, 3, 3))),
    "conv3d grouped": ((4, 4, 5, 5), lambda x: F.conv3d(x, weight(x, 6, 2, 2, 3, 3), groups=2)),
    "conv_transpose1d": ((4, 8), lambda x: F.conv_transpose1d(x, weight(x, 4, 6, 3), stride=2)),
    "conv_transpose2d": (IMAGE, lambda x: F.conv_transpose2d(x, weight(x, 4, 6, 3, 3), stride=2)),
    "conv_transpose2d grouped": (IMAGE, lambda x: F.conv_transpose2d(x, weight(x, 4, 3, 3, 3), groups=2)),
    "conv_transpose3d": ((4, 4, 5, 5), lambda x: F.conv_transpose3d(x, weight(x, 4, 6, 2, 3, 3))),
    "linear": (TOKENS, lambda x: F.linear(x, weight(x, 7, 6), weight(x, 7))),
    "linear with a transposed weight": (TOKENS, lambda x: F.linear(x, weight(x, 6, 7).T)),
    "matmul": (TOKENS, lambda x: x @ weight(x, 6, 7)),
    "bmm": (TOKENS, lambda x: torch.bmm(x, x.transpose(1, 2))),
    "addmm": ((6,), lambda x: torch.addmm(weight(x, 7), x, weight(x, 6, 7))),
    "einsum": (TOKENS, lambda x: torch.einsum("bti,oi->bto", x, weight(x, 7, 6))),
    "bilinear": (TOKENS, lambda x: F.bilinear(x, x, weight(x, 3, 6, 6))),
    "multi_head_attention": (TOKENS, attend),
    "sdpa": ((3, 5, 4), lambda x: F.scaled_dot_product_attention(x, x, x)),
    "sdpa causal": ((3, 5, 4), lambda x: F.scaled_dot_product_attention(x, x, x, is_causal=True)),
    "sdpa with a bias": ((3, 5, 4), lambda x: F.scaled_dot_product_attention(x, x, x, attn_mask=weight(x, 5, 5))),
    "sdpa grouped": ((4, 5, 4), lambda x: F.scaled_dot_product_attention(x, x[:, :2], x[:, :2], enable_gqa=True)),
    "layer_norm": (TOKENS, lambda x: F.layer_norm(x, (6,), weight(x, 6), weight(x, 6, 1)[:, 0])),
    "layer_norm of two": (TOKENS, lambda x: F.layer_norm(x, TOKENS)),
    "rms_norm": (TOKENS, lambda x: F.rms_norm(x, (6,), weight(x, 6))),
    "softmax": (TOKENS, lambda x: F.softmax(x, -1)),
    "softmax over tokens": (TOKENS, lambda x: F.softmax(x, 1)),
    "prelu": (IMAGE, lambda x: F.prelu(x, weight(x, 4))),
    "glu": (TOKENS, lambda x: F.glu(x, -1)),
    "product": (TOKENS, lambda x: x * x.flip(-1)),
    "division": (TOKENS, lambda x: x / (x.flip(-1).abs() + 1)),
    "var": (TOKENS, lambda x: x.var(-1)),
    "norm": (TOKENS, lambda x: x.norm(dim=-1)),
    "normalize": (TOKENS, lambda x: F.normalize(x, dim=-1)),
    "cumsum": (TOKENS, lambda x: x.cumsum(1)),
    "max": (TOKENS, lambda x: x.max(1).values),
    "topk": (TOKENS, lambda x: x.topk(2, -1).values),
    "sort": (TOKENS, lambda x: x.sort(-1).values),
    "index_select": (TOKENS, lambda x: x.index_select(1, torch.tensor([0, 2, 2]))),
    "repeat_interleave": (TOKENS, lambda x: x.repeat_interleave(2, 1)),
    "unfold": (IMAGE, lambda x: F.unfold(x, 3)),
    "fold": ((36, 16), lambda x: F.fold(x, (6, 6), 3)),
    "pixel_shuffle": (IMAGE, lambda x: F.pixel_shuffle(x, 2)),
    "pixel_unshuffle": (IMAGE, lambda x: F.pixel_unshuffle(x, 2)),
    "channel_shuffle": (IMAGE, lambda x: F.channel_shuffle(x, 2)),
    "grid_sample": (
        IMAGE,
        lambda x: F.grid_sample(x, weight(x, 1, 5, 5, 2).tanh().expand(len(x), -1, -1, -1), align_corners=False),
    ),
    "antialiased": (IMAGE, lambda x: F.interpolate(x, size=(4, 4), mode="bilinear", antialias=True)),
    **{
        f"{name}{len(shape) - 1}d {label}": (shape, function)
        for shape in ((4, 8), IMAGE, (4, 4, 6, 6))
        for name, label, function in (
            ("batch_norm", "running", lambda x: F.batch_norm(x, *running(x), *scale_and_shift(x))),
            ("batch_norm", "without scale", lambda x: F.batch_norm(x, *running(x))),
            ("batch_norm", "of the batch", lambda x: F.batch_norm(x, None, None, *scale_and_shift(x), training=True)),
            ("instance_norm", "", lambda x: F.instance_norm(x, None, None, *scale_and_shift(x))),
            (
                "instance_norm",
                "running",
                lambda x: F.instance_norm(x, *running(x), *scale_and_shift(x), use_input_stats=False),
            ),
            ("group_norm", "", lambda x: F.group_norm(x, 2, *scale_and_shift(x))),
            ("local_response_norm", "", lambda x: F.local_response_norm(x.contiguous(), 3)),
        )
    },
    **{
        f"{kind}{dimensions}d {label}": (
            shape,
            lambda x, f=kind, d=dimensions, a=arguments: getattr(F, f"{f}{d}d")(x, *a),
        )
        for dimensions, shape in ((1, (4, 8)), (2, IMAGE), (3, (4, 4, 6, 6)))
        for kind, label, arguments in (
            ("max_pool", "", (2,)),
            ("max_pool", "overlapping", (3, 1, 1)),
            ("avg_pool", "", (2,)),
            ("avg_pool", "overlapping", (3, 1, 1)),
            ("lp_pool", "", (2, 2)),
            ("adaptive_avg_pool", "", (3,)),
            ("adaptive_avg_pool", "to one", (1,)),
            ("adaptive_max_pool", "", (3,)),
        )
    },
    **{
        f"interpolate {mode} by {scale} of {len(shape) - 1}d": (
            shape,
            lambda x, m=mode, s=scale: F.interpolate(x, scale_factor=s, mode=m),
        )
        for mode, shape in (
            ("nearest", (4, 6)),
            ("linear", (4, 6)),
            ("nearest", IMAGE),
            ("nearest-exact", IMAGE),
            ("bilinear", IMAGE),
            ("bicubic", IMAGE),
            ("area", IMAGE),
            ("nearest", (2, 3, 4, 4)),
            ("trilinear", (2, 3, 4, 4)),
        )
        for scale in (2, 0.5)
    },
    **{
        f"pad {mode}": (IMAGE, lambda x, m=mode: F.pad(x, (1, 1, 1, 1), mode=m))
        for mode in ("reflect", "replicate", "circular", "constant")
    },
    **{
        name: (TOKENS, lambda x, f=name: getattr(F, f)(x))
        for name in (
            "relu gelu silu sigmoid tanh elu selu celu leaky_relu relu6 hardtanh hardswish hardsigmoid mish softplus softsign "
            "logsigmoid hardshrink softshrink tanhshrink"
        ).split()
    },
}


def layouts(x: Tensor) -> Iterator[Tensor]:
    """The same numbers in other orders in memory, and with repeated entries."""
    yield x.contiguous()
    channels_last = x.movedim(1, -1).contiguous().movedim(-1, 1)  # in any number of dimensions
    yield channels_last
    yield torch.stack([x, torch.zeros_like(x)], -1)[..., 0]
    yield x[..., :1].expand_as(x)
    if len(x) == 1:
        # A dimension of size one may have any stride, and with some torch takes the order of the others for another one.
        for order in (x.contiguous(), channels_last):
            yield order.as_strided(x.shape, (1, *order.stride()[1:]))
    else:
        yield x.transpose(0, -1).contiguous().transpose(0, -1)
        yield x[:1].expand_as(x)


def in_single_precision(x: Tensor) -> Tensor:
    """A copy with the same strides."""
    expanded = [stride == 0 and size > 1 for stride, size in zip(x.stride(), x.shape, strict=True)]
    if any(expanded):
        return x[tuple(slice(0, 1) if repeated else slice(None) for repeated in expanded)].float().expand(x.shape)
    memory = torch.empty(1 + sum((n - 1) * step for n, step in zip(x.shape, x.stride(), strict=True)))
    copy = memory.as_strided(x.shape, x.stride())
    copy[0 if len(x) == 1 else slice(None)] = x[0] if len(x) == 1 else x
    return copy


def gradients(function: Callable[[Tensor], Tensor], x: Tensor, seeds: list[Tensor], composite: str) -> list[Tensor]:
    """What arrives at the input for each gradient of the output."""
    model = Single(function)
    with lrp_prune.attributing(model, composite, unruled="ignore") as propagation:
        output = model(x)
        (leaf,) = [root.leaf for root in propagation.roots() if root.name == "x"]
        if not output.requires_grad:
            return [torch.zeros_like(x) for _ in seeds]
        return [torch.autograd.grad(output, leaf, seed, retain_graph=True)[0] for seed in seeds]


@pytest.mark.parametrize("samples", [1, 2])
@pytest.mark.parametrize("name", OPERATIONS)
def test_gradients_do_not_depend_on_the_order_in_memory(name: str, samples: int) -> None:
    """Against float64 and contiguous memory: torch's own under the plain gradient, the same rules under the others."""
    shape, function = OPERATIONS[name]
    generator = torch.Generator().manual_seed(3)
    original = torch.randn(samples, *shape, generator=generator, dtype=torch.float64)
    for x in layouts(original):
        leaf = x.contiguous().clone().requires_grad_()
        output = function(leaf)
        seeds = list(layouts(torch.randn(output.shape, generator=generator, dtype=torch.float64)))
        plain = [seed.clone(memory_format=torch.contiguous_format) for seed in seeds]
        for composite in ("gradient", "attnlrp"):
            if composite == "gradient":
                expected = [torch.autograd.grad(output, leaf, seed, retain_graph=True)[0] for seed in plain]
            else:
                expected = gradients(function, leaf.detach(), plain, composite)
            found = gradients(function, in_single_precision(x), list(map(in_single_precision, seeds)), composite)
            for one, two in zip(found, expected, strict=True):
                torch.testing.assert_close(one.double(), two, rtol=1e-3, atol=1e-4 * max(1, float(two.abs().max())))


def test_the_table_of_layouts_knows_all_normalisations() -> None:
    named = {function.__name__ for function, entry in operations.OPERATIONS.items() if entry.kind == "normalization"}
    assert all(any(key.startswith(name) for key in OPERATIONS) for name in named)


@pytest.mark.parametrize("composite", lrp_prune.attribution.COMPOSITES)
def test_values_are_those_of_torch_bit_for_bit(composite: str) -> None:
    for name, (shape, function) in OPERATIONS.items():
        x = torch.randn(2, *shape)
        with lrp_prune.attributing(model := Single(function), composite, unruled="ignore"):
            assert torch.equal(model(x), function(x)), name


@pytest.mark.parametrize("composite", lrp_prune.attribution.COMPOSITES)
def test_one_image_has_the_relevance_of_each_of_two(composite: str) -> None:
    """Tokens are made of the channels of a batch norm, so that the gradient of its output lies in memory as they do."""

    class Patches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.convolution, self.norm = nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4)
            self.norm.running_var = torch.tensor([0.5, 1.0, 2.0, 3.0])
            self.head = nn.Linear(4, 2, bias=False)

        def forward(self, image: Tensor) -> Tensor:
            return self.head(self.norm(self.convolution(image)).flatten(2).transpose(1, 2))

    model, image, totals = Patches().eval(), torch.randn(1, 3, 8, 8), []
    for copies in (1, 2):
        with lrp_prune.attributing(model, composite) as propagation:
            value = model(image.expand(copies, -1, -1, -1))[..., 0].sum()
            relevance = propagation.relevance(value)["image"]
        torch.testing.assert_close(relevance.sum(), value)
        totals.append(relevance.sum() / copies)
    torch.testing.assert_close(*totals)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("composite", ["attnlrp", "gradient"])
def test_batch_norm_leaves_its_buffers_alone_while_it_runs(composite: str, training: bool) -> None:
    norm = nn.BatchNorm2d(4).train(training)
    x, before = torch.randn(3, 4, 5, 5), norm.running_var.clone()
    with lrp_prune.attributing(norm, composite):
        norm(x)
        assert torch.equal(norm.running_var, before)


@pytest.mark.parametrize("training", [False, True])
def test_a_scale_that_the_model_computes_is_a_factor_like_any_other(training: bool) -> None:
    """As in adaptive normalisation: half of a product's relevance is the scale's, and a sum's shares are plain."""
    norms: dict[str, tuple[tuple[int, ...], Callable[[Tensor, Tensor, Tensor], Tensor]]] = {
        "layer": ((5, 4), lambda x, scale, shift: F.layer_norm(x, (4,), scale, shift)),
        "rms": ((5, 4), lambda x, scale, shift: F.rms_norm(x, (4,), scale)),
        "group": ((4, 5), lambda x, scale, shift: F.group_norm(x, 2, scale, shift)),
        "batch": ((4, 5), lambda x, scale, shift: F.batch_norm(x, *running(x), scale, shift, training)),
        "instance": ((4, 5), lambda x, scale, shift: F.instance_norm(x, None, None, scale, shift)),
    }

    class Adaptive(nn.Module):
        def forward(self, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
            return function(x, scale, shift)

    for name, (shape, function) in norms.items():
        x, scale, shift = torch.randn(3, *shape), torch.randn(4), torch.randn(4)
        plain = function(x, scale, shift)
        with lrp_prune.attributing(model := Adaptive()) as propagation:
            value = model(x, scale, shift)
            assert torch.equal(value, plain), name
            relevance = propagation.relevance(value.square().sum() / 2)
        normalised = function(x, torch.ones(4), torch.zeros(4))
        per_channel = (slice(None), None) if shape == (4, 5) else (slice(None),)
        product = normalised * scale[per_channel]
        dims = [0, 2] if shape == (4, 5) else [0, 1]
        torch.testing.assert_close(relevance["scale"], (product * plain).sum(dims) / 2)
        expected = (shift[per_channel] * plain).sum(dims) if name != "rms" else torch.zeros(4)
        torch.testing.assert_close(relevance["shift"], expected)
        if name != "batch":  # whose mean is a constant, which takes its share
            torch.testing.assert_close(relevance["x"].sum(), (product * plain).sum() / 2)


def test_what_a_product_of_two_activations_lies_in_memory_as_is_what_it_would_be_without_rules() -> None:
    """Along a dimension of size one as well, by which convolutions tell whether channels come last."""

    def product(x: Tensor) -> Tensor:
        return x * x.mean((2, 3), keepdim=True) + 2

    x = torch.randn(1, *IMAGE).contiguous(memory_format=torch.channels_last)
    for composite in ("attnlrp", "cp_lrp"):
        with lrp_prune.attributing(model := Single(product), composite):
            assert model(x).stride() == product(x).stride() == x.stride()
