"""Measures what collecting relevance costs next to a plain forward and backward with weight gradients.

    python tests/benchmarks/cost.py
    python tests/benchmarks/cost.py --method gradient --batches 12

Each process has one thread; a batch is one window of 512 tokens, or --batch-size of them. The plain side clears the
gradients between forward and backward, as Lightning's automatic optimization does, so that those of the step before are
there during the forward, as the sums of a collection are. Time: both sides are warmed up and alternate on the same
batches, the first of a pair by turns; given is the median of the ratios of the pairs with its 95 % interval (order
statistics). Memory: the peak resident set of a process of its own for each side, the model included, after both loaded
it in the same way; given as well for a plain side that accumulates gradients, and one that clears them before the
forward. Selection and the keeping of masks are measured in selection.py and keeping.py. Linux only: the peak is read
from `/proc/self/status`.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

# Before torch is imported: two processes that each spin one thread per core slow each other down many times over.
os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"
os.environ["OMP_WAIT_POLICY"] = "passive"
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))

import language_model
import torch

from lrp_prune.pruning import METHODS, scorer

Step = Callable[[int], Any]


def peak_megabytes() -> float:
    """The largest resident set of this process since the last reset."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM:")) / 1024


def median_interval(values: list[float]) -> tuple[float, float, float]:
    """The median, and the order statistics that hold it with a probability of at least 95 % (or the extremes)."""
    ordered, n = sorted(values), len(values)
    rank = 0
    while rank + 1 <= n // 2 and 2 * sum(math.comb(n, k) for k in range(rank + 1)) / 2**n <= 0.05:
        rank += 1
    low = max(rank - 1, 0)
    return median(ordered), ordered[low], ordered[n - 1 - low]


def steps(options: argparse.Namespace) -> dict[str, Step]:
    """Collecting from a batch, and a plain forward and backward on the same batch, without and with accumulation."""
    model, tokenizer = language_model.load_model(options.model)
    calibration, _ = language_model.split_documents(language_model.load_documents())
    ids = language_model.windows(calibration, tokenizer, options.batches * options.batch_size)
    batches = language_model.batches(ids, options.batch_size)
    given = {"composite": options.composite, "statistic": options.statistic}
    chosen = {name: value for name, value in given.items() if value is not None}
    scores = scorer(METHODS[options.method](**chosen), model)

    def collect(index: int) -> None:
        scores.update(batches[index])

    def plain(index: int) -> None:
        loss = model(**batches[index], use_cache=False).loss
        model.zero_grad(set_to_none=True)
        loss.backward()

    def accumulate(index: int) -> None:
        model(**batches[index], use_cache=False).loss.backward()

    return {"collect": collect, "plain": plain, "accumulate": accumulate}


def times(options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of each side on each batch, alternately."""
    sides = {name: step for name, step in steps(options).items() if name != "accumulate"}
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for step in sides.values():
        step(0)
    for index in range(options.batches):
        for name in list(sides) if index % 2 else list(reversed(sides)):
            start = time.perf_counter()
            sides[name](index)
            seconds[name].append(time.perf_counter() - start)
    return seconds


def peak(options: argparse.Namespace) -> list[float]:
    """The peak of the first batch of one side alone, and of the first two."""
    step = steps(options)[options.worker]
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from what is held now
    peaks = []
    for index in range(2):
        step(index)
        peaks.append(peak_megabytes())
    return peaks


def run(worker: str, arguments: list[str]) -> Any:
    """Starts this file as a worker and reads its result from the last line."""
    command = [sys.executable, __file__, *arguments, "--worker", worker]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--method", default="lrp", help="whose collection: lrp, gradient or wanda")
    add("--composite", default=None, help="rules, for lrp; the method's default if not given")
    add("--statistic", default=None, help="for lrp and gradient; the method's default if not given")
    add("--batches", type=int, default=12, help="pairs that are timed, at least 2")
    add("--batch-size", type=int, default=1, help="windows in a batch")
    add("--model", default=language_model.PACKAGED_MODEL, help="the packaged model, or a hub name or folder")
    add("--worker", choices=["time", "collect", "plain", "accumulate"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        torch.set_num_threads(1)
        print(json.dumps(times(options) if options.worker == "time" else peak(options)))
        return
    seconds = run("time", sys.argv[1:])
    ratios = [a / b for a, b in zip(seconds["collect"], seconds["plain"], strict=True)]
    middle, low, high = median_interval(ratios)
    ours, theirs = (median(seconds[side]) for side in ("collect", "plain"))
    print(f"| {options.method} | collecting | forward and backward | ratio |\n|---|---|---|---|")
    print(f"| seconds a batch | {ours:.2f} | {theirs:.2f} | {middle:.3f} ({low:.3f} to {high:.3f}) |", flush=True)
    ours, plain, accumulating = (run(side, sys.argv[1:]) for side in ("collect", "plain", "accumulate"))
    rows = {
        "peak MB": (ours[1], plain[1]),
        "peak MB, gradients accumulate": (ours[1], accumulating[1]),
        "peak MB, gradients cleared before the forward": (ours[1], plain[0]),
    }
    for name, (a, b) in rows.items():
        print(f"| {name} | {a:.0f} | {b:.0f} | {a / b:.3f} |")


if __name__ == "__main__":
    main()
