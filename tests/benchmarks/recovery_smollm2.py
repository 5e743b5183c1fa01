"""What half of a language model gets back by a short training, beside the dense model that is trained as long on the same text.

    python tests/benchmarks/recovery_smollm2.py                    # ten minutes of two cores for each row
    python tests/benchmarks/recovery_smollm2.py --ways dense pruned --seconds 300

SmolLM2 is pruned once by the default, what it keeps is updated (compensation="exact"), and it is trained with its zeros kept: all
weights, or masked LoRA adapters that are merged in the end. All rows have the same windows in the same order, one a step, and as
many seconds of the processor; the perplexity is of other documents. Rows that are done are read from `--output`,
and so is the pruned model.
"""

import argparse
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))
sys.path.append(str(Path(__file__).resolve().parents[2]))
import language_model
from presenting import aligned

import lrp_prune
from tests.benchmarks.compression_table import TEXTS

WAYS = ("dense", "pruned", "pruned, masked LoRA")


def trained(model: nn.Module, windows: Tensor, seconds: float, rate: float, masks: lrp_prune.Masks | None) -> int:
    """Train for so many seconds of the processor, the rate rising for a twentieth of them and then falling to zero; the steps."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    model.train()
    start, steps = time.process_time(), 0
    with tqdm(total=round(seconds), unit="s", dynamic_ncols=True, leave=False) as bar:
        while (passed := (time.process_time() - start) / seconds) < 1:
            for group in optimizer.param_groups:
                group["lr"] = rate * min(passed / 0.05 + 0.01, 0.5 + 0.5 * math.cos(math.pi * passed))
            ids = windows[steps % len(windows)][None]
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            if masks is not None:
                masks.apply_(model)
            steps += 1
            bar.update(round(passed * seconds) - bar.n)
    model.eval()
    return steps


def pruned(model: nn.Module, ids: Tensor, sparsity: float, path: Path) -> lrp_prune.Masks:
    """Prune the model and update what is kept, once for all rows."""
    if not path.exists():
        batches = language_model.batches(ids, 1)
        lrp_prune.prune(model, batches, sparsity, compensation="exact", progress=True).save(
            path.with_suffix(".masks.safetensors")
        )
        torch.save(model.state_dict(), path)
    model.load_state_dict(torch.load(path, weights_only=True))
    return lrp_prune.Masks.load(path.with_suffix(".masks.safetensors"))


def with_adapters(model: nn.Module, masks: lrp_prune.Masks, rank: int) -> Any:
    """The model with LoRA on every layer that is pruned, zero where it is."""
    from peft import LoraConfig, get_peft_model

    layers = sorted({name.removesuffix(".weight") for name in masks})
    adapted = get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=layers))
    lrp_prune.mask_adapters(adapted, masks)
    return adapted


def measured(way: str, windows: dict[str, Tensor], options: argparse.Namespace) -> dict[str, Any]:
    """One row: before and after the training."""
    model, _ = language_model.load_model(options.model)
    path = options.output / f"pruned-{options.text}-{options.sparsity}.pt"
    masks = None if way == "dense" else pruned(model, windows["calibration"], options.sparsity, path)
    before = language_model.perplexity(model, windows["test"])
    adapters = "LoRA" in way and masks is not None
    rate = options.rate * (options.adapter_rate if adapters else 1.0)
    whole = with_adapters(model, masks, options.rank) if adapters and masks is not None else model
    torch.manual_seed(options.seed)
    steps = trained(whole, windows["training"], options.seconds, rate, None if adapters else masks)
    model = whole.merge_and_unload() if adapters else model
    if masks is not None:
        weights = dict(model.named_parameters())
        assert not any(weights[name][~kept].count_nonzero() for name, kept in masks.items())
    after = language_model.perplexity(model, windows["test"])
    return {"way": way, "before": before, "after": after, "steps": steps, "seconds": options.seconds, "rate": rate}


def table(rows: list[dict[str, Any]]) -> str:
    """Perplexities, and what is lost to the dense model that was trained as long."""
    lines = ["| | before | after | to the dense model, trained as long | steps |", "|---|---|---|---|---|"]
    dense = next((row["after"] for row in rows if row["way"] == "dense"), math.nan)
    for row in rows:
        apart = "" if row["way"] == "dense" else f"{row['after'] / dense - 1:+.1%}"
        lines.append(f"| {row['way']} | {row['before']:.2f} | {row['after']:.2f} | {apart} | {row['steps']} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--ways", nargs="+", choices=WAYS, default=list(WAYS), help="rows of the table")
    add("--text", choices=list(TEXTS), default="speeches", help="kind of text")
    add("--sparsity", type=float, default=0.5, help="share of the weights that is removed")
    add("--seconds", type=float, default=1200, help="of the processor, for each training")
    add("--rate", type=float, default=1e-4, help="the largest learning rate")
    add("--adapter-rate", type=float, default=10.0, help="times that for adapters")
    add("--rank", type=int, default=16, help="of the adapters")
    add("--calibration-windows", type=int, default=32, help="windows of 512 tokens to prune by")
    add(
        "--training-windows",
        type=int,
        default=400,
        help="windows to train on, gone through again when they are through",
    )
    add("--held-out-windows", type=int, default=24, help="windows of other documents to measure on")
    add("--seed", type=int, default=0)
    add("--model", default=language_model.PACKAGED_MODEL, help="the packaged model, or a hub name or folder")
    add("--output", type=Path, default=Path("outputs/recovery_smollm2"))
    options = parser.parse_args(arguments)
    options.output.mkdir(parents=True, exist_ok=True)
    results = options.output / "results.jsonl"
    rows = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    _, tokenizer = language_model.load_model(options.model)
    first, held_out = language_model.split_documents([document for _, document in TEXTS[options.text]()])
    windows = {
        "calibration": language_model.windows(first, tokenizer, options.calibration_windows, seed=options.seed),
        "training": language_model.windows(first, tokenizer, options.training_windows, seed=options.seed + 1000),
        "test": language_model.windows(held_out, tokenizer, options.held_out_windows),
    }
    for way in options.ways:
        if way not in {row["way"] for row in rows}:
            rows.append(measured(way, windows, options))
            with results.open("a") as file:
                file.write(json.dumps(rows[-1]) + "\n")
            print(table(rows).splitlines()[-1], flush=True)
    print(aligned(table(rows)))


if __name__ == "__main__":
    main()
