"""How many rounds, and on which schedule, a training should be pruned in: the evidence for what the pages recommend.

    python tests/benchmarks/rounds.py                # six models of the panel, two seeds; half an hour
    python tests/benchmarks/rounds.py --cases mlp

Each way has the same training altogether, a whole first training's epochs at half its rate, divided among its rounds, and ends at
the same sparsity. "once" scores a single time, before the first round, and goes down that ranking by the same schedule.
A score is the share of the dense model's advantage over chance that is kept on data that nothing else has seen.
"""

import argparse
import copy
import logging
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

import lrp_prune
from lrp_prune.pruning import sparsity_schedule

sys.path.append(str(Path(__file__).resolve().parents[2]))
from tests.benchmarks.panel import trained_model
from tests.benchmarks.panel_data import Data
from tests.benchmarks.panel_models import cases
from tests.benchmarks.panel_training import Case, score_of, train

WAYS = {
    "1 round": ("one_shot", 1, True),
    "2 rounds, cubic": ("cubic", 2, True),
    "4 rounds, cubic": ("cubic", 4, True),
    "4 rounds, linear": ("linear", 4, True),
    "4 rounds, exponential": ("exponential", 4, True),
    "4 rounds, cubic, scored once": ("cubic", 4, False),
    "8 rounds, cubic": ("cubic", 8, True),
}
"""Name -> schedule, rounds, and whether each round scores again."""
CASES = ("mlp", "regression", "cnn", "resnet", "depthwise", "encoder")


def pruned(
    case: Case, model: nn.Module, data: Data, sparsity: float, way: tuple[str, int, bool], seed: int
) -> nn.Module:
    """A copy that was pruned and trained in that way."""
    schedule, rounds, again = way
    model, masks, relevance = copy.deepcopy(model).eval(), None, None
    options: dict[str, Any] = {"recalibrate": False, "progress": False, "unruled": "ignore", "rounds": 1}
    for number, target in enumerate(sparsity_schedule(schedule, sparsity, rounds), 1):
        if relevance is None or again:
            relevance = lrp_prune.attribute(model.eval(), data.reference, unruled="ignore")
        masks = lrp_prune.prune(model, data.reference, target, existing=masks, relevance=relevance, **options)
        for _ in train(case, model, data.train, case.epochs / rounds, case.rate / 2, seed + 100 * number):
            masks.apply_(model)
    return model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=list(CASES), help="models of the panel")
    parser.add_argument("--seeds", type=int, default=2, help="how many seeds, of data and models")
    parser.add_argument("--models", type=Path, default=Path("outputs/panel/models"), help="folder of trained models")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger("lrp_prune").setLevel(logging.WARNING)
    torch.set_num_threads(1)
    by_name = {case.name: case for case in cases()}
    found: dict[tuple[str, float], list[float]] = {}
    todo = [(by_name[name], seed) for name in given.cases for seed in range(given.seeds)]
    for case, seed in tqdm(todo, unit="model", dynamic_ncols=True):
        model, data = trained_model(case, seed, given.models)
        chance = case.chance() if callable(case.chance) else case.chance
        dense = score_of(case, model, data.held_out) - chance
        for name, way in WAYS.items():
            for sparsity in (0.8, 0.9, 0.95):
                score = score_of(case, pruned(case, model, data, sparsity, way, seed), data.held_out) - chance
                found.setdefault((name, sparsity), []).append(max(score / dense, 0.0))
    print("| | 80 % | 90 % | 95 % |\n|---|---|---|---|")
    for name in WAYS:
        cells = [f"{np.mean(found[name, s]):.3f} ({min(found[name, s]):.2f})" for s in (0.8, 0.9, 0.95)]
        print(f"| {name} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
