"""Compares what pruning by each method and setting costs a language model in perplexity, next to SparseGPT and Wanda.

    python tests/benchmarks/compression.py                       # everything; takes hours on two cores
    python tests/benchmarks/compression.py --settings default "gradient squared_token, global" --sparsities 0.5 --seeds 0

All settings see the same calibration windows and are measured on the same held-out windows. Each result is appended to
the file of results as soon as it is there and not computed again, so that a run can be stopped and continued. `wanda
(paper)` and `sparsegpt` are the independent implementations in sparsegpt.py; everything else is the package.
"""

import argparse
import json
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from sys import path

import torch
from torch import Tensor, nn
from tqdm import tqdm

import lrp_prune
from lrp_prune import LRP, Method, Relevance, Scope
from lrp_prune.pruning import Masks, scorer
from lrp_prune.pruning.compensation import compensate_, compensation_of
from lrp_prune.pruning.methods import method_of

path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))
path.append(str(Path(__file__).resolve().parents[2]))
import language_model

from tests.benchmarks import sparsegpt

Batches = list[dict[str, Tensor]]


@dataclass(frozen=True)
class Setting:
    """One way to prune: how weights are scored and selected, in how many rounds without training, and how compensated."""

    method: str | Method
    scope: Scope | None = None
    rounds: int = 1
    compensation: str | None = None

    @property
    def key(self) -> str:
        """What settings that differ only in their selection share."""
        return str(self.method)


def settings() -> dict[str, Setting]:
    """The table's rows, by name."""
    per_row, raw, normalized = Scope("row"), Scope("global", floor=0.0), Scope("global", floor=0.0, normalize="mean")
    rows = {
        "default": Setting("lrp"),
        "wanda": Setting("wanda"),
        "gradient": Setting("gradient"),
        "magnitude": Setting("magnitude"),
        "random": Setting("random"),
    }
    for composite in ("attnlrp", "cp_lrp"):
        rows[f"{composite} geometric, global"] = Setting(LRP(composite, "geometric"), raw)
    for composite in ("epsilon", "attnlrp", "cp_lrp", "gradient"):
        for statistic in ("signed", "abs_sample", "abs_token", "squared_token"):
            for name, scope in (("row", per_row), ("global", raw), ("global, normalised", normalized)):
                rows[f"{composite} {statistic}, {name}"] = Setting(LRP(composite, statistic), scope)
    rows["default, compensated"] = Setting("lrp", compensation="exact")
    rows["default, compensated column by column"] = Setting("lrp", compensation="obs")
    rows["default, first tokens left out"] = Setting(LRP(skip_first=1))
    for rounds in (2, 4):
        rows[f"default, {rounds} rounds"] = Setting("lrp", rounds=rounds)
    for scope in (per_row, raw):
        rows[f"attnlrp order with the gradient's scale, {scope.compared}"] = Setting("mixed", scope)
    return rows


REFERENCES = {"sparsegpt": sparsegpt.sparsegpt, "wanda (paper)": sparsegpt.wanda}


def score(setting: Setting, model: nn.Module, reference: Batches) -> Relevance:
    """Collects the relevance that a setting selects by."""
    if setting.method == "mixed":
        order = score(Setting(LRP("attnlrp", "squared_token")), model, reference)
        scale = score(Setting(LRP("gradient", "squared_token")), model, reference)
        return Relevance(
            {name: order[name] * (scale[name].mean() / order[name].mean()) for name in order}, derived=True
        )
    scores = scorer(setting.method, model)
    for batch in tqdm(reference, desc=str(setting.method), leave=False):
        scores.update(batch)
    return scores.compute()


def select(setting: Setting, relevance: Relevance, sparsity: float, existing: Masks | None = None) -> Masks:
    """Selects with the setting's options, or with the method's defaults where it names none."""
    scope = setting.scope or method_of(setting.method).scope
    return lrp_prune.select(relevance, sparsity, scope, existing=existing)


def prune_in_rounds(setting: Setting, model: nn.Module, reference: Batches, sparsity: float) -> None:
    """Prunes in equal ratios of what is kept, scoring the pruned model again before each round."""
    masks: Masks | None = None
    for number in range(1, setting.rounds + 1):
        target = 1 - (1 - sparsity) ** (number / setting.rounds)
        masks = select(setting, score(setting, model, reference), target, masks)
        masks.apply_(model)


class Results:
    """A file of results, one JSON object a line."""

    def __init__(self, file: Path) -> None:
        self.file = file
        lines = file.read_text().splitlines() if file.exists() else []
        self.perplexity = {(r["name"], r["sparsity"], r["seed"]): r["perplexity"] for r in map(json.loads, lines)}

    def add(self, name: str, sparsity: float, seed: int, perplexity: float, seconds: float) -> None:
        self.perplexity[name, sparsity, seed] = perplexity
        row = {"name": name, "sparsity": sparsity, "seed": seed, "perplexity": perplexity, "seconds": round(seconds, 1)}
        with self.file.open("a") as lines:
            lines.write(json.dumps(row) + "\n")
        tqdm.write(f"{name}, {sparsity:.0%}, seed {seed}: {perplexity:.2f}")

    def table(self, names: Iterable[str], sparsities: list[float]) -> str:
        """Writes the mean over the calibration seeds, and each seed's value behind it, as a markdown table."""
        lines = ["| method | " + " | ".join(f"{sparsity:.0%}" for sparsity in sparsities) + " |"]
        lines.append("|---" * (1 + len(sparsities)) + "|")
        for name in names:
            cells = []
            for sparsity in sparsities:
                values = [value for (n, s, _), value in sorted(self.perplexity.items()) if (n, s) == (name, sparsity)]
                cells.append(f"{mean(values):.2f} ({', '.join(f'{v:.2f}' for v in values)})" if values else "")
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
        return "\n".join(lines)


def groups(names: Iterable[str], rows: dict[str, Setting]) -> Iterator[list[str]]:
    """Groups the names of settings that can share one collection of relevance."""
    by_key: dict[str, list[str]] = {}
    for name in names:
        setting = rows.get(name)
        shared = setting is not None and setting.rounds == 1
        by_key.setdefault(rows[name].key if shared else name, []).append(name)
    yield from by_key.values()


def main() -> None:
    rows = settings()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--settings", nargs="+", default=[*REFERENCES, *rows], help="rows of the table; --list prints them all")
    add("--sparsities", nargs="+", type=float, default=[0.5, 0.6, 0.3], help="fractions of the weights to remove")
    add("--seeds", nargs="+", type=int, default=[0, 1, 2], help="seeds of the choice of calibration windows")
    add("--calibration-windows", type=int, default=32, help="windows of 512 tokens to calibrate on")
    add("--held-out-windows", type=int, default=24, help="windows of other documents to measure on")
    add("--model", default=language_model.PACKAGED_MODEL, help="the packaged model, or a hub name or folder")
    add("--results", type=Path, default=Path("outputs/compression.jsonl"), help="file that results are appended to")
    add("--list", action="store_true", help="print the names of the settings and stop")
    options = parser.parse_args()
    if options.list:
        print("\n".join([*REFERENCES, *rows]))
        return
    unknown = set(options.settings) - set(rows) - set(REFERENCES)
    if unknown:
        parser.error(f"no such settings: {sorted(unknown)}; --list prints those that there are")

    options.results.parent.mkdir(parents=True, exist_ok=True)
    results = Results(options.results)
    model, tokenizer = language_model.load_model(options.model)
    calibration, held_out = language_model.split_documents(language_model.load_documents())
    test = language_model.windows(held_out, tokenizer, options.held_out_windows)
    dense = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    if ("dense", 0.0, 0) not in results.perplexity:
        results.add("dense", 0.0, 0, language_model.perplexity(model, test), 0.0)

    for seed in options.seeds:
        ids = language_model.windows(calibration, tokenizer, options.calibration_windows, seed=seed)
        reference = language_model.batches(ids, 1)
        for group in groups(options.settings, rows):
            relevance: Relevance | None = None
            for name in group:
                for sparsity in options.sparsities:
                    if (name, sparsity, seed) in results.perplexity:
                        continue
                    torch.manual_seed(seed)
                    start = time.perf_counter()
                    if name in REFERENCES:
                        REFERENCES[name](model, ids, sparsity)
                    elif rows[name].rounds > 1:
                        prune_in_rounds(rows[name], model, reference, sparsity)
                    else:
                        relevance = relevance if relevance is not None else score(rows[name], model, reference)
                        masks, way = select(rows[name], relevance, sparsity), compensation_of(rows[name].compensation)
                        masks.apply_(model) if way is None else compensate_(
                            model, masks, language_model.batches(ids, 4), way
                        )
                    seconds = time.perf_counter() - start
                    results.add(name, sparsity, seed, language_model.perplexity(model, test), seconds)
                    model.load_state_dict(dense)
    print(results.table(["dense"], [0.0]))
    print(results.table(options.settings, sorted(options.sparsities)))


if __name__ == "__main__":
    main()
