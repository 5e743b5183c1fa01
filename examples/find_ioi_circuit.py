"""Finds the circuit of a task in a language model and says how good it is, by several methods.

By default indirect object identification ("Then, Mary and John went to the store. John gave a drink to" -> " Mary") in
SmolLM2-135M-Instruct, with MLP neurons as nodes. The stages: (1) load, (2) split templates and names into those to discover with
and those held out, (3) rank all neurons by each method, (4) keep the best ones of each size and ablate the rest, by their
activations in the counterfactual prompt and by zeros, (5) write a report and the best circuit, (6) with `--gates`, learn the
circuit from the best ranking on. A task of your own is a CSV or JSON file (`--task`).
"""

import argparse
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning
import torch
from language_model import PACKAGED_MODEL, load_model
from presenting import IN_TERMINAL, aligned, quiet, stage
from torch import nn

from lrp_prune import Random, circuits, tasks

Results = dict[str, circuits.EvaluationResult]
START = time.monotonic()
METHODS = {
    "attnlrp": "attnlrp",
    "gradient": "gradient",
    "relp": "relp",
    "attribution patching": "attribution_patching",
    "attribution patching, IG": "attribution_patching_ig",
    "gate IG": "gate_ig",
    "activation": "activation",
    "wanda": "wanda",
    "random": "random",
}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--model", default=PACKAGED_MODEL, help="the packaged model, or a causal model's hub name or folder")
    add("--task", default="ioi", help="ioi, greater-than, pronoun, or a CSV or JSON file with a task of your own")
    add("--granularity", default="neuron", help="what a node is: neuron head attention_neuron block")
    default = ["attnlrp", "gradient", "relp", "attribution patching", "attribution patching, IG", "gate IG", "random"]
    add("--methods", nargs="+", choices=METHODS, default=default, help="what is compared in one shot")
    add("--rounds-of", choices=METHODS, default="attribution patching", help="the method that is also run in rounds")
    add("--rounds", type=int, default=4, help="rounds of it; 0 leaves it out")
    add("--ablations", nargs="+", default=["counterfactual", "zero"], help="what the rest is replaced by")
    add("--sizes", nargs="+", type=float, default=[0.05, 0.1, 0.2, 0.5, 1.0], help="shares of nodes that are kept")
    add("--samples", type=int, default=48, help="prompts to discover with")
    add("--held-out", type=int, default=16, help="prompts of each seed to measure on")
    add("--held-out-share", type=float, default=0.3, help="share of templates and names that are held out")
    add("--seeds", type=int, default=4, help="draws of held-out prompts, for intervals")
    add("--batch-size", type=int, default=16, help="prompts that are computed at once")
    add("--gates", action="store_true", help="also learn the circuit with gates, for each ablation; takes longer")
    add("--gates-from", choices=METHODS, default="attribution patching", help="the ranking that gates start from")
    add("--gate-samples", type=int, default=768, help="prompts that gates are trained on, from those to discover with")
    add("--gate-batch-size", type=int, default=8, help="prompts in each training step")
    add("--steps", type=int, default=450, help="training steps of the gates")
    add("--kl-weight", type=float, default=0.05, help="of the divergence from the full model in the gates' objective")
    add("--answers-weight", type=float, default=1.0, help="of telling answers from distractors in it")
    add("--density", type=float, default=0.075, help="expected share of gates that are not closed; fewer end up open")
    add("--seed", type=int, default=0, help="of prompts, of what is held out, and of the gates")
    add("--output", type=Path, default=Path("outputs/ioi-circuit"), help="folder for reports, tables and circuits")
    add("--quick", action="store_true", help="few prompts and methods: shows in a minute that everything runs")
    options = parser.parse_args(arguments)
    if options.quick:
        options.samples = options.held_out = options.gate_samples = 8
        options.seeds, options.steps, options.methods = 2, 2, ["attnlrp", "random"]
        options.rounds = min(options.rounds, 2)
    return options


def load_task(tokenizer: Any, options: argparse.Namespace) -> tuple[tasks.Task, tasks.Task]:
    """The prompts to discover with, and the held-out ones, which share neither templates nor names with them."""
    path, parts = Path(options.task), {"held_out": options.held_out_share, "seed": options.seed}
    if path.suffix == ".csv":
        return tasks.TableTask.from_csv(tokenizer, path).split(**parts)
    if path.suffix == ".json":
        return tasks.TableTask.from_json(tokenizer, path).split(**parts)
    kinds = {"ioi": tasks.IndirectObject, "greater-than": tasks.GreaterThan, "pronoun": tasks.GenderedPronoun}
    if options.task not in kinds:
        raise SystemExit(f"--task must be one of {', '.join(kinds)}, or a .csv or .json file, got {options.task!r}")
    return (
        kinds[options.task](tokenizer, samples=options.samples, seed=options.seed).split(**parts)[0],
        kinds[options.task](tokenizer, samples=options.held_out, seed=options.seed).split(**parts)[1],
    )


def rank(
    model: nn.Module, task: tasks.Task, name: str, ablation: str, options: argparse.Namespace, **more: Any
) -> circuits.Ranking:
    """All nodes by importance, by one method."""
    start = time.monotonic()
    ranking = circuits.discover(
        model,
        task,
        options.granularity,
        Random(options.seed) if name == "random" else METHODS[name],
        ablation=ablation,
        batch_size=options.batch_size,
        **more,
    )
    print(f"  {name}: {time.monotonic() - start:.1f} s", flush=True)
    return ranking


def learn(
    model: nn.Module, task: tasks.Task, start: circuits.Ranking, ablation: str, options: argparse.Namespace
) -> circuits.GateTraining:
    """Learns which nodes to keep, beginning with those that a ranking puts first."""
    torch.manual_seed(options.seed)
    gates = circuits.GateTraining(
        model,
        task.resampled(options.seed + 1, options.gate_samples),
        options.granularity,
        ablation=ablation,
        objective={"kl": options.kl_weight, "answers": options.answers_weight},
        density=options.density,
        warm_start=start,
        batch_size=options.gate_batch_size,
        remember=True,
    )
    trainer = lightning.Trainer(
        max_steps=options.steps,
        max_epochs=-1,
        accelerator="cpu",
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=IN_TERMINAL,
    )
    trainer.fit(gates)
    return gates


def find(
    model: nn.Module,
    task: tasks.Task,
    ablation: str,
    options: argparse.Namespace,
    earlier: Mapping[str, circuits.Ranking],
) -> dict[str, circuits.Ranking]:
    """Rankings by every method; of those for an earlier ablation, the ones that do not depend on it are taken."""
    stage(f"ranking every {options.granularity}, for {ablation} ablation")
    same = {name: ranking for name, ranking in earlier.items() if "ablation" not in ranking.description}
    found = {name: same.get(name) or rank(model, task, name, ablation, options) for name in options.methods}
    if options.rounds:
        # The last round scores what the smallest circuit is chosen from.
        rounds = {"rounds": options.rounds, "density": min(2 * min(filter(None, options.sizes)), 0.9)}
        stage(f"ranking by {options.rounds_of} in {options.rounds} rounds, {ablation} ablation")
        name = f"{options.rounds_of}, {options.rounds} rounds"
        found[name] = rank(model, task, options.rounds_of, ablation, options, **rounds)
    if options.gates:
        stage(f"learning gates from {options.gates_from}, {ablation} ablation")
        start = found.get(options.gates_from) or rank(model, task, options.gates_from, ablation, options)
        found[f"gates from {options.gates_from}"] = learn(model, task, start, ablation, options).ranking()
    return found


def table(results: Results, sizes: list[float]) -> str:
    """Accuracy and faithfulness by size, and the areas, as a markdown table; ± is half the 95 % interval over seeds."""
    first = next(iter(results.values()))
    head = [f"{size:.3g} %" for size in (100 * size for size in sizes if size < 1)]
    lines = [
        f"full model: accuracy {float(first.full['accuracy'].mean()):.3f}, everything ablated: "
        f"{float(first.empty['accuracy'].mean()):.3f}",
        "| accuracy / faithfulness with this share kept | " + " | ".join(head) + " | CPR | CMD |",
        "|---" * (len(head) + 3) + "|",
    ]
    for name, result in results.items():
        accuracy, accuracy_half = result.mean("accuracy"), result.interval("accuracy")
        cells = [
            f"{accuracy[index]:.2f} ± {accuracy_half[index]:.2f} / {result.faithfulness[index]:.2f} ± "
            f"{result.faithfulness_interval[index]:.2f}"
            for index, size in enumerate(sizes)
            if size < 1
        ]
        areas = [f"{result.cpr:.3f} ± {result.cpr_interval:.3f}", f"{result.cmd:.3f} ± {result.cmd_interval:.3f}"]
        lines.append(f"| {name} | " + " | ".join([*cells, *areas]) + " |")
    return aligned("\n".join(lines).replace("nan", "-"))


def smallest(results: Results, sizes: list[float], share: float = 0.95) -> tuple[str, float] | None:
    """The method and size of the smallest circuit that keeps that share of the full model's accuracy."""
    good = [
        (size, -float(result.mean("accuracy")[index]), name)
        for name, result in results.items()
        for index, size in enumerate(sizes)
        if float(result.mean("accuracy")[index]) >= share * float(result.full["accuracy"].mean())
    ]
    return (min(good)[2], min(good)[0]) if good else None


def measure(
    model: nn.Module,
    rankings: Mapping[str, circuits.Ranking],
    held_out: tasks.Task,
    ablation: str,
    options: argparse.Namespace,
) -> Results:
    """Evaluates all rankings on the same draws of held-out prompts."""
    return circuits.compare(
        model,
        rankings,
        held_out,
        options.sizes,
        ablation,
        seeds=range(1, options.seeds + 1),
        complements=False,
        batch_size=options.batch_size,
    )


def main() -> None:
    options = parse()
    quiet()
    stage(f"loading {options.model}")
    model, tokenizer = load_model(options.model)
    model.requires_grad_(False)
    train, held_out = load_task(tokenizer, options)
    example = held_out.samples[0].prompt
    print(f"{len(train)} prompts to discover with, {options.seeds} x {len(held_out)} to measure on, for example")
    print(f"  {example.clean!r} -> {example.answers[0]!r}\n  {example.counterfactual!r} (counterfactual)")
    options.output.mkdir(parents=True, exist_ok=True)
    rankings: dict[str, circuits.Ranking] = {}
    for ablation in options.ablations:
        rankings = find(model, train, ablation, options, rankings)
        stage(f"measuring under {ablation} ablation")
        results = measure(model, rankings, held_out, ablation, options)
        text = table(results, options.sizes)
        print(text)
        best = smallest(results, options.sizes)
        kept = {name: ranking.at(best[1] if best else min(options.sizes)) for name, ranking in rankings.items()}
        if best:
            name, size = best
            print(f"95 % of the accuracy is kept by {size:.3g} of the nodes, by {name}: {kept[name]}")
            kept[name].save(options.output / f"{ablation}.safetensors")
        report = options.output / f"{ablation}.html"
        circuits.save_report(
            report,
            results,
            kept,
            title=f"{Path(options.task).stem}: circuits of {options.granularity}s, {ablation} ablation",
        )
        (options.output / f"{ablation}.md").write_text(text + "\n", encoding="utf-8")
        print(f"report: {report}")
    stage("done")


if __name__ == "__main__":
    main()
