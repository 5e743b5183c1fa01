"""The table of operations: what each torch function is, as far as relevance is concerned.

One row for a function's name, with these columns:

* *kind*: composites give rules to kinds;
* *operands*: where the tensors are that the kind is about;
* *added*: where what is added to a product is;
* *data*: where parameters and constants may be data like any input: added, joined, or selected;
* *linear*: whether it is linear in its input, or picks from it, so that its plain gradient times input is the relevance;
* *channels*: what becomes of the channels of its input;
* *signature*: the arguments of functions of which more has to be known.

Python functions of torch that call others (``F.multi_head_attention_forward``, ``F.normalize``, ...) do not appear: the mode
looks inside them. Functions that work in place have the row of the one that does not.
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
    "convolution",
    "matmul",
    "softmax",
    "attention",
    "normalization",
    "statistic",
    "division",
    "average_pooling",
    "max_pooling",
    "sum",
    "dropout",
)
"""The kinds of operation that a composite can give a rule to."""

PRODUCTS = frozenset({"linear", "convolution", "matmul", "einsum"})
"""Kinds of contractions of two tensors: with a weight the first two, mostly."""

Place = tuple[int, str]
"""Where an argument is: its position and its name."""

_FIRST: tuple[Place, ...] = ((0, "input"),)
_TWO: tuple[Place, ...] = ((0, "input"), (1, "other"))


class Signature(NamedTuple):
    """What is known of a function's arguments.

    Args:
        arguments: their names, in order.
        over: what shares a statistic, of normalisations: the last dimensions (``"last"``), the channels of a group
            (``"groups"``), the positions of a channel (``"positions"``), or these in the whole batch (``"batch"``).
        centered: whether a normalisation subtracts the mean.
    """

    arguments: tuple[str, ...]
    over: str = ""
    centered: bool = True

    @property
    def per_channel(self) -> bool:
        """Whether scale and shift have an entry for each channel, in place of one for each of the last dimensions."""
        return self.over != "last"


class Operation(NamedTuple):
    """One torch function: the columns are told in the module's docstring.

    Args:
        kind: one of :data:`KINDS` (a ``sum`` enters as it is, and may be data), or what has no rule because it needs none:
            ``join`` (which enters so as well), ``embedding``, ``plain``; ``power``, ``einsum``, ``solution`` (of linear
            equations), ``reduction`` (of what meets at one place), ``factors`` (products of many) and ``clip`` are one or
            another of these, as their operands tell, ``norm_pool`` is homogeneous, and ``composed`` is propagated as the
            simpler operations that it stands for.
        functional: the twin that changes nothing in place.
        channels: ``"copied"`` (entries keep their places), ``"moved"`` (or are put elsewhere), ``"entrywise"`` (a function of
            each entry), ``"pooled"`` (within a channel), ``"reduced"`` (over some dimensions); empty where they mix.
    """

    kind: str
    operands: tuple[Place, ...] = _FIRST
    functional: Callable[..., Any] | None = None
    data: tuple[Place, ...] = ()
    linear: bool = False
    channels: str = ""
    signature: Signature | None = None
    added: Place | None = None

    @property
    def enters(self) -> bool:
        """Whether operands enter as they are."""
        return self.kind in ("sum", "join")

    @property
    def adds(self) -> bool:
        """Whether operands are summed."""
        return self.kind == "sum"

    @property
    def drops(self) -> bool:
        """Whether it draws random numbers, and is off."""
        return self.kind == "dropout"

    @property
    def runs_in_steps(self) -> bool:
        """Whether it is a recurrent layer, which is written out step by step."""
        return self.kind == "recurrent"


def _rows(names: str, *columns: Any, **named: Any) -> dict[str, Operation]:
    return dict.fromkeys(names.split(), Operation(*columns, **named))


def _joined(operands: tuple[Place, ...], kind: str = "join", channels: str = "", linear: bool = True) -> Operation:
    """What enters as it is, and may be data."""
    return Operation(kind, operands, None, operands, linear, channels)


def _summed(operands: tuple[Place, ...] = _TWO, channels: str = "entrywise", linear: bool = True) -> Operation:
    return _joined(operands, "sum", channels, linear)


def _normalized(arguments: str, over: str, centered: bool = True) -> Operation:
    return Operation("normalization", signature=Signature(tuple(arguments.split()), over, centered))


def _named(kind: str) -> str:
    """The functions of a kind of pooling."""
    names = [f"{adaptive}{kind}_pool{dims}d" for adaptive in ("", "adaptive_") for dims in (1, 2, 3)]
    return " ".join(f"{name}{suffix}" for name in names for suffix in ("", "_with_indices")[: 1 + (kind == "max")])


_INPUT_AND_WEIGHT: tuple[Place, ...] = ((0, "input"), (1, "weight"))
_BIAS: Place = (2, "bias")
_RUNNING = "weight bias running_mean running_var"

ROWS: dict[str, Operation] = {
    **_rows(
        """
        relu gelu silu sigmoid tanh elu selu celu leaky_relu relu6 hardtanh hardswish hardsigmoid mish softplus softsign
        log_sigmoid logsigmoid hardshrink softshrink tanhshrink threshold expit prelu
        exp exp2 expm1 log log2 log10 log1p erf erfc sin cos tan sinh cosh asin acos atan asinh acosh atanh square
        rrelu log_ndtr ndtr logit erfinv sinc round floor ceil trunc fix frac sign heaviside
        """,
        "activation",
        channels="entrywise",
    ),
    **_rows(
        "clamp clip clamp_min clamp_max", "clip", data=((0, "input"), (1, "min"), (2, "max")), channels="entrywise"
    ),
    **_rows("sqrt rsqrt reciprocal", "statistic", channels="entrywise"),
    **_rows("var std", "statistic", channels="reduced"),
    **_rows("inverse linalg_inv linalg_inv_ex linalg_pinv cholesky linalg_cholesky linalg_cholesky_ex", "statistic"),
    **_rows("var_mean std_mean linalg_vector_norm linalg_norm norm_except_dim", "statistic", channels="entrywise"),
    **_rows("pow", "power", _TWO, channels="entrywise"),
    **_rows("softmax _softmax softmin", "softmax"),
    **_rows("logsumexp", "softmax", channels="reduced"),
    **_rows("dropout alpha_dropout feature_dropout feature_alpha_dropout native_dropout", "dropout", channels="copied"),
    "batch_norm": _normalized(f"input {_RUNNING} training momentum eps cudnn_enabled", "batch"),
    "instance_norm": _normalized(f"input {_RUNNING} use_input_stats momentum eps cudnn_enabled", "positions"),
    "layer_norm": _normalized("input normalized_shape weight bias eps", "last"),
    "rms_norm": _normalized("input normalized_shape weight eps", "last", centered=False),
    "group_norm": _normalized("input num_groups weight bias eps", "groups"),
    **_rows("mul multiply", "product", _TWO),
    **_rows("div divide true_divide", "division", _TWO),
    **_rows("linalg_solve linalg_solve_ex linalg_solve_triangular", "solution", ((1, "B"), (0, "A"))),
    **_rows("triangular_solve", "solution", ((0, "input"), (1, "A"))),
    **_rows("cholesky_solve", "solution", ((0, "input"), (1, "input2"))),
    **_rows("grid_sampler grid_sampler_2d grid_sampler_3d", "division", ((0, "input"), (1, "grid"))),
    **_rows("prod cumprod", "factors"),
    "scatter_reduce": Operation("reduction", ((0, "input"), (3, "src")), linear=True),
    "index_reduce": Operation("reduction", ((0, "input"), (3, "source")), linear=True),
    "linear": Operation("linear", _INPUT_AND_WEIGHT, added=_BIAS),
    **_rows(
        "conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d",
        "convolution",
        _INPUT_AND_WEIGHT,
        added=_BIAS,
    ),
    **_rows("matmul vdot cross inner kron", "matmul", _TWO),
    **_rows("mm bmm smm hspmm _grouped_mm grouped_mm", "matmul", ((0, "input"), (1, "mat2"))),
    **_rows("_sparse_mm", "matmul", ((0, "sparse"), (1, "dense"))),
    **_rows("mv", "matmul", ((0, "input"), (1, "vec"))),
    **_rows("dot", "matmul", ((0, "input"), (1, "tensor"))),
    **_rows("vecdot", "matmul", ((0, "x"), (1, "y"))),
    **_rows("tensordot", "matmul", ((0, "a"), (1, "b"))),
    **_rows("outer", "matmul", ((0, "input"), (1, "vec2"))),
    **_rows("bilinear", "matmul", ((0, "input1"), (1, "input2")), added=(3, "bias")),
    **_rows("addmm", "matmul", ((1, "mat1"), (2, "mat2")), data=_FIRST, added=_FIRST[0]),
    **_rows("addmv", "matmul", ((1, "mat"), (2, "vec")), data=_FIRST, added=_FIRST[0]),
    **_rows("addbmm baddbmm", "matmul", ((1, "batch1"), (2, "batch2")), data=_FIRST, added=_FIRST[0]),
    **_rows("addcmul", "matmul", ((1, "tensor1"), (2, "tensor2")), data=_FIRST, added=_FIRST[0]),
    **_rows("addr", "matmul", ((1, "vec1"), (2, "vec2")), data=_FIRST, added=_FIRST[0]),
    **_rows(_named("avg"), "average_pooling", linear=True, channels="pooled"),
    **_rows(_named("max"), "max_pooling", linear=True, channels="pooled"),
    **_rows("lp_pool1d lp_pool2d lp_pool3d", "norm_pool", channels="pooled"),
    **_rows("glu cosine_similarity addcdiv log_softmax", "composed"),
    **_rows("lerp", "composed", channels="entrywise"),
    **_rows("lstm gru rnn_tanh rnn_relu lstm_cell gru_cell rnn_tanh_cell rnn_relu_cell", "recurrent", ()),
    # Sums, and distances: norms of a difference, whose relevance is that of both sides together.
    **dict.fromkeys(("add", "sub", "subtract", "rsub"), _summed()),
    **dict.fromkeys(("cdist", "pairwise_distance"), _summed(((0, "x1"), (1, "x2")), "", linear=False)),
    "dist": _summed(channels="", linear=False),
    "hypot": _summed(linear=False),
    "index_add": _summed(((0, "input"), (3, "source")), ""),
    "scatter_add": _summed(((0, "input"), (3, "src")), ""),
    **dict.fromkeys(
        "cat concat concatenate stack hstack vstack dstack row_stack column_stack".split(),
        _joined(((0, "tensors"),), channels="moved"),
    ),
    **dict.fromkeys(("maximum", "minimum", "fmax", "fmin"), _joined(_TWO, channels="entrywise")),
    "where": _joined(((1, "input"), (2, "other")), channels="entrywise"),
    "index_put": _joined(((0, "input"), (2, "values"))),
    "index_copy": _joined(((0, "input"), (3, "source"))),
    "masked_scatter": _joined(((0, "input"), (2, "source"))),
    "scatter": _joined(((0, "input"), (3, "src"))),
    **dict.fromkeys(("slice_scatter", "select_scatter", "diagonal_scatter"), _joined(((0, "input"), (1, "src")))),
    **_rows(
        """
        max_unpool2d max_unpool3d quantile nanquantile trapezoid trapz cumulative_trapezoid block_diag take put cummax
        cummin ldexp
        """,
        "plain",
        linear=True,
    ),
    **_rows("pdist", "plain"),  # of which the same is true as of other distances
    **_rows("nanmean", "plain", linear=True, channels="reduced"),
    **_rows("rot90", "plain", linear=True, channels="moved"),
}
"""The rows of functions that have a kind of their own, or that the audit would not know by their autograd nodes."""

PLAIN_ROWS: dict[str, Operation] = {
    **_rows(
        "to float half bfloat16 double type type_as contiguous clone detach alias requires_grad_ view_as_real",
        "plain",
        linear=True,
        channels="copied",
    ),
    **_rows(
        """
        view reshape transpose swapaxes swapdims permute movedim moveaxis flatten unflatten ravel squeeze unsqueeze expand
        expand_as view_as reshape_as broadcast_to __getitem__ chunk split tensor_split split_with_sizes unsafe_split unsafe_chunk
        hsplit vsplit dsplit unbind narrow select index_select gather take_along_dim roll flip fliplr flipud t repeat
        tile repeat_interleave pad constant_pad_nd pixel_shuffle pixel_unshuffle channel_shuffle native_channel_shuffle im2col
        diagonal tril triu atleast_1d atleast_2d atleast_3d unfold
        """,
        "plain",
        linear=True,
        channels="moved",
    ),
    **_rows("abs neg negative nan_to_num masked_fill", "plain", linear=True, channels="entrywise"),
    **_rows("sum mean nansum max min amax amin median cumsum", "plain", linear=True, channels="reduced"),
    **_rows("norm", "plain", channels="reduced"),  # looked into
    **_rows(
        """
        upsample_nearest1d upsample_nearest2d upsample_nearest3d upsample_linear1d upsample_bilinear2d upsample_bicubic2d
        upsample_trilinear3d _upsample_nearest_exact1d _upsample_nearest_exact2d _upsample_nearest_exact3d
        _upsample_bilinear2d_aa _upsample_bicubic2d_aa
        """,
        "plain",
        linear=True,
        channels="pooled",
    ),
    **_rows(
        """
        index index_fill masked_select diag trace col2im reflection_pad1d reflection_pad2d
        replication_pad1d replication_pad2d topk sort kthvalue aminmax fill zero fft_r2c fft_c2c fft_c2r conj
        conj_physical real imag complex view_as_complex fractional_max_pool2d fractional_max_pool3d segment_reduce
        embedding_bag nested_tensor_from_mask
        """,
        "plain",
        linear=True,
    ),
}
"""The rows of functions that need no rule, and that the mode lets pass."""

_OF_KIND = {
    "activation": "entrywise",
    "clip": "entrywise",
    "power": "entrywise",
    "sum": "entrywise",
    "statistic": "entrywise",
    "dropout": "copied",
}


def channels_of(name: str, kind: str) -> str:
    """What becomes of the channels of a function's input: see :class:`Operation`.

    Args:
        name: the function's, without the underscore of those that work in place.
        kind: its kind, which tells of functions that rules were registered for.
    """
    row = ROWS.get(name) or PLAIN_ROWS.get(name)
    return _OF_KIND.get(kind, "") if row is None else row.channels


_OWNERS: tuple[Any, ...] = (torch, Tensor, F, torch._C._nn, torch._C._VariableFunctions, torch.special, torch.linalg)
_OWN_NAMES = frozenset({"pow", "lp_pool1d", "lp_pool2d", "lp_pool3d"})
"""Rows whose functions are named one by one below."""


def _functions(name: str) -> Iterable[Callable[..., Any]]:
    """All C-level functions of that name: Python-level ones are looked into instead."""
    for owner in _OWNERS:
        function = getattr(owner, name, None)
        if function is not None and not isinstance(function, type(_functions)):
            yield function


def _build() -> dict[Callable[..., Any], Operation]:
    table: dict[Callable[..., Any], Operation] = {}
    for name, row in ROWS.items():
        if name in _OWN_NAMES:
            continue
        for function in _functions(name):
            table[function] = row
        twin = next(iter(_functions(name)), None)
        for function in _functions(f"{name}_") if twin is not None else ():
            table[function] = row._replace(functional=twin)
    for function in (torch.linalg.vector_norm, torch.linalg.norm, torch.linalg.matrix_norm):
        table[function] = ROWS["linalg_norm"]
    for name in "solve solve_ex solve_triangular inv inv_ex pinv cholesky cholesky_ex".split():
        table[getattr(torch.linalg, name)] = ROWS[f"linalg_{name}"]
    table[torch.pow] = table[Tensor.pow] = ROWS["pow"]
    table[Tensor.pow_] = ROWS["pow"]._replace(functional=torch.pow)
    table[Tensor.where] = _joined(((0, "self"), (2, "other")), channels="entrywise")
    table[Tensor.__setitem__] = _joined(((0, "input"), (2, "value")))
    table[Tensor.copy_] = _joined(((0, "input"), (1, "src")))
    table[torch.sparse.mm], table[torch.sparse.addmm] = ROWS["_sparse_mm"], ROWS["addmm"]
    table[F.softsign], table[torch.einsum] = ROWS["softsign"], Operation("einsum")
    for function in (F.lp_pool1d, F.lp_pool2d, F.lp_pool3d):
        table[function] = ROWS[function.__name__]
    for name, row in ROWS.items():
        if row.kind == "max_pooling" and not name.endswith("_with_indices"):
            table[getattr(F, name)] = row  # calls one function or another, as it is asked for indices
    table[torch.embedding] = table[torch.embedding_bag] = Operation("embedding", ((0, "weight"), (1, "indices")))
    table[F.embedding] = Operation("embedding", ((1, "weight"), (0, "input")))
    table[F.scaled_dot_product_attention] = Operation("attention", ((0, "query"), (1, "key"), (2, "value")))
    return table


OPERATIONS: dict[Callable[..., Any], Operation] = _build()
"""Every torch function with a kind. Extended by :func:`lrp_prune.attribution.register_rule`, never at import of a model."""
