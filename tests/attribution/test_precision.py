"""In which precision statistics are multiplied, activations are kept, and relevance passes weights."""

from collections import Counter
from typing import Any

import torch
from small_models import batch_for, build
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import lrp_prune


def test_bfloat16_products_are_close_and_the_sums_are_float32() -> None:
    model, batch = build("llama"), batch_for("llama")
    exact = lrp_prune.attribute(model, [batch], statistic="squared_token", matmul_dtype=None)
    fast = lrp_prune.attribute(model, [batch], statistic="squared_token", matmul_dtype="bfloat16")
    for name in exact:
        assert fast[name].dtype == torch.float32
        torch.testing.assert_close(fast[name], exact[name], rtol=0.03, atol=1e-3 * float(exact[name].max()))


def test_what_is_kept_for_backward_is_in_the_precision_that_is_multiplied() -> None:
    """Queries, keys and values share one copy of their activation, and it has half the bytes."""
    model, batch = build("llama"), batch_for("llama")
    kept: dict[torch.dtype, set[int]] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept.setdefault(tensor.dtype, set()).add(tensor.untyped_storage()._cdata)
        held.append(tensor)
        return tensor

    numbers = {}
    for dtype in (None, "bfloat16"):
        held: list[Tensor] = []
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            relevance = lrp_prune.attribute(model, [batch], matmul_dtype=dtype, statistic="squared_token")
        numbers[dtype] = len(kept.get(torch.bfloat16, ()))
    layers = model.config.num_hidden_layers
    assert numbers == {None: 0, "bfloat16": 4 * layers}  # the inputs of q, k, v; of o; of gate, up; of down
    exact = lrp_prune.attribute(model, [batch], matmul_dtype=None, statistic="squared_token")
    for name, values in relevance.items():
        torch.testing.assert_close(values, exact[name], rtol=0.05, atol=0.01 * float(exact[name].max()))


class _Multiplied(TorchDispatchMode):
    """Counts matrix products by the precision of their operands."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[torch.dtype] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.bmm, torch.ops.aten.addmm):
            self.counts[args[-1].dtype] += 1
        return func(*args, **(kwargs or {}))


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
