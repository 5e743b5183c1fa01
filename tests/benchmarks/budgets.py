"""Which budget of each tensor keeps most of a model: one ranking with a floor, all alike, outliers, spectra, or measured.

    python tests/benchmarks/budgets.py                          # fourteen trained models, one seed, two sparsities
    python tests/benchmarks/budgets.py --cases mlp cnn --report

The models, data and scores are those of panel.py, whose trained models are taken from its folder if they are there. Scores are
made by a method, the budget says how much of each tensor goes, and what is kept is scaled as by default, in one round. What is
done already is read from ``--output``.
"""

import argparse
import copy
import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

import lrp_prune
from lrp_prune import Scope
from lrp_prune.pruning import budgets

sys.path.append(str(Path(__file__).resolve().parents[2]))
from tests.benchmarks.panel import trained_model
from tests.benchmarks.panel_data import Data
from tests.benchmarks.panel_models import cases
from tests.benchmarks.panel_training import Case, score_of

METHODS = ("lrp", "wanda", "magnitude")
CASES = (
    "mlp", "regression", "lstm", "cnn", "resnet", "depthwise", "encoder", "vit", "bert-sure", "distilbert", "bert-tags", "t5",
    "llama", "mixture",
)  # fmt: skip
BUDGETS = ("one ranking, floor 0.5", "all alike", "outliers", "spectra", "measured")


def pruned(case: Case, model: nn.Module, data: Data, method: str, name: str, sparsity: float) -> nn.Module:
    """A pruned copy."""
    model = copy.deepcopy(model).eval()
    sparsities: Any = sparsity
    scope: str | Scope = Scope("layer")
    which = {"include": case.include, "progress": False}
    if name == BUDGETS[0]:
        scope = Scope("global", floor=0.5)
    elif name == "outliers":
        sparsities = budgets.outlier_weighted(model, data.reference, sparsity, method=method, **which)
    elif name == "spectra":
        sparsities = budgets.heavy_tailed(model, sparsity, include=case.include)
    elif name == "measured":
        sparsities = budgets.measured(model, data.reference[:2], sparsity, method=method, **which)
    lrp_prune.prune(model, data.reference, sparsities, method, scope, rounds=1, unruled="ignore", **which)
    return model


def run(chosen: list[str], sparsities: list[float], output: Path, models: Path, seed: int) -> None:
    """Do what is missing."""
    known = set(done(output))
    by_name = {case.name: case for case in cases()}
    todo = [
        (case, method, budget, sparsity)
        for case in chosen
        for method in METHODS
        for budget in BUDGETS
        for sparsity in sparsities
        if (case, method, budget, sparsity, seed) not in known
    ]
    output.parent.mkdir(parents=True, exist_ok=True)
    held: tuple[Any, ...] = (None,)
    for name, method, budget, sparsity in tqdm(todo, unit="row", dynamic_ncols=True):
        case = by_name[name]
        if held[0] != name:
            model, data = trained_model(case, seed, models)
            held = (name, model, data, score_of(case, model, data.held_out))
        _, model, data, dense = held
        torch.manual_seed(seed)
        score = score_of(case, pruned(case, model, data, method, budget, sparsity), data.held_out)
        chance = case.chance() if callable(case.chance) else case.chance
        share = max((score - chance) / (dense - chance), 0.0)
        row = {"case": name, "method": method, "budget": budget, "sparsity": sparsity, "seed": seed, "share": share}
        with output.open("a") as file:
            file.write(json.dumps(row) + "\n")


def done(output: Path) -> dict[tuple[str, str, str, float, int], float]:
    """What is known already."""
    lines = output.read_text().splitlines() if output.exists() else []
    names = ("case", "method", "budget", "sparsity", "seed")
    return {tuple(row[name] for name in names): row["share"] for row in map(json.loads, lines)}


def report(output: Path) -> str:
    """Means over models, and the worst, of those cases that are done for every budget."""
    shares: dict[tuple[str, str, float], dict[tuple[str, int], float]] = defaultdict(dict)
    for (case, method, budget, sparsity, seed), share in done(output).items():
        shares[method, budget, sparsity][case, seed] = share
    sparsities = sorted({key[2] for key in shares})
    lines = ["| scores | budget | " + " | ".join(f"{value:.0%}" for value in sparsities) + " |"]
    lines.append("|---" * (2 + len(sparsities)) + "|")
    for method in METHODS:
        for budget in BUDGETS:
            cells = []
            for sparsity in sparsities:
                every = [shares[method, other, sparsity] for other in BUDGETS]
                common = set.intersection(*(set(entry) for entry in every))
                found = [shares[method, budget, sparsity][key] for key in common]
                cells.append(f"{sum(found) / len(found):.3f} ({min(found):.2f})" if found else "")
            lines.append(f"| {method} | {budget} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=[case.name for case in cases()])
    parser.add_argument("--sparsities", nargs="+", type=float, default=[0.7, 0.9])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--models", type=Path, default=Path("outputs/panel/models"), help="trained models of panel.py")
    parser.add_argument("--output", type=Path, default=Path("outputs/budgets/results.jsonl"))
    parser.add_argument("--report", action="store_true", help="only the table of what there is")
    options = parser.parse_args()
    if not options.report:
        run(options.cases, options.sparsities, options.output, options.models, options.seed)
    print(report(options.output))


if __name__ == "__main__":
    main()
