"""Takes 30 % of the hidden neurons of a language model's feed-forward parts out, and shows what that costs and what it gains.

By default SmolLM2-135M-Instruct, calibrated on some State of the Union speeches and measured on others. The stages: (1) load,
(2) measure the dense model, (3) prune the same share of the neurons of each layer, by LRP, and update what is kept to the least
squares of what each layer gave (`--compensation none` scales it only), (4) `lrp_prune.shrink`: the matrices get smaller, the
outputs stay as they were under the masks, and a forward is measured before and after, in turn, (5) save, and load by plain
`AutoModelForCausalLM.from_pretrained`.

`--quick` takes a few short windows: it only shows that everything runs.
"""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median

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
from presenting import IN_TERMINAL, quiet, stage
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

import lrp_prune

Batch = dict[str, Tensor]


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--quick", action="store_true", help="a few short windows: only shows that everything runs")
    add("--model", default=PACKAGED_MODEL, help="the packaged model, or a causal model's hub name or folder")
    add("--dataset", default=PACKAGED_TEXT, help="the packaged speeches, or a hub data set's name")
    add("--sparsity", type=float, default=0.3, help="share of each layer's hidden neurons that goes")
    add("--method", default="lrp", help="by which neurons are ranked")
    add("--compensation", choices=["exact", "obs", "none"], default="exact", help="of what is kept")
    add("--calibration-windows", type=int, default=8)
    add("--held-out-windows", type=int, default=8)
    add("--window", type=int, default=256, help="tokens in a window")
    add("--multiple-of", type=int, default=16, help="what the number of neurons that are left is: odd sizes are slow")
    add("--runs", type=int, default=10, help="of the masked and the smaller model, in turn, to measure a forward")
    add("--seed", type=int, default=0, help="of the choice of windows")
    add("--output", type=Path, default=Path("outputs/smollm2-shrunk"), help="folder for the model")
    options = parser.parse_args(arguments)
    if options.quick:
        options.calibration_windows, options.held_out_windows, options.window, options.runs = 2, 2, 64, 2
    return options


def prune(model: PreTrainedModel, reference: list[Batch], options: argparse.Namespace) -> lrp_prune.Masks:
    """Zeros in the same share of the hidden neurons of each layer."""
    return lrp_prune.prune(
        model,
        reference,
        options.sparsity,
        options.method,
        "layer",
        granularity="neuron",
        compensation=None if options.compensation == "none" else options.compensation,
        progress=IN_TERMINAL,
    )


@torch.inference_mode()
def reading_a_prompt(dense: PreTrainedModel, smaller: PreTrainedModel, ids: Tensor, runs: int) -> float:
    """How many times faster the smaller model reads a prompt, and makes the last token's logits: medians of CPU time."""
    seconds: dict[int, list[float]] = {0: [], 1: []}
    for turn in range(runs + 1):
        for number, model in list(enumerate((dense, smaller)))[:: 1 if turn % 2 else -1]:  # neither is always the first
            start = time.process_time()
            model(input_ids=ids, use_cache=False, logits_to_keep=1)
            seconds[number] += [time.process_time() - start] if turn else []  # the first turn warms up
    return median(seconds[0]) / median(seconds[1])


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    options = parse(arguments)
    quiet()
    stage(f"loading {options.model} and {options.dataset}")
    model, tokenizer = load_model(options.model)
    calibration, held_out = split_documents(load_documents(options.dataset))
    test = windows(held_out, tokenizer, options.held_out_windows, options.window)
    reference = batches(
        windows(calibration, tokenizer, options.calibration_windows, options.window, options.seed), batch_size=2
    )
    found = {"dense": perplexity(model, test, label="dense")}

    stage(f"{options.sparsity:.0%} of the hidden neurons of each layer pruned by {options.method}")
    masks = prune(model, reference, options)
    found["masked"] = perplexity(model, test, label="masked")

    stage("taken out")
    shrunk = lrp_prune.shrink(
        model, masks, reference[:1], uniform=True, multiple_of=options.multiple_of, measure=options.runs
    )
    print(shrunk)
    found["shrunk"] = perplexity(model, test, label="shrunk")
    assert shrunk.speed is not None
    found["times faster"] = shrunk.speed.ratio

    stage(f"saved in {options.output}, and loaded by from_pretrained")
    shrunk.save(options.output)
    tokenizer.save_pretrained(options.output)
    again = AutoModelForCausalLM.from_pretrained(options.output, dtype=torch.float32).eval()
    found["loaded"] = perplexity(again, test, label="loaded")
    for name in ("dense", "masked", "shrunk", "loaded"):
        print(f"{name:8} perplexity {found[name]:.2f}")
    dense, _ = load_model(options.model)
    found["prompt"] = reading_a_prompt(dense, again, test[:1, :128], options.runs)
    print(f"a forward of {tuple(reference[0]['input_ids'].shape)} tokens is {found['times faster']:.2f} times faster,")
    print(f"and a prompt of 128 tokens is read {found['prompt']:.2f} times faster")
    return found


if __name__ == "__main__":
    main()
