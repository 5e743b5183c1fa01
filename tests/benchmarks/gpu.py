"""What collecting, selecting and pruning cost on a GPU, next to a forward and backward with weight gradients.

    python tests/benchmarks/gpu.py --sizes 135m 1b 7b

Llama models of those shapes with random weights in bfloat16, a batch of 4 windows of 512 tokens. Both sides are warmed up and
alternate on the same batch; given is the median of the ratios of the pairs. Memory is the peak of the allocator above the
model's own weights. Selecting is the exact choice of half of all scored weights, globally, with its bit-packed masks.
"""

import argparse
import gc
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
import transformers

import lrp_prune
from lrp_prune.pruning import scorer

SHAPES: dict[str, dict[str, int]] = {
    "135m": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
             "num_key_value_heads": 3, "vocab_size": 49152},
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
           "num_key_value_heads": 8, "vocab_size": 128256},
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
           "num_key_value_heads": 32, "vocab_size": 32000},
}  # fmt: skip
GIB = 1 << 30


def llama(shape: dict[str, int]) -> Any:
    """A model on the card, made there in bfloat16."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cuda"):
            return transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape)).eval()
    finally:
        torch.set_default_dtype(before)


def seconds(step: Callable[[], Any]) -> float:
    """Of a step and all that it starts on the card."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    step()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def peak(step: Callable[[], Any]) -> tuple[Any, float]:
    """What a step gives, and how far it raises the memory in use, in GiB."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = step()
    torch.cuda.synchronize()
    return result, (torch.cuda.max_memory_allocated() - before) / GIB


def collecting(model: Any, batch: Any, pairs: int) -> tuple[lrp_prune.Relevance, list[str]]:
    """Seconds and peaks of a forward and backward, and of collecting from the same batch; and what was collected."""

    def plain() -> None:
        loss = model(**batch, use_cache=False).loss
        model.zero_grad(set_to_none=True)
        loss.backward()

    plain()
    plain_peak = peak(plain)[1] + sum(p.grad.nbytes for p in model.parameters() if p.grad is not None) / GIB
    model.zero_grad(set_to_none=True)
    sums, held = peak(lambda: scorer("lrp", model))
    _, rise = peak(lambda: sums.update(batch))
    times: dict[str, list[float]] = {"plain": [], "collect": []}
    for _ in range(pairs):
        times["plain"].append(seconds(plain))
        model.zero_grad(set_to_none=True)
        times["collect"].append(seconds(lambda: sums.update(batch)))
    ratio = median(b / a for a, b in zip(times["plain"], times["collect"], strict=True))
    cells = [f"{median(times['plain']):.3f}", f"{median(times['collect']):.3f}", f"{ratio:.2f}"]
    return sums.compute(), [*cells, f"{plain_peak:.1f}", f"{held + rise:.1f}"]


def selecting(relevance: lrp_prune.Relevance) -> list[str]:
    """Seconds and peak of choosing half of all weights."""
    took = seconds(lambda: lrp_prune.select(relevance, 0.5))
    return [f"{took:.2f}", f"{peak(lambda: lrp_prune.select(relevance, 0.5))[1]:.2f}"]


def pruning(model: Any, batch: Any) -> list[str]:
    """Seconds and peak of pruning half of the weights from two batches, in one shot without recalibration."""
    start = time.perf_counter()
    rise = peak(lambda: lrp_prune.prune(model, [batch, batch], 0.5, recalibrate=False))[1]
    return [f"{time.perf_counter() - start:.1f}", f"{rise:.1f}"]


def measure(size: str, pairs: int) -> str:
    """A row of the table."""
    torch.manual_seed(0)
    model = llama(SHAPES[size])
    weights = torch.cuda.memory_allocated() / GIB
    ids = torch.randint(0, SHAPES[size]["vocab_size"], (4, 512), device="cuda")
    batch = {"input_ids": ids, "labels": ids}
    relevance, cells = collecting(model, batch, pairs)
    cells += selecting(relevance)
    del relevance
    return " | ".join([f"| {size}", f"{weights:.1f}", *cells, *pruning(model, batch)]) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=list(SHAPES), default=["135m", "1b"])
    parser.add_argument("--pairs", type=int, default=8)
    options = parser.parse_args()
    print(torch.cuda.get_device_name(), f"torch {torch.__version__}, transformers {transformers.__version__}")
    print(
        "| model | weights, GiB | forward and backward, s | collecting, s | ratio | peak above, GiB | peak above, GiB | "
        "selecting, s | peak above, GiB | prune, s | peak above, GiB |\n" + "|---" * 11 + "|"
    )
    for size in options.sizes:
        print(measure(size, options.pairs), flush=True)
        gc.collect()
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
