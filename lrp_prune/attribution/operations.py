"""Which torch functions are which kind of operation, as far as relevance is concerned.

Composites give rules to *kinds*; this table says which functions belong to a kind and where their operands are. Python
functions of torch that call others (``F.multi_head_attention_forward``, ``F.normalize``, ...) do not appear: the
mode looks inside them.
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

KINDS = (
    "activation",
    "product",
    "linear",
    "matmul",
    "softmax",
    "attention",
    "normalization",
    "statistic",
    "division",
    "dropout",
)
"""The kinds of operation that a composite can give a rule to."""

Place = tuple[int, str]
"""Where an argument is: its position and its name."""


class Operation(NamedTuple):
    """One torch function.

    Args:
        kind: one of :data:`KINDS`, or what has no rule because it needs none: ``sum`` and ``join`` (what enters as it is, and
            may be data), ``embedding``, ``plain``; the mode tells ``power`` and ``einsum`` apart further, ``factors`` are
            products of many, ``clip`` is an activation that is no gate, ``norm_pool`` is homogeneous, and ``composed`` is
            propagated as the simpler operations that it stands for.
        operands: where the tensors are that the kind is about.
        functional: the twin that changes nothing in place.
        data: where parameters and constants may be data like any input: added, joined, or selected.
    """

    kind: str
    operands: tuple[Place, ...] = ((0, "input"),)
    functional: Callable[..., Any] | None = None
    data: tuple[Place, ...] = ()


_ACTIVATIONS = """
    relu gelu silu sigmoid tanh elu selu celu leaky_relu relu6 hardtanh hardswish hardsigmoid mish softplus softsign
    log_sigmoid logsigmoid hardshrink softshrink tanhshrink threshold expit prelu
    exp exp2 expm1 log log2 log10 log1p erf erfc sin cos tan sinh cosh asin acos atan asinh acosh atanh square
    rrelu log_ndtr ndtr logit erfinv sinc round floor ceil trunc fix frac sign heaviside
""".split()
_STATISTICS = "sqrt rsqrt reciprocal var std var_mean std_mean linalg_vector_norm linalg_norm norm_except_dim".split()
_SOFTMAX = "softmax _softmax softmin".split()
_DROPOUT = "dropout alpha_dropout feature_dropout feature_alpha_dropout native_dropout".split()
_NORMALIZATION = "layer_norm rms_norm group_norm batch_norm instance_norm".split()
_COMPOSED = "glu cosine_similarity lerp addcdiv".split()
_CLIPS = "clamp clip clamp_min clamp_max".split()
_CONVOLUTIONS = "conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d".split()
_LINEAR = """
    nanmean quantile nanquantile trapezoid trapz cumulative_trapezoid block_diag rot90 take put max_unpool2d max_unpool3d
    cummax cummin pdist ldexp
""".split()
"""Functions that are linear in their input, or pick from it, though not all of their autograd nodes tell."""

_RECURRENT = "lstm gru rnn_tanh rnn_relu".split()

_FIRST_TWO: tuple[Place, ...] = ((0, "input"), (1, "other"))
_SUMS: dict[str, tuple[Place, ...]] = {
    **dict.fromkeys("add sub subtract rsub".split(), _FIRST_TWO),
    # A distance is a norm of a difference, and its relevance that of both sides together.
    "cdist": ((0, "x1"), (1, "x2")),
    "pairwise_distance": ((0, "x1"), (1, "x2")),
    "dist": _FIRST_TWO,
    "hypot": _FIRST_TWO,
    "index_add": ((0, "input"), (3, "source")),
    "scatter_add": ((0, "input"), (3, "src")),
}
_JOINS: dict[str, tuple[Place, ...]] = {
    **dict.fromkeys(
        "cat concat concatenate stack hstack vstack dstack row_stack column_stack".split(), ((0, "tensors"),)
    ),
    **dict.fromkeys("maximum minimum fmax fmin".split(), _FIRST_TWO),
    "where": ((1, "input"), (2, "other")),
    "index_put": ((0, "input"), (2, "values")),
    "index_copy": ((0, "input"), (3, "source")),
    "masked_scatter": ((0, "input"), (2, "source")),
    "scatter": ((0, "input"), (3, "src")),
    "slice_scatter": ((0, "input"), (1, "src")),
    "select_scatter": ((0, "input"), (1, "src")),
    "diagonal_scatter": ((0, "input"), (1, "src")),
}
_PRODUCTS: dict[str, tuple[Place, ...]] = {"mul": _FIRST_TWO, "multiply": _FIRST_TWO}
_DIVISIONS: dict[str, tuple[Place, ...]] = {"div": _FIRST_TWO, "divide": _FIRST_TWO, "true_divide": _FIRST_TWO}
_MATMULS: dict[str, tuple[Place, ...]] = {
    "linear": ((0, "input"), (1, "weight")),
    "matmul": _FIRST_TWO,
    "mm": ((0, "input"), (1, "mat2")),
    "bmm": ((0, "input"), (1, "mat2")),
    "mv": ((0, "input"), (1, "vec")),
    "dot": ((0, "input"), (1, "tensor")),
    "vdot": _FIRST_TWO,
    "vecdot": ((0, "x"), (1, "y")),
    "cross": _FIRST_TWO,
    "tensordot": ((0, "a"), (1, "b")),
    "outer": ((0, "input"), (1, "vec2")),
    "inner": _FIRST_TWO,
    "kron": _FIRST_TWO,
    "addmm": ((1, "mat1"), (2, "mat2")),
    "addmv": ((1, "mat"), (2, "vec")),
    "addbmm": ((1, "batch1"), (2, "batch2")),
    "baddbmm": ((1, "batch1"), (2, "batch2")),
    "addcmul": ((1, "tensor1"), (2, "tensor2")),
    "bilinear": ((0, "input1"), (1, "input2")),
    "_grouped_mm": ((0, "input"), (1, "mat2")),
    "grouped_mm": ((0, "input"), (1, "mat2")),
    **{name: ((0, "input"), (1, "weight")) for name in _CONVOLUTIONS},
}

_OWNERS: tuple[Any, ...] = (torch, Tensor, F, torch._C._nn, torch._C._VariableFunctions, torch.special, torch.linalg)


def _functions(name: str) -> Iterable[Callable[..., Any]]:
    """All C-level functions of that name: Python-level ones are looked into instead."""
    for owner in _OWNERS:
        function = getattr(owner, name, None)
        if function is not None and not isinstance(function, type(_functions)):
            yield function


def _build() -> dict[Callable[..., Any], Operation]:
    table: dict[Callable[..., Any], Operation] = {}

    def enter(
        name: str, kind: str, operands: tuple[Place, ...] = ((0, "input"),), data: tuple[Place, ...] = ()
    ) -> None:
        for function in _functions(name):
            table[function] = Operation(kind, operands, None, data)
        twin = next(iter(_functions(name)), None)
        for function in _functions(f"{name}_") if twin is not None else ():
            table[function] = Operation(kind, operands, twin, data)

    for kind, names in (
        ("activation", _ACTIVATIONS),
        ("statistic", _STATISTICS),
        ("softmax", _SOFTMAX),
        ("dropout", _DROPOUT),
        ("normalization", _NORMALIZATION),
        ("plain", _LINEAR),
        ("composed", _COMPOSED),
        ("factors", ("prod", "cumprod")),
    ):
        for name in names:
            enter(name, kind)
    for kind, entries in (("product", _PRODUCTS), ("division", _DIVISIONS), ("matmul", _MATMULS)):
        for name, operands in entries.items():
            summand = ((0, "input"),) if name.startswith(("add", "baddbmm")) else ()
            enter(name, kind, operands, summand)
    for kind, entries in (("sum", _SUMS), ("join", _JOINS)):
        for name, operands in entries.items():
            enter(name, kind, operands, operands)
    for name in _CLIPS:
        enter(name, "clip", data=((0, "input"), (1, "min"), (2, "max")))
    for function in (torch.linalg.vector_norm, torch.linalg.norm, torch.linalg.matrix_norm):
        table[function] = Operation("statistic")
    for function in (torch.pow, Tensor.pow):
        table[function] = Operation("power", _FIRST_TWO)
    table[Tensor.pow_] = Operation("power", _FIRST_TWO, functional=torch.pow)
    table[Tensor.where] = Operation("join", ((0, "self"), (2, "other")), None, ((0, "self"), (2, "other")))
    # Assigned to parts of a tensor.
    table[Tensor.__setitem__] = Operation("join", ((0, "input"), (2, "value")), None, ((0, "input"), (2, "value")))
    table[Tensor.copy_] = Operation("join", ((0, "input"), (1, "src")), None, ((0, "input"), (1, "src")))
    table[torch.einsum] = Operation("einsum")
    for name in _RECURRENT:
        enter(name, "recurrent", ())
        enter(f"{name}_cell", "recurrent", ())
    table[F.softsign] = Operation("activation")
    for function in (F.lp_pool1d, F.lp_pool2d, F.lp_pool3d):
        table[function] = Operation("norm_pool")
    table[torch.embedding] = Operation("embedding", ((0, "weight"), (1, "indices")))
    table[F.embedding] = Operation("embedding", ((1, "weight"), (0, "input")))
    table[torch.embedding_bag] = Operation("embedding", ((0, "weight"), (1, "indices")))
    table[F.scaled_dot_product_attention] = Operation("attention", ((0, "query"), (1, "key"), (2, "value")))
    return table


OPERATIONS: dict[Callable[..., Any], Operation] = _build()
"""Every torch function with a kind. Extended by :func:`lrp_prune.attribution.register_rule`, never at import of a model."""

LINEAR_NODES = frozenset(
    """
    AccumulateGrad Add Sub Rsub Neg Sum Mean Nansum View UnsafeView Reshape ReshapeAlias Transpose T Permute Expand
    Slice Select SelectBackwardAutogradNestedTensor Index IndexSelect IndexAdd IndexPut IndexCopy IndexFill
    Cat Stack Split SplitWithSizes Unbind UnsafeSplit Squeeze Unsqueeze Clone ToCopy CopyBackwards CopySlices Copy
    AsStrided Alias Repeat RepeatInterleave Gather Scatter ScatterAdd ScatterReduce MaskedFill MaskedScatter MaskedSelect
    Where ConstantPadNd Roll Flip Triu Tril Cumsum Diagonal Diag Trace Movedim Swapaxes Unfold Im2Col Col2Im
    MaxPool2DWithIndices MaxPool3DWithIndices MaxPool1D AvgPool2D AvgPool3D AdaptiveAvgPool2D AdaptiveAvgPool3D
    AdaptiveMaxPool2D AdaptiveMaxPool3D MkldnnAdaptiveAvgPool2D MkldnnMaxPool2D MkldnnMaxPool3D
    UpsampleBilinear2D UpsampleNearest1D UpsampleNearest2D UpsampleNearest3D UpsampleBicubic2D UpsampleLinear1D
    UpsampleTrilinear3D UpsampleBilinear2DAa UpsampleBicubic2DAa GridSampler2D
    ReflectionPad1D ReflectionPad2D ReplicationPad1D ReplicationPad2D PixelShuffle PixelUnshuffle ChannelShuffle
    Max Min Amax Amin Maximum Minimum Topk Sort Clamp ClampMin ClampMax Median Kthvalue Aminmax Fill Zero
    FftR2C FftC2C FftC2R FractionalMaxPool2D FractionalMaxPool3D MaxUnpool2D MaxUnpool3D
    Detach Lift LiftFresh Conj ConjPhysical Real Imag Complex ViewAsReal ViewAsComplex SplitCopy Narrow
    SegmentReduce PackPaddedSequence EmbeddingBag Hstack NestedTensorFromMask Contiguous Chunk Abs
    """.split()
)
"""Autograd nodes that are linear in their input, or pick from it: their plain gradient times input is the relevance."""

NO_GRADIENT_NODES = frozenset({"WarnNotImplemented", "NotImplemented"})
"""Autograd nodes of operations without a gradient, such as quantized ones: nothing comes out of them."""


def node_kind(node: Any) -> str:
    """``MulBackward0`` -> ``Mul``."""
    name: str = node.name().rpartition("::")[2]
    stem = name.rstrip("0123456789")
    return stem.removesuffix("Backward") or stem
