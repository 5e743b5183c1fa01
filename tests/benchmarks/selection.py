"""Global selection of half of the weights against ``torch.nn.utils.prune.global_unstructured``: time and extra memory.

    python tests/benchmarks/selection.py --weights 100_000_000 --pairs 5

Each measurement is a process of its own (memory that one method returned to the allocator would hide the other's need),
on one thread; the two methods alternate. The time is that of the selection alone, masks included; the extra memory is
the rise of the process's peak above what it held before. Linux only: the peak is read from ``/proc/self/status``.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

METHODS = ("lrp_prune.select", "smallest", "global_unstructured")


def peak_mib() -> float:
    """The highest resident memory of this process so far."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) / 1024


def reset_peak() -> None:
    """Let the peak begin at what the process holds now."""
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")


def measure(method: str, weights: int, tensors: int) -> dict[str, float]:
    """Select half of ``weights`` random values in ``tensors`` layers, once, in this process."""
    import torch
    from torch import nn

    torch.set_num_threads(1)
    layers = [nn.Linear(1000, weights // tensors // 1000, bias=False) for _ in range(tensors)]
    generator = torch.Generator().manual_seed(0)
    for layer in layers:
        nn.init.normal_(layer.weight, generator=generator)
    total = sum(layer.weight.numel() for layer in layers)
    run, count = _prepared(method, layers)
    # One small run first, so that lazy imports and the allocator's start-up are in neither figure.
    _prepared(method, [nn.Linear(100, 100, bias=False)])[0]()
    reset_peak()
    before = peak_mib()
    start = time.perf_counter()
    result = run()
    seconds = time.perf_counter() - start
    extra = peak_mib() - before
    pruned = count(result)
    if pruned != total // 2:
        raise RuntimeError(f"{method} pruned {pruned} of {total}")
    return {"seconds": seconds, "mib": extra}


def _prepared(method: str, layers: Any) -> tuple[Callable[[], Any], Callable[[Any], int]]:
    from torch.nn.utils import prune

    from lrp_prune.pruning import select
    from lrp_prune.relevance import Relevance
    from lrp_prune.selection import bits
    from lrp_prune.selection.selection import smallest

    values = {f"{number}.weight": layer.weight.detach() for number, layer in enumerate(layers)}
    if method == "global_unstructured":
        parameters = [(layer, "weight") for layer in layers]
        return (
            lambda: prune.global_unstructured(parameters, pruning_method=prune.L1Unstructured, amount=0.5),
            lambda _: sum(int((layer.weight_mask == 0).sum()) for layer in layers),
        )
    if method == "smallest":
        tensors = list(values.values())
        total = sum(tensor.numel() for tensor in tensors)
        return lambda: smallest(
            tensors, total // 2
        ).masks(), lambda masks: total - sum(bits.count(mask) for mask in masks)
    relevance = Relevance(values, statistic="signed")
    return lambda: select(relevance, 0.5, scope="global"), lambda masks: masks.num_pruned


def main() -> None:
    """Measure interleaved and print medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=int, default=100_000_000, help="number of float32 weights")
    parser.add_argument("--tensors", type=int, default=20, help="number of layers they are in")
    parser.add_argument("--pairs", type=int, default=5, help="interleaved measurements of each method")
    parser.add_argument("--one", choices=METHODS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(arguments.one, arguments.weights, arguments.tensors)))
        return
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    size = ["--weights", str(arguments.weights), "--tensors", str(arguments.tensors)]
    results: dict[str, list[dict[str, float]]] = {method: [] for method in METHODS}
    for _ in range(arguments.pairs):
        for method in METHODS:
            command = [sys.executable, os.path.abspath(__file__), "--one", method, *size]
            output = subprocess.run(command, env=environment, capture_output=True, text=True)
            if output.returncode:
                raise SystemExit(output.stderr)
            results[method].append(json.loads(output.stdout.splitlines()[-1]))
    reference = results["global_unstructured"]
    print(f"50 % of {arguments.weights:,} float32 weights, global, {arguments.pairs} interleaved runs, median (range)")
    print(f"| {'':20} | {'seconds':>22} | {'ratio':>22} | {'extra MiB':>9} | ratio |")
    print("|---|---|---|---|---|")
    for method, runs in results.items():
        seconds = [run["seconds"] for run in runs]
        ratios = [run["seconds"] / other["seconds"] for run, other in zip(runs, reference, strict=True)]
        memory = statistics.median(run["mib"] for run in runs)
        share = statistics.median(run["mib"] / other["mib"] for run, other in zip(runs, reference, strict=True))
        print(f"| {method:20} | {_spread(seconds):>22} | {_spread(ratios):>22} | {memory:9.0f} | {share:.3f} |")


def _spread(values: list[float]) -> str:
    return f"{statistics.median(values):.3f} ({min(values):.3f} to {max(values):.3f})"


if __name__ == "__main__":
    main()
