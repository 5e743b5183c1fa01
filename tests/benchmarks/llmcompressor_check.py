"""SparseGPT by `llmcompressor`, on the windows that compression_table.py has: a check of the reference in sparsegpt.py.

`llmcompressor` pins other versions than the package, so that it has an environment of its own; what one gives the other
is a folder:

    python tests/benchmarks/llmcompressor_check.py write outputs/llmcompressor --texts speeches documentation
    python -m venv outputs/other && outputs/other/bin/pip install llmcompressor torch==2.13.0
    outputs/other/bin/python tests/benchmarks/llmcompressor_check.py run outputs/llmcompressor --sparsities 0.5 0.6 2:4
"""

import argparse
import sys
import time
from pathlib import Path

import torch
from torch import Tensor


def write(folder: Path, texts: list[str], seed: int) -> None:
    """The model, and of each text windows to calibrate on and to measure on."""
    root = Path(__file__).resolve().parents[2]
    sys.path[:0] = [str(root / "examples"), str(root)]
    import language_model
    from safetensors.torch import save_file

    from tests.benchmarks.compression_table import TEXTS

    model, tokenizer = language_model.load_model(language_model.PACKAGED_MODEL)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    for text in texts:
        calibration, held_out = language_model.split_documents([document for _, document in TEXTS[text]()])
        windows = {
            "calibration": language_model.windows(calibration, tokenizer, 32, seed=seed),
            "test": language_model.windows(held_out, tokenizer, 24),
        }
        save_file(windows, folder / f"{text}.safetensors")


def perplexity(model: torch.nn.Module, windows: Tensor) -> float:
    """Of all tokens but the first of each window."""
    with torch.no_grad():
        losses = [model(input_ids=ids[None], labels=ids[None], use_cache=False).loss.double() for ids in windows]
    return float(torch.stack(losses).mean().exp())


def run(folder: Path, sparsities: list[str]) -> None:
    """Prune by each sparsity, from the dense model each time, and print the perplexities."""
    from datasets import Dataset
    from llmcompressor import __version__, oneshot
    from llmcompressor.modifiers.pruning import SparseGPTModifier
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    print(f"llmcompressor {__version__}, torch {torch.__version__}")
    for path in sorted(folder.glob("*.safetensors")):
        windows = load_file(path)
        dense = perplexity(_loaded(folder, AutoModelForCausalLM), windows["test"])
        print(f"{path.stem}, dense: {dense:.2f}", flush=True)
        for sparsity in sparsities:
            model, start = _loaded(folder, AutoModelForCausalLM), time.process_time()
            pattern = sparsity if ":" in sparsity else "0:0"
            kept, of = map(int, pattern.split(":"))
            share = float(sparsity) if of == 0 else 1 - kept / of
            blocks = type(model.model.layers[0]).__name__  # with "Linear" it would take nothing, and say nothing
            recipe = SparseGPTModifier(sparsity=share, mask_structure=pattern, targets=[blocks])
            ids = windows["calibration"].tolist()
            data = Dataset.from_dict({"input_ids": ids, "attention_mask": [[1] * len(each) for each in ids]})
            oneshot(
                model=model, dataset=data, recipe=recipe, num_calibration_samples=len(ids), max_seq_length=len(ids[0])
            )
            seconds, found = time.process_time() - start, perplexity(model, windows["test"])
            layers = [entry for name, entry in model.named_parameters() if name.endswith("proj.weight")]
            zeros = sum(int((entry == 0).sum()) for entry in layers) / sum(entry.numel() for entry in layers)
            if abs(zeros - share) > 0.01:
                raise RuntimeError(f"llmcompressor removed {zeros:.2%} of the weights, not {share:.0%}")
            print(f"{path.stem}, {sparsity}: {found:.2f}, {zeros:.2%} zero, {seconds:.0f} s", flush=True)


def _loaded(folder: Path, kind: type) -> torch.nn.Module:
    return kind.from_pretrained(folder / "model", dtype=torch.float32).eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=["write", "run"], help="write the folder, or run llmcompressor on it")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--texts", nargs="+", default=["speeches", "documentation"], help="of compression_table.py")
    parser.add_argument("--sparsities", nargs="+", default=["0.5", "0.6", "2:4"])
    parser.add_argument("--seed", type=int, default=0, help="of the choice of windows to calibrate on")
    options = parser.parse_args()
    if options.step == "write":
        options.folder.mkdir(parents=True, exist_ok=True)
        write(options.folder, options.texts, options.seed)
    else:
        run(options.folder, options.sparsities)


if __name__ == "__main__":
    main()
