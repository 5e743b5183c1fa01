"""What local reconstruction adds to masks and to compensation, without labels: the evidence for what the pages say.

    python tests/benchmarks/reconstruction.py --cases mlp cnn encoder --seeds 2      # some minutes

Trained models of the panel are pruned by the default method, all with the same masks, and judged on data that nothing else has
seen: the share of the dense model's advantage over chance. Each way sees the first 16 batches that the model was trained on.
"""

import argparse
import copy
import logging
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

import lrp_prune
from lrp_prune.pruning.compensation import LeastSquares, compensate_

sys.path.append(str(Path(__file__).resolve().parents[2]))
from tests.benchmarks.panel import trained_model
from tests.benchmarks.panel_models import cases
from tests.benchmarks.panel_training import score_of

WAYS = ("masks alone", "least squares", "reconstruction", "least squares, then reconstruction")


def adjusted(model: nn.Module, masks: lrp_prune.Masks, batches: list, way: str, steps: int) -> nn.Module:
    """A copy under the masks, in one of the ways."""
    model = copy.deepcopy(model).eval()
    if way == "masks alone":
        masks.apply_(model)
    elif way == "least squares":
        compensate_(model, masks, batches, LeastSquares())
    else:
        compensation = "exact" if way.startswith("least") else None
        lrp_prune.reconstruct(model, masks, batches, steps=steps, compensation=compensation, progress=False)
    return model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=["mlp", "cnn", "encoder"], help="models of the panel")
    parser.add_argument("--seeds", type=int, default=2, help="how many seeds, of data and models")
    parser.add_argument("--steps", type=int, default=200, help="for each block")
    parser.add_argument("--sparsities", nargs="+", type=float, default=[0.7, 0.8, 0.9], help="shares that are pruned")
    parser.add_argument("--models", type=Path, default=Path("outputs/panel/models"), help="folder of trained models")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger("lrp_prune").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    by_name = {case.name: case for case in cases()}
    for name in given.cases:
        case, found, seconds = by_name[name], dict[tuple[str, float], list[float]](), dict[str, float]()
        for seed in tqdm(range(given.seeds), desc=name, dynamic_ncols=True):
            model, data = trained_model(case, seed, given.models)
            chance = case.chance() if callable(case.chance) else case.chance
            dense = score_of(case, model, data.held_out) - chance
            relevance = lrp_prune.attribute(model, data.reference, unruled="ignore")
            for sparsity in given.sparsities:
                masks = lrp_prune.select(relevance, sparsity)
                for way in WAYS:
                    begun = time.perf_counter()
                    made = adjusted(model, masks, data.train[:16], way, given.steps)
                    seconds[way] = seconds.get(way, 0.0) + time.perf_counter() - begun
                    kept = (score_of(case, made, data.held_out) - chance) / dense
                    found.setdefault((way, sparsity), []).append(max(kept, 0.0))
        print(f"\n| {name} | " + " | ".join(f"{100 * sparsity:g} %" for sparsity in given.sparsities) + " | seconds |")
        print("|---|" + "---|" * (len(given.sparsities) + 1))
        for way in WAYS:
            cells = [f"{np.mean(found[way, s]):.3f} ({min(found[way, s]):.3f})" for s in given.sparsities]
            each = seconds[way] / given.seeds / len(given.sparsities)
            print(f"| {way} | " + " | ".join(cells) + f" | {each:.1f} |", flush=True)


if __name__ == "__main__":
    main()
