"""Compares how circuits of each method do a task, by size: accuracy, faithfulness, and the areas CPR and CMD.

    python tests/benchmarks/circuits.py                                                   # everything; takes many hours
    python tests/benchmarks/circuits.py --methods attnlrp "attnlrp, 6 rounds" --granularities neuron --seeds 0

Each seed draws its own names and templates to discover circuits with and others to measure them on; the intervals in the
table are those of the mean over seeds. Each result is appended to the file of results as soon as it is there and not computed
again, so that a run can be stopped and continued.
"""

import argparse
import json
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from sys import path
from typing import Any, cast

import torch
from lightning.pytorch import Trainer
from torch import nn

from lrp_prune import tasks
from lrp_prune.circuits import NODE_METHODS, GateIG, GateTraining, NodeMethod, Ranking, discover, evaluate
from lrp_prune.circuits.result import half_interval
from lrp_prune.pruning import Method

path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))
import language_model

SIZES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.1, 0.2, 0.5, 1.0)
"""MIB's, and 3 %."""
TASKS = {
    "ioi": tasks.IndirectObject,
    "greater-than": tasks.GreaterThan,
    "pronoun": tasks.GenderedPronoun,
}
GRANULARITIES = {
    "neuron": ["mlp_neuron"],
    "head": ["head"],
    "attention_neuron": ["attention_neuron"],
    "block": ["attention_block", "mlp_block"],
    "weight": [],
}
MADE_WITH = ("model", "samples", "sizes", "batch_size", "steps", "density")
"""The options beside what the table shows that results depend on."""
_PATCHING = ("attribution_patching", "attribution_patching_ig", "gate_ig", "relp")


@dataclass(frozen=True)
class Setting:
    """One way to find circuits: options of ``discover``, or of ``GateTraining`` with a ranking to start from."""

    options: dict[str, Any] = field(default_factory=dict)
    gates: bool = False
    objective: Mapping[str, float] = field(default_factory=lambda: {"kl": 1.0})
    start: str | None = None

    @property
    def depends_on_ablation(self) -> bool:
        return self.gates or self.options.get("rounds", 1) > 1 or isinstance(self.options.get("method"), GateIG)


def chosen(method: str, **options: Any) -> Method:
    """A method by its name, with something chosen."""
    return replace(cast(Any, NODE_METHODS[method]), **options)


def settings() -> dict[str, Setting]:
    """The table's rows, by name."""
    rows = {name: Setting({"method": method}) for name, method in NODE_METHODS.items()}
    for method in ("attnlrp", "cp_lrp", "gradient", *_PATCHING):
        for statistic in ("signed", "abs_sample", "abs_token"):
            rows[f"{method}, {statistic}"] = Setting({"method": chosen(method, statistic=statistic)})
        ranked = {"method": chosen(method, statistic="signed"), "order": "signed"}
        rows[f"{method}, signed ranking"] = Setting(ranked)
    for method in ("attnlrp", "cp_lrp", "gradient", "attribution_patching", "gate_ig", "relp"):
        for rounds in (3, 6, 12):
            rows[f"{method}, {rounds} rounds"] = Setting(
                {"method": NODE_METHODS[method], "rounds": rounds, "density": 0.02}
            )
    for steps in (2, 5):
        rows[f"gate_ig, {steps} steps"] = Setting({"method": GateIG(steps=steps)})
        signed = {"method": GateIG(statistic="signed", steps=steps), "order": "signed"}
        rows[f"gate_ig, {steps} steps, signed ranking"] = Setting(signed)
    rows["gates"] = Setting(gates=True)
    for method in ("attnlrp", "gradient", "attribution_patching", "gate_ig", "relp"):
        rows[f"gates from {method}"] = Setting(gates=True, start=method)
        rows[f"gates for answers from {method}"] = Setting(
            gates=True, objective={"answers": 1.0, "kl": 0.05}, start=method
        )
    return rows


def fits(setting: Setting, granularity: str) -> bool:
    """Whether a row has this granularity: weights have neither counterfactuals nor gates."""
    method = setting.options.get("method")
    return granularity != "weight" or not (setting.gates or isinstance(method, NodeMethod))


def find(
    setting: Setting, model: nn.Module, task: tasks.Task, granularity: str, ablation: str, options: argparse.Namespace
) -> Ranking:
    """All nodes by importance."""
    if not setting.gates:
        return discover(
            model, task, granularity, **{"ablation": ablation, "batch_size": options.batch_size, **setting.options}
        )
    start = None
    if setting.start is not None:
        start = discover(model, task, granularity, setting.start, ablation=ablation, batch_size=options.batch_size)
    gates = GateTraining(
        model,
        task,
        GRANULARITIES[granularity],
        ablation=ablation,
        objective=setting.objective,
        density=options.density,
        warm_start=start,
        batch_size=options.batch_size,
        remember=True,
    )
    trainer = Trainer(
        max_steps=options.steps,
        max_epochs=-1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        limit_val_batches=0,
    )
    trainer.fit(gates)
    return gates.ranking()


class Results:
    """A file of results, one JSON object a line, of which those that were made with the same options count."""

    def __init__(self, file: Path, made_with: dict[str, Any]) -> None:
        self.file, self.made_with = file, made_with
        rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
        self.rows = {self.key(row): row for row in rows if row["made_with"] == made_with}

    @staticmethod
    def key(row: dict[str, Any]) -> tuple[Any, ...]:
        return tuple(row[name] for name in ("task", "granularity", "ablation", "method", "seed"))

    def add(self, row: dict[str, Any]) -> None:
        self.rows[self.key(row)] = row
        with self.file.open("a") as lines:
            lines.write(json.dumps(row) + "\n")

    def table(self, task: str, granularity: str, ablation: str, names: Iterable[str], sizes: Sequence[float]) -> str:
        """Means over seeds with half their 95 % intervals, as a markdown table: accuracy by size, areas, seconds."""
        lines = [
            "| method | " + " | ".join(f"{size:.1%}" for size in sizes) + " | CPR | CMD | seconds |",
            "|---" * (len(sizes) + 4) + "|",
        ]
        for name in names:
            rows = [row for key, row in sorted(self.rows.items()) if key[:4] == (task, granularity, ablation, name)]
            if not rows:
                continue
            accuracies = [
                _mean([row["accuracy"][row["fractions"].index(size)] for row in rows if size in row["fractions"]])
                for size in sizes
            ]
            cells = [*accuracies, _mean([row["cpr"] for row in rows]), _mean([row["cmd"] for row in rows])]
            seconds = sum(row["seconds"] for row in rows) / len(rows)
            lines.append(f"| {name} | " + " | ".join(cells) + f" | {seconds:.0f} |")
        return "\n".join(lines)


def _mean(values: list[float]) -> str:
    if not values:
        return ""
    tensor = torch.tensor(values, dtype=torch.float64)
    half = f" ± {float(half_interval(tensor)):.3f}" if len(values) > 1 else ""
    return f"{float(tensor.mean()):.3f}{half}"


def measure(
    name: str,
    setting: Setting,
    model: nn.Module,
    parts: tuple[tasks.Task, tasks.Task],
    granularity: str,
    ablations: Sequence[str],
    options: argparse.Namespace,
) -> Iterable[dict[str, Any]]:
    """One row for each ablation; a method that does not know it finds its circuits once."""
    ranking, seconds = None, 0.0
    for ablation in ablations:
        if ranking is None or setting.depends_on_ablation:
            start = time.perf_counter()
            ranking = find(setting, model, parts[0], granularity, ablation, options)
            seconds = time.perf_counter() - start
        result = evaluate(
            model, ranking, parts[1], options.sizes, ablation, complements=False, batch_size=options.batch_size
        )
        figures = result.to_dict()
        yield {
            "granularity": granularity,
            "ablation": ablation,
            "method": name,
            "seconds": round(seconds, 1),
            "fractions": list(options.sizes),
            "accuracy": figures["circuits"]["accuracy"],
            **{
                key: figures[key]
                for key in ("sizes", "total", "circuits", "faithfulness", "cpr", "cmd", "full", "empty")
            },
        }


def run(model: nn.Module, tokenizer: Any, options: argparse.Namespace) -> Results:
    """Everything that is asked for and not yet in the file of results."""
    results = Results(options.results, {name: getattr(options, name) for name in MADE_WITH})
    rows = settings()
    for seed in options.seeds:
        parts = TASKS[options.task](tokenizer, samples=options.samples, seed=seed).split(seed=seed)
        for granularity in options.granularities:
            allowed = ["zero"] if granularity == "weight" else options.ablations
            for name in options.methods:
                if not fits(rows[name], granularity):
                    continue
                fixed = {"task": options.task, "seed": seed, "made_with": results.made_with}
                keys = {a: (options.task, granularity, a, name, seed) for a in allowed}
                missing = [ablation for ablation in allowed if keys[ablation] not in results.rows]
                torch.manual_seed(seed)
                for row in measure(name, rows[name], model, parts, granularity, missing, options):
                    results.add({**fixed, **row})
                    print(f"{granularity}, {row['ablation']}, {name}, seed {seed}: CPR {row['cpr']:.3f}", flush=True)
    return results


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    rows = settings()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--task", choices=TASKS, default="ioi", help="whose circuits")
    add("--methods", nargs="+", default=list(rows), help="rows of the table; --list prints them all")
    add("--granularities", nargs="+", choices=GRANULARITIES, default=["neuron", "head"], help="what a node is")
    add("--ablations", nargs="+", default=["counterfactual", "zero", "mean"], help="what the rest is replaced by")
    add("--seeds", nargs="+", type=int, default=[0, 1, 2], help="of prompts and of what is held out")
    add("--sizes", nargs="+", type=float, default=list(SIZES), help="shares of the nodes that are kept")
    add("--samples", type=int, default=128, help="prompts to discover with, and as many to measure on")
    add("--batch-size", type=int, default=16, help="prompts in a batch")
    add("--steps", type=int, default=450, help="optimizer steps of the gates")
    add("--density", type=float, default=0.075, help="expected share of gates that are not closed; fewer end up open")
    add("--model", default=language_model.PACKAGED_MODEL, help="the packaged model, or a hub name or folder")
    add("--results", type=Path, default=Path("outputs/circuits.jsonl"), help="file that results are appended to")
    add("--list", action="store_true", help="print the names of the rows and stop")
    options = parser.parse_args(arguments)
    unknown = set(options.methods) - set(rows)
    if unknown:
        parser.error(f"no such methods: {sorted(unknown)}; --list prints those that there are")
    return options


def main() -> None:
    options = parse()
    if options.list:
        print("\n".join(settings()))
        return
    options.results.parent.mkdir(parents=True, exist_ok=True)
    model, tokenizer = language_model.load_model(options.model)
    results = run(model, tokenizer, options)
    for granularity in options.granularities:
        for ablation in ["zero"] if granularity == "weight" else options.ablations:
            print(f"\n{options.task}, {granularity}, {ablation} ablation: accuracy by the share of nodes kept")
            print(results.table(options.task, granularity, ablation, options.methods, options.sizes))


if __name__ == "__main__":
    main()
