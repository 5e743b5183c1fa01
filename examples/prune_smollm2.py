"""Prunes a language model from start to end and shows what each step costs in perplexity.

By default SmolLM2-135M-Instruct, calibrated on some State of the Union speeches and measured on others. The stages: (1)
load, (2) measure the dense model, (3) prune it in one shot by each method at several sparsities, (4) prune and
fine-tune in rounds through Lightning's `Trainer` with `RelevancePruning`, (5) save, reload with
`AutoModelForCausalLM.from_pretrained`, and check that every pruned weight is still zero.
"""

import argparse
import re
import time
from collections import defaultdict
from pathlib import Path

import lightning
import torch
from language_model import (
    PACKAGED_MODEL,
    PACKAGED_TEXT,
    batches,
    load_documents,
    load_model,
    perplexity,
    split_documents,
    windows,
)
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import AutoModelForCausalLM, PreTrainedModel

import lrp_prune
from lrp_prune.callbacks import RelevancePruning, Rounds
from lrp_prune.pruning import METHODS, scorer

Batch = dict[str, Tensor]
Results = dict[tuple[str, float], float]
START = time.monotonic()


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--model", default=PACKAGED_MODEL, help="the packaged model, or a causal model's hub name or folder")
    add("--dataset", default=PACKAGED_TEXT, help="the packaged speeches, or a hub data set's name")
    add("--dataset-config", default=None, help="configuration of the hub data set")
    add(
        "--dataset-split",
        default="train",
        help="split of the hub data set; it is split again into calibration and held out",
    )
    add("--text-column", default="text", help="column of the hub data set that holds the text")
    add(
        "--methods",
        nargs="+",
        default=["lrp", "wanda", "magnitude"],
        help="what to compare: lrp wanda gradient magnitude random",
    )
    add(
        "--sparsities",
        nargs="+",
        type=float,
        default=[0.3, 0.5, 0.6],
        help="fractions of weights to remove in one shot",
    )
    add(
        "--sparsity", type=float, default=0.5, help="fraction of weights removed after the last prune / fine-tune round"
    )
    add("--rounds", type=int, default=2, help="prune / fine-tune rounds; 0 leaves them out")
    add("--steps", type=int, default=5, help="training steps in each round")
    add("--learning-rate", type=float, default=5e-5, help="of AdamW in the rounds")
    add("--calibration-windows", type=int, default=10, help="windows of text that the relevance is collected on")
    add("--held-out-windows", type=int, default=8, help="windows of other documents that the perplexity is measured on")
    add("--window", type=int, default=512, help="tokens in a window")
    add("--batch-size", type=int, default=2, help="windows that are computed at once")
    add("--seed", type=int, default=0, help="of the choice of windows and of the training")
    add(
        "--output",
        type=Path,
        default=Path("outputs/smollm2-pruned"),
        help="folder for the pruned model, table and plot",
    )
    add("--quick", action="store_true", help="a few short windows and steps: shows in two minutes that everything runs")
    options = parser.parse_args()
    if options.quick:
        options.calibration_windows = options.held_out_windows = options.steps = 2
        options.window, options.sparsities = 128, [options.sparsity]
    options.sparsities = sorted({*options.sparsities, options.sparsity})
    return options


def stage(text: str) -> None:
    print(f"\n[{time.monotonic() - START:4.0f} s] {text}", flush=True)


def collect(method: str, model: PreTrainedModel, reference: list[Batch]) -> lrp_prune.Relevance:
    """Scores every weight of the model by one method."""
    scores = scorer(method, model)
    for batch in tqdm(reference, desc=f"scoring by {method}", leave=False):
        scores.update(batch)
    return scores.compute()


class FineTuning(lightning.LightningModule):
    """An ordinary fine-tuning of a causal language model; it knows nothing of pruning."""

    def __init__(self, model: PreTrainedModel, learning_rate: float) -> None:
        super().__init__()
        self.model = model
        self.learning_rate = learning_rate

    def training_step(self, batch: Batch, batch_index: int) -> Tensor:
        loss: Tensor = self.model(**batch, use_cache=False).loss
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.learning_rate)


def fine_tune(
    model: PreTrainedModel, reference: list[Batch], text: list[Batch], options: argparse.Namespace
) -> lrp_prune.Masks:
    """Prunes in rounds, each followed by an epoch of training, and returns the masks of the last round."""
    pruning = RelevancePruning(
        sparsity=options.sparsity,
        rounds=Rounds(options.rounds, start=0),
        schedule="linear",
        reference=reference,
    )
    trainer = lightning.Trainer(
        max_epochs=options.rounds,
        callbacks=[pruning],
        accelerator="cpu",
        gradient_clip_val=1.0,
        log_every_n_steps=1,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    model.train()
    trainer.fit(FineTuning(model, options.learning_rate), DataLoader(text, batch_size=None, shuffle=True))
    model.eval()
    return pruning.masks


def check_zeros(model: nn.Module, masks: lrp_prune.Masks) -> str:
    """Counts the pruned weights in a model and makes sure that each is zero."""
    parameters = dict(model.named_parameters())
    wrong = [name for name, kept in masks.items() if parameters[name][~kept].count_nonzero()]
    if wrong:
        raise RuntimeError(f"{len(wrong)} tensors have pruned weights that are not zero, the first is {wrong[0]!r}")
    removed = sum(int((~kept).sum()) for kept in masks.values())
    total = sum(kept.numel() for kept in masks.values())
    return f"{removed:,} of {total:,} weights ({removed / total:.2%}) are zero"


def sparsity_by_layer(masks: lrp_prune.Masks) -> dict[str, dict[int, float]]:
    """Sorts the sparsity of each tensor by its kind (`q_proj`, ...) and by its depth, the first number in its name."""
    kinds: dict[str, dict[int, float]] = defaultdict(dict)
    for name, kept in masks.items():
        depth = re.search(r"\.(\d+)\.", name)
        if depth:
            kinds[name.removesuffix(".weight").rsplit(".", 1)[-1]][int(depth[1])] = 1 - kept.float().mean().item()
    return kinds


def table(dense: float, results: Results, tuned: float | None, options: argparse.Namespace) -> str:
    """Writes the perplexities as a markdown table."""
    lines = [
        "| method | " + " | ".join(f"{sparsity:.0%}" for sparsity in options.sparsities) + " |",
        "|---" * (1 + len(options.sparsities)) + "|",
        "| dense, nothing removed | " + " | ".join([f"{dense:.2f}"] * len(options.sparsities)) + " |",
    ]
    for method in options.methods:
        cells = [f"{results[method, sparsity]:.2f}" for sparsity in options.sparsities]
        lines.append(f"| {method}, one shot | " + " | ".join(cells) + " |")
    if tuned is not None:
        cells = [f"{tuned:.2f}" if sparsity == options.sparsity else "" for sparsity in options.sparsities]
        lines.append(f"| lrp, {options.rounds} rounds of {options.steps} training steps | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(
    dense: float, results: Results, tuned: float | None, masks: lrp_prune.Masks, options: argparse.Namespace
) -> Figure:
    """Draws the perplexity by sparsity and method, and the sparsity by layer of the LRP mask."""
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.axhline(dense, color="black", linewidth=1, linestyle="dashed", label="dense")
    for method in options.methods:
        values = [results[method, sparsity] for sparsity in options.sparsities]
        left.plot([0, *options.sparsities], [dense, *values], marker="o", label=method)
    if tuned is not None:
        left.plot(
            [options.sparsity], [tuned], marker="*", markersize=13, linestyle="", label="lrp, fine-tuned in rounds"
        )
    left.set(xlabel="sparsity", ylabel="perplexity on held-out text", yscale="log", title="Perplexity by sparsity")
    left.legend()
    for kind, depths in sparsity_by_layer(masks).items():
        order = sorted(depths)
        right.plot(order, [depths[depth] for depth in order], marker=".", label=kind)
    right.set(xlabel="layer", ylabel="sparsity", ylim=(0, 1), title="Sparsity by layer")
    right.legend(ncols=2, fontsize="small")
    return figure


def main() -> None:
    options = parse()
    lightning.seed_everything(options.seed, verbose=False)
    options.output.mkdir(parents=True, exist_ok=True)

    stage(f"loading {options.model} and {options.dataset}")
    model, tokenizer = load_model(options.model)
    documents = load_documents(options.dataset, options.dataset_config, options.dataset_split, options.text_column)
    calibration, held_out = split_documents(documents)
    test = windows(held_out, tokenizer, options.held_out_windows, options.window)
    reference = batches(
        windows(calibration, tokenizer, options.calibration_windows, options.window, options.seed), options.batch_size
    )
    text = batches(
        windows(calibration, tokenizer, options.steps * options.batch_size, options.window, options.seed + 1000),
        options.batch_size,
    )
    print(f"{len(calibration)} documents to calibrate on, {len(held_out)} held out")

    stage("measuring the dense model")
    dense = perplexity(model, test, options.batch_size)
    print(f"perplexity {dense:.2f}")

    weights = {name: weight.detach().clone() for name, weight in model.state_dict().items()}
    results: Results = {}
    shown: lrp_prune.Masks | None = None
    for method in options.methods:
        stage(f"pruning in one shot by {method}")
        relevance = collect(method, model, reference)
        for sparsity in options.sparsities:
            masks = lrp_prune.select(relevance, sparsity, METHODS[method].scope)
            masks.apply_(model)
            results[method, sparsity] = perplexity(model, test, options.batch_size)
            model.load_state_dict(weights)
            print(f"{masks.sparsity:.0%} removed: perplexity {results[method, sparsity]:.2f}")
            if method == options.methods[0] and sparsity == options.sparsity:
                shown = masks

    assert shown is not None
    tuned = None
    if options.rounds:
        stage(f"{options.rounds} rounds of pruning and {options.steps} training steps")
        shown = fine_tune(model, reference, text, options)
        tuned = perplexity(model, test, options.batch_size)
        print(f"{shown.sparsity:.0%} removed: perplexity {tuned:.2f}")
    else:
        shown.apply_(model)

    stage(f"saving to {options.output} and loading it again")
    model.save_pretrained(options.output)
    tokenizer.save_pretrained(options.output)
    loaded = AutoModelForCausalLM.from_pretrained(options.output)
    print(check_zeros(loaded, shown))

    text_table = table(dense, results, tuned, options)
    (options.output / "perplexity.md").write_text(text_table + "\n")
    plot(dense, results, tuned, shown, options).savefig(options.output / "pruning.png", dpi=120)
    stage(f"perplexity on held-out text (also in perplexity.md; the plot is pruning.png, both in {options.output})")
    print(text_table)


if __name__ == "__main__":
    main()
