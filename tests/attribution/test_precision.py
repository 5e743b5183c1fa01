"""In which precision statistics are multiplied, activations are kept, and relevance passes weights."""

from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import lrp_prune
from tests.support.small_models import batch_for, build


def test_bfloat16_products_are_close_and_the_sums_are_float32() -> None:
    model, batch = build("llama"), batch_for("llama")
    exact = lrp_prune.attribute(model, [batch], statistic="squared_token", matmul_dtype=None)
    fast = lrp_prune.attribute(model, [batch], statistic="squared_token", matmul_dtype="bfloat16")
    for name in exact:
        assert fast[name].dtype == torch.float32
        torch.testing.assert_close(fast[name], exact[name], rtol=0.03, atol=1e-3 * float(exact[name].max()))


def _kept(run: Callable[[], Any]) -> Counter[torch.dtype]:
    """How many different tensors a run keeps for its backward pass, by precision."""
    held: dict[torch.dtype, dict[int, Tensor]] = {}

    def pack(tensor: Tensor) -> Tensor:
        held.setdefault(tensor.dtype, {})[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return Counter({dtype: len(tensors) for dtype, tensors in held.items()})


def test_what_is_kept_for_backward_is_in_the_precision_that_is_multiplied() -> None:
    """Queries, keys and values share one copy of their activation, and it has half the bytes."""
    model, batch = build("llama"), batch_for("llama")
    layers = model.config.num_hidden_layers
    inputs = 4 * layers  # of q, k, v; of o; of gate, up; of down
    for statistic, dtype, expected in (
        ("squared_token", None, 0),
        ("signed", "bfloat16", inputs),
        ("squared_token", "bfloat16", inputs + layers),  # and what the identity rule divides by
    ):
        run = partial(lrp_prune.attribute, model, [batch], matmul_dtype=dtype, statistic=statistic)
        assert _kept(run)[torch.bfloat16] == expected, (statistic, dtype)


def test_relevance_of_inputs_is_never_rounded() -> None:
    model, batch = build("llama"), batch_for("llama")

    def run() -> None:
        with lrp_prune.attributing(model) as propagation:
            propagation.relevance(model(**batch, use_cache=False).logits[0, -1].max())

    assert set(_kept(run)) <= {torch.float32, torch.int64}


class _Multiplied(TorchDispatchMode):
    """Counts matrix products by the precision of their operands."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[torch.dtype] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.bmm, torch.ops.aten.addmm):
            self.counts[args[-1].dtype] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.slow
def test_relevance_passes_weights_in_the_precision_of_the_products_only_where_nothing_cancels() -> None:
    model, batch = build("llama"), batch_for("llama")
    counts = {}
    for statistic in ("signed", "abs_sample", "abs_token", "squared_token", "geometric"):
        with _Multiplied() as multiplied:
            lrp_prune.attribute(model, [batch], matmul_dtype="bfloat16", statistic=statistic)
        counts[statistic] = multiplied.counts
    layers, samples = model.config.num_hidden_layers, len(batch["input_ids"])
    weights = 7 * layers  # q, k, v, o, gate, up, down
    assert counts["signed"][torch.bfloat16] == weights  # contractions alone
    assert counts["abs_sample"][torch.bfloat16] == weights * samples
    for statistic in ("abs_token", "squared_token", "geometric"):
        assert counts[statistic][torch.bfloat16] == 2 * weights
        assert counts[statistic][torch.float32] == counts["signed"][torch.float32] - weights


def test_relevance_is_never_widened_on_its_way() -> None:
    """Statistics in float32 of a bfloat16 model: its weights are not converted for the gradients that go on."""
    model, batch = build("llama").to(torch.bfloat16), batch_for("llama")
    with _Multiplied() as multiplied:
        lrp_prune.attribute(model, [batch], matmul_dtype="float32", statistic="abs_token")
    assert multiplied.counts[torch.float32] == 7 * model.config.num_hidden_layers


@pytest.mark.parametrize("multiplied", ["auto", None, "float16"])
@pytest.mark.parametrize(("target", "scale"), [("mean", 1.0), ("next_token", 200.0)])
def test_squares_neither_vanish_nor_overflow_in_float16(target: str, scale: float, multiplied: str | None) -> None:
    """Gradients of a mean over many tokens; activations in the hundreds."""
    exact, half = build("llama"), build("llama")
    for model in (exact, half):
        with torch.no_grad():
            for layer in model.model.layers:
                layer.post_attention_layernorm.weight.mul_(scale)
    batch = batch_for("llama", samples=8, tokens=128)
    options: dict[str, Any] = {"composite": "epsilon", "statistic": "squared_token", "target": target}
    if target == "mean":
        options["target"] = lambda model, batch: -model(**batch, labels=batch["input_ids"], use_cache=False).loss
    expected = lrp_prune.attribute(exact, [batch], **options, matmul_dtype=None)
    relevance = lrp_prune.attribute(half.to(torch.float16), [batch], **options, matmul_dtype=multiplied)
    for name in expected:
        error = (relevance[name] - expected[name]).norm() / expected[name].norm()
        assert error < 0.1, name
