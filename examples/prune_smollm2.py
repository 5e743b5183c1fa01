"""Prunes a language model from start to end and shows what each step costs in perplexity.

By default SmolLM2-135M-Instruct, calibrated on some State of the Union speeches and measured on others. The stages: (1)
load, (2) measure the dense model, (3) prune it in one shot by each method, and by LRP once more with what is kept
updated to make up for it, (4) prune and fine-tune in rounds through Lightning's `Trainer` with `RelevancePruning`, (5) save,
reload with `AutoModelForCausalLM.from_pretrained`, and check that every pruned weight is still zero.

As it stands it is short: one sparsity and few windows to calibrate on. `--full` makes the table of the README.
"""

import argparse
import sys
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
from perplexities import COMPENSATED, Results, Table, is_compensated, plot
from presenting import IN_TERMINAL, progress, quiet, stage
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, PreTrainedModel

import lrp_prune
from lrp_prune.callbacks import RelevancePruning, Rounds
from lrp_prune.pruning import METHODS, scorer

Batch = dict[str, Tensor]
SIZES = {
    "short": {
        "sparsities": [0.5],
        "calibration_windows": 4,
        "held_out_windows": 8,
        "window": 256,
        "steps": 2,
        "compensation": "exact",
    },
    "full": {
        "sparsities": [0.3, 0.5, 0.6],
        "calibration_windows": 10,
        "held_out_windows": 8,
        "window": 512,
        "steps": 5,
        "compensation": "exact",
    },
    "quick": {
        "sparsities": [0.5],
        "calibration_windows": 2,
        "held_out_windows": 2,
        "window": 128,
        "steps": 2,
        "compensation": "none",
    },
}
"""What is chosen for the three lengths of this script where nothing else is said."""


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--full", action="store_true", help="the table of the README: three sparsities, more windows and steps")
    add("--quick", action="store_true", help="a few short windows and steps: only shows that everything runs")
    add("--model", default=PACKAGED_MODEL, help="the packaged model, or a causal model's hub name or folder")
    add("--dataset", default=PACKAGED_TEXT, help="the packaged speeches, or a hub data set's name")
    add("--dataset-config", default=None, help="configuration of the hub data set")
    add("--dataset-split", default="train", help="split of the hub data set, split again to calibrate and to hold out")
    add("--text-column", default="text", help="column of the hub data set that holds the text")
    methods = ["lrp", "wanda", "magnitude"]
    add("--methods", nargs="+", choices=METHODS, default=methods, help="what is compared")
    add("--sparsities", nargs="+", type=float, help="fractions of weights to remove in one shot")
    add("--sparsity", type=float, default=0.5, help="fraction of weights removed after the last of the rounds")
    help_ = "update what LRP keeps at that sparsity to the dense layers' outputs"
    add("--compensation", choices=["exact", "obs", "none"], help=help_)
    add("--rounds", type=int, default=2, help="prune / fine-tune rounds; 0 leaves them out")
    add("--steps", type=int, help="training steps in each round")
    add("--learning-rate", type=float, default=5e-5, help="of AdamW in the rounds")
    add("--calibration-windows", type=int, help="windows of text that the relevance is collected on")
    add("--held-out-windows", type=int, help="windows of other documents that the perplexity is measured on")
    add("--window", type=int, help="tokens in a window")
    add("--batch-size", type=int, default=2, help="windows that are computed at once")
    add("--seed", type=int, default=0, help="of the choice of windows and of the training")
    add("--output", type=Path, default=Path("outputs/smollm2-pruned"), help="folder for model, table and plot")
    lengths, _ = parser.parse_known_args([each for each in arguments or sys.argv[1:] if each in ("--full", "--quick")])
    length = "quick" if lengths.quick else "full" if lengths.full else "short"
    parser.set_defaults(**SIZES[length])
    options = parser.parse_args(arguments)
    options.length = length
    options.sparsities = sorted({*options.sparsities, options.sparsity})
    return options


def introduction(options: argparse.Namespace) -> str:
    """Which run this is, so that its figures are not taken for those of another."""
    told = {
        "short": "The short run; --full makes the README's table (about fourteen minutes on two cores).",
        "full": "The full run, which makes the README's table (about fourteen minutes on two cores).",
        "quick": "The quick run, which shows that everything runs; its figures mean little.",
    }
    return (
        f"{told[options.length]}\nCalibrated on {options.calibration_windows} windows of {options.window} tokens, measured on "
        f"{options.held_out_windows} others."
    )


def collect(method: str, model: PreTrainedModel, reference: list[Batch]) -> lrp_prune.Relevance:
    """Scores every weight of the model by one method."""
    scores = scorer(method, model)
    for batch in progress(reference, f"scoring by {method}"):
        scores.update(batch)
    return scores.compute()


def compensate(
    model: PreTrainedModel, relevance: lrp_prune.Relevance, reference: list[Batch], options: argparse.Namespace
) -> None:
    """Prunes by relevance that is there, and updates what is kept to the least squares of what each layer gave."""
    lrp_prune.prune(
        model,
        reference,
        options.sparsity,
        "lrp",
        relevance=relevance,
        rounds=1,
        compensation=options.compensation,
        progress=IN_TERMINAL,
    )


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
        enable_progress_bar=IN_TERMINAL,
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


def main() -> None:
    options = parse()
    quiet()
    lightning.seed_everything(options.seed, verbose=False)
    options.output.mkdir(parents=True, exist_ok=True)
    print(introduction(options))

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

    table = Table(options)
    stage("pruning in one shot: perplexity on held-out text by the share of weights removed")
    print(table.head(), flush=True)
    dense = perplexity(model, test, options.batch_size)
    print(table.dense(dense), flush=True)
    weights = {name: weight.detach().clone() for name, weight in model.state_dict().items()}
    results: Results = {}
    shown: lrp_prune.Masks | None = None
    for method in options.methods:
        relevance = collect(method, model, reference)
        for sparsity in options.sparsities:
            masks = lrp_prune.select(relevance, sparsity, METHODS[method].scope)
            masks.apply_(model)
            results[method, sparsity] = perplexity(model, test, options.batch_size)
            model.load_state_dict(weights)
            if method == options.methods[0] and sparsity == options.sparsity:
                shown = masks
        print(table.one_shot(method, results), flush=True)
        if method == "lrp" and is_compensated(options):
            compensate(model, relevance, reference, options)
            results[COMPENSATED, options.sparsity] = perplexity(model, test, options.batch_size)
            model.load_state_dict(weights)
            print(table.compensated(results), flush=True)

    assert shown is not None
    tuned = None
    if options.rounds:
        stage(f"{options.rounds} rounds of pruning and {options.steps} training steps")
        shown = fine_tune(model, reference, text, options)
        tuned = perplexity(model, test, options.batch_size)
    else:
        shown.apply_(model)

    stage(f"saving to {options.output} and loading it again")
    model.save_pretrained(options.output)
    tokenizer.save_pretrained(options.output)
    loaded = AutoModelForCausalLM.from_pretrained(options.output)
    print(check_zeros(loaded, shown))

    text_table = table.whole(dense, results, tuned)
    (options.output / "perplexity.md").write_text(f"{introduction(options)}\n\n{text_table}\n")
    plot(dense, results, tuned, shown, options).savefig(options.output / "pruning.png", dpi=120)
    stage(f"perplexity on held-out text (perplexity.md and pruning.png are in {options.output})")
    print(text_table)


if __name__ == "__main__":
    main()
