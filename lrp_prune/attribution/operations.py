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
    "matmul",
    "softmax",
    "attention",
    "normalization",
    "statistic",
    "division",
    "dropout",
    "embedding",
    "sum",
)
"""The kinds of operation that a composite can give a rule to (``embedding`` and ``sum`` only create roots)."""


class Operation(NamedTuple):
    """One torch function: its kind, the positions and names of its operands, and its twin that changes nothing in place."""

    kind: str
    operands: tuple[tuple[int, str], ...] = ((0, "input"),)
    functional: Callable[..., Any] | None = None


_ACTIVATIONS = """
    relu gelu silu sigmoid tanh elu selu celu leaky_relu relu6 hardtanh hardswish hardsigmoid mish softplus softsign
    log_sigmoid logsigmoid hardshrink softshrink tanhshrink threshold expit
    exp exp2 expm1 log log2 log10 log1p erf erfc sin cos tan sinh cosh asin acos atan asinh acosh atanh square
    rrelu log_ndtr ndtr
""".split()
_STATISTICS = "sqrt rsqrt reciprocal var std var_mean std_mean linalg_vector_norm linalg_norm norm_except_dim".split()
_SOFTMAX = "softmax _softmax softmin".split()
_DROPOUT = "dropout alpha_dropout feature_dropout feature_alpha_dropout native_dropout".split()
_NORMALIZATION = "layer_norm rms_norm group_norm batch_norm instance_norm".split()
_SUMS = "add sub subtract rsub cat concat concatenate stack hstack vstack where".split()
_CONVOLUTIONS = "conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d".split()

_FIRST_TWO = ((0, "input"), (1, "other"))
_PRODUCTS = {"mul": _FIRST_TWO, "multiply": _FIRST_TWO}
_DIVISIONS = {"div": _FIRST_TWO, "divide": _FIRST_TWO, "true_divide": _FIRST_TWO}
_MATMULS = {
    "linear": ((0, "input"), (1, "weight")),
    "matmul": _FIRST_TWO,
    "mm": ((0, "input"), (1, "mat2")),
    "bmm": ((0, "input"), (1, "mat2")),
    "mv": ((0, "input"), (1, "vec")),
    "dot": ((0, "input"), (1, "tensor")),
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

_OWNERS: tuple[Any, ...] = (torch, Tensor, F, torch._C._nn, torch.special, torch.linalg)


def _functions(name: str) -> Iterable[Callable[..., Any]]:
    """All C-level functions of that name: Python-level ones are looked into instead."""
    for owner in _OWNERS:
        function = getattr(owner, name, None)
        if function is not None and not isinstance(function, type(_functions)):
            yield function


def _build() -> dict[Callable[..., Any], Operation]:
    table: dict[Callable[..., Any], Operation] = {}

    def enter(name: str, kind: str, operands: tuple[tuple[int, str], ...] = ((0, "input"),)) -> None:
        for function in _functions(name):
            table[function] = Operation(kind, operands)
        twin = next(iter(_functions(name)), None)
        for function in _functions(f"{name}_") if twin is not None else ():
            table[function] = Operation(kind, operands, functional=twin)

    for name in _ACTIVATIONS:
        enter(name, "activation")
    for name in _STATISTICS:
        enter(name, "statistic")
    for name in _SOFTMAX:
        enter(name, "softmax")
    for name in _DROPOUT:
        enter(name, "dropout")
    for name in _NORMALIZATION:
        enter(name, "normalization")
    for name in _SUMS:
        enter(name, "sum")
    for kind, entries in (("product", _PRODUCTS), ("division", _DIVISIONS), ("matmul", _MATMULS)):
        for name, operands in entries.items():
            enter(name, kind, operands)
    for function in (torch.linalg.vector_norm, torch.linalg.norm, torch.linalg.matrix_norm):
        table[function] = Operation("statistic")
    for function in (torch.pow, Tensor.pow):
        table[function] = Operation("power", _FIRST_TWO)
    table[Tensor.pow_] = Operation("power", _FIRST_TWO, functional=torch.pow)
    table[Tensor.copy_] = Operation("plain")
    table[torch.einsum] = Operation("einsum")
    table[torch.embedding] = Operation("embedding", ((0, "weight"), (1, "indices")))
    table[F.embedding] = Operation("embedding", ((1, "weight"), (0, "input")))
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
    Max Min Amax Amin Maximum Minimum Topk Sort Clamp ClampMin ClampMax Median Kthvalue Aminmax Sign Fill Zero
    Detach Lift LiftFresh Conj ConjPhysical Real Imag Complex ViewAsReal ViewAsComplex SplitCopy Narrow
    SegmentReduce Round Floor Ceil Trunc EmbeddingBag Hstack NestedTensorFromMask Contiguous Chunk Abs
    """.split()
)
"""Autograd nodes that are linear in their input, or pick from it: their plain gradient times input is the relevance."""


def node_kind(node: Any) -> str:
    """``MulBackward0`` -> ``Mul``."""
    name: str = node.name().rpartition("::")[2]
    stem = name.rstrip("0123456789")
    return stem.removesuffix("Backward") or stem
