"""Prunes a panel of trained models by every method, and says what is left of each: the evidence for a default.

    python tests/benchmarks/panel.py --quick                 # ten minutes: one seed, one shot, few methods, no SmolLM2
    python tests/benchmarks/panel.py                         # three seeds, one shot and in rounds with training; hours, resumable
    python tests/benchmarks/panel.py --report                # table and figures of what there is

A score is the share of the dense model's advantage over chance that is kept: 1 is the dense model, 0 is chance, and less counts
as 0. Everything is judged on data that neither the training nor the pruning has seen. Rounds are four, with a quarter of the
first training's epochs after each, at half its rate.
"""

import argparse
import copy
import itertools
import json
import logging
import math
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

import lrp_prune
from lrp_prune import Scope, pruning
from lrp_prune.pruning import sparsity_schedule
from lrp_prune.targets import Inferred

sys.path.append(str(Path(__file__).resolve().parents[2]))
from tests.benchmarks.panel_data import Data
from tests.benchmarks.panel_models import cases
from tests.benchmarks.panel_report import figure, overview, table
from tests.benchmarks.panel_training import Case, score_of, train

SPARSITIES = (0.3, 0.5, 0.7, 0.8, 0.9)
TRAINED_SPARSITIES = (0.8, 0.9)
ROUNDS = 4
METHODS: dict[str, dict[str, Any]] = {
    "lrp": {},
    "lrp, one round": {"rounds": 1},
    "lrp, not recalibrated": {"recalibrate": False},
    "lrp, by log-probabilities": {"odds": 0},
    "lrp, by log-odds": {"odds": 1},
    "lrp, compensated": {"compensation": "exact"},
    "lrp, compensated column by column": {"compensation": "obs"},
    "lrp, compensated to its own inputs": {"compensation": pruning.LeastSquares(dense=0.0)},
    "lrp, compensated to the dense model's inputs": {"compensation": pruning.LeastSquares(dense=1.0)},
    "lrp, compensated by weighted tokens": {"compensation": pruning.LeastSquares(weights="relevance")},
    "lrp, no floor, not recalibrated": {"scope": Scope(floor=0.0), "recalibrate": False},
    "lrp, by row, not recalibrated": {"scope": "row", "recalibrate": False},
    "gradient": {"method": "gradient"},
    "wanda": {"method": "wanda"},
    "wanda, not recalibrated": {"method": "wanda", "recalibrate": False},
    "magnitude": {"method": "magnitude"},
    "wanda, compensated": {"method": "wanda", "compensation": "exact"},
    "magnitude, not recalibrated": {"method": "magnitude", "recalibrate": False},
    "magnitude, global": {"method": "magnitude", "scope": Scope("global", floor=0.0)},
    "magnitude, global, not recalibrated": {
        "method": "magnitude",
        "scope": Scope("global", floor=0.0),
        "recalibrate": False,
    },
    "magnitude, global, compensated": {
        "method": "magnitude",
        "scope": Scope("global", floor=0.0),
        "compensation": "exact",
    },
    "random": {"method": "random"},
}
"""What is compared, each with the arguments of :func:`lrp_prune.prune` beside its defaults, and ``odds`` of the target."""
TRAINED_METHODS = (
    "lrp", "lrp, not recalibrated", "wanda", "wanda, not recalibrated", "magnitude, not recalibrated",
    "magnitude, global, not recalibrated", "random",
)  # fmt: skip

QUICK = ("lrp", "lrp, not recalibrated", "wanda", "magnitude", "random")
QUICK_SPARSITIES = (0.5, 0.8, 0.9)


@dataclass(frozen=True)
class Row:
    """One pruning of one model."""

    case: str
    seed: int
    method: str
    sparsity: float
    rounds: int


def rows(chosen: list[Case], methods: list[str], seeds: range, sparsities: list[float], trained: bool) -> Iterator[Row]:
    """All rows, those of one trained model after each other; without sparsities for one shot those of rounds alone."""
    for case, seed in itertools.product(chosen, seeds):
        for method, sparsity in itertools.product(methods, sparsities):
            yield Row(case.name, seed, method, sparsity, 1)
        for method, sparsity in itertools.product(methods if trained and case.epochs else (), TRAINED_SPARSITIES):
            if method in TRAINED_METHODS:
                yield Row(case.name, seed, method, sparsity, ROUNDS)


def trained_model(case: Case, seed: int, folder: Path) -> tuple[nn.Module, Data]:
    """A model of the panel, trained once."""
    data = case.data(seed)
    torch.manual_seed(seed)
    model, path = case.build(), folder / f"{case.name}-{seed}.pt"
    if not case.epochs:
        return model.eval(), data
    if path.exists():
        model.load_state_dict(torch.load(path, weights_only=True))
        return model.eval(), data
    for _ in train(case, model, data.train, case.epochs, case.rate, seed):
        pass
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(model.state_dict(), path)
    return model.eval(), data


def _with_odds(model: nn.Module, data: Data, odds: float) -> Any:
    """The target that is inferred, with another share of log-odds if it has any."""
    target = Inferred(tells=False).decide(model, data.reference[0])
    return type(target)(odds=odds) if hasattr(target, "odds") else target


def pruned(case: Case, model: nn.Module, data: Data, row: Row) -> tuple[nn.Module, float]:
    """A pruned copy, and the seconds that pruning took."""
    model, masks, seconds = copy.deepcopy(model).eval(), None, 0.0
    for number, sparsity in enumerate(sparsity_schedule("cubic", row.sparsity, row.rounds), 1):
        options: dict[str, Any] = {**case.options, **METHODS[row.method]}
        if case.include is not None:
            options["include"] = case.include
        method = options.get("method", "lrp")
        odds = options.pop("odds", None)
        own = (
            {"target": case.target if odds is None else _with_odds(model, data, odds)}
            if method in ("lrp", "gradient")
            else {"seed": row.seed}
            if method == "random"
            else {}
        )
        options["method"] = pruning.METHODS[method](**own)
        before, start = masks, time.perf_counter()
        masks = lrp_prune.prune(
            model.eval(), data.reference, sparsity, unruled="ignore", existing=before, progress=False, **options
        )
        seconds += time.perf_counter() - start
        if row.rounds > 1:
            for _ in train(case, model, data.train, case.epochs / ROUNDS, case.rate / 2, row.seed + 100 * number):
                masks.apply_(model)
    return model.eval(), seconds


def run(todo: list[Row], results: Path, models: Path) -> None:
    """Do the rows that are missing, one line of results each."""
    known, by_name = done(results), {case.name: case for case in cases()}
    held: tuple[Any, ...] = (None, None, None, None)
    for row in tqdm([row for row in todo if row not in known], unit="row", dynamic_ncols=True):
        if held[0] != (row.case, row.seed):
            model, data = trained_model(by_name[row.case], row.seed, models)
            held = ((row.case, row.seed), model, data, score_of(by_name[row.case], model, data.held_out))
        case, (_, model, data, dense) = by_name[row.case], held
        sparse, seconds = pruned(case, model, data, row)
        score = score_of(case, sparse, data.held_out)
        chance = case.chance() if callable(case.chance) else case.chance
        share = (score - chance) / (dense - chance) if math.isfinite(score) else 0.0
        with results.open("a") as file:
            file.write(json.dumps({**asdict(row), "share": max(share, 0.0), "dense": dense, "seconds": seconds}) + "\n")


def done(results: Path) -> dict[Row, dict[str, Any]]:
    """What is known already."""
    lines = results.read_text().splitlines() if results.exists() else []
    found = [json.loads(line) for line in lines]
    return {Row(**{name: entry[name] for name in Row.__dataclass_fields__}): entry for entry in found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one seed, one shot, five methods, three sparsities")
    parser.add_argument("--cases", nargs="+", choices=[case.name for case in cases()], help="models; all by default")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), help="all by default")
    parser.add_argument("--sparsities", nargs="+", type=float, choices=SPARSITIES, help="in one shot; all by default")
    part = parser.add_mutually_exclusive_group()
    part.add_argument("--one-shot", action="store_true", help="no rounds with training")
    part.add_argument("--trained", action="store_true", help="rounds with training alone")
    parser.add_argument("--seeds", type=int, default=3, help="how many seeds, of data and models")
    parser.add_argument("--first-seed", type=int, default=0, help="the first of them")
    parser.add_argument("--report", action="store_true", help="only table and figures of what there is")
    parser.add_argument(
        "--output", type=Path, default=Path("outputs/panel"), help="folder of models, results and figures"
    )
    parser.add_argument("--results", type=Path, help="file of results, which goes on; by default one in that folder")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger("lrp_prune").setLevel(logging.WARNING)
    torch.set_num_threads(1)
    results = arguments.results or arguments.output / "results.jsonl"
    arguments.output.mkdir(parents=True, exist_ok=True)
    if not arguments.report:
        quick = arguments.quick
        chosen = [case for case in cases() if case.name in (arguments.cases or ()) or not arguments.cases]
        if quick and not arguments.cases:
            chosen = [case for case in chosen if case.epochs]
        methods = arguments.methods or list(QUICK if quick else METHODS)
        sparsities = arguments.sparsities or list(QUICK_SPARSITIES if quick else SPARSITIES)
        first, number = arguments.first_seed, 1 if quick else arguments.seeds
        one_shot = [] if arguments.trained else sparsities
        todo = rows(chosen, methods, range(first, first + number), one_shot, not (quick or arguments.one_shot))
        run(list(todo), results, arguments.output / "models")
    found = list(done(results).values())
    print(table(found))
    if any(entry["rounds"] == 1 for entry in found):  # which they are of
        one = overview(found, arguments.output / "overview.png")
        print(f"figures: {one}, {figure(found, arguments.output / 'panel.png')}")


if __name__ == "__main__":
    main()
