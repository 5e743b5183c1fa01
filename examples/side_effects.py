"""Measures what a patch does besides what it is for: kinds of text, copying, facts, indirect objects, and words of answers.

Everything is measured before and after on the same samples, with intervals, beside as many random weights of each
parameter. The worst line comes first; what is worse than `--allowed` says is named, and the script ends with an error then.
Patches are what `correct_repetition.py` and `correct_toxicity.py` write.
"""

import argparse
import sys
from pathlib import Path

from language_model import PACKAGED_MODEL, load_model
from presenting import quiet, stage

from lrp_prune import Patch
from lrp_prune.correction import side_effects_of
from lrp_prune.metrics import Suite


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("patch", type=Path, help="the file; what is found is written into its description")
    add("--model", default=PACKAGED_MODEL, help="the packaged model, or a causal model's hub name or folder")
    add(
        "--strength",
        type=float,
        default=None,
        help="0 for as before, 1 for removed; as the patch was made if not given",
    )
    add("--text", type=Path, nargs="*", default=[], help="files or folders of one's own texts, to be measured as well")
    add("--half", choices=("selection", "test"), default="test", help="which half of all texts")
    add("--windows", type=int, default=8, help="windows of each kind of text")
    add("--length", type=int, default=256, help="tokens in a window")
    add("--samples", type=int, default=32, help="facts and prompts; half as many copied sequences")
    add("--random", type=int, default=3, help="random patches, of as many weights of each parameter")
    add("--allowed", nargs="*", default=["*=0.02"], help="the largest change, as in '*=0.02 copying=0.05'")
    add("--seed", type=int, default=0, help="of windows, prompts and random weights")
    add("--output", type=Path, default=Path("outputs/side_effects"), help="folder for table and figure")
    return parser.parse_args()


def own_texts(paths: list[Path]) -> dict[str, list[str]]:
    """Texts by the name of their file or folder: a file's paragraphs, or a folder's files, are its documents."""
    found = {}
    for path in paths:
        files = sorted(each for each in path.rglob("*") if each.is_file()) if path.is_dir() else [path]
        texts = [each.read_text(encoding="utf-8") for each in files]
        found[path.name] = texts if path.is_dir() else texts[0].split("\n\n")
    return found


def limits(given: list[str]) -> dict[str, float]:
    """Limits by name from texts such as `copying=0.05`."""
    return {name: float(limit) for name, _, limit in (text.rpartition("=") for text in given)}


def main() -> int:
    options = parse()
    quiet()
    options.output.mkdir(parents=True, exist_ok=True)
    stage(f"loading {options.model}, and texts")
    model, tokenizer = load_model(options.model)
    patch = Patch.load(options.patch)
    halves = Suite.halves(
        tokenizer,
        own_texts(options.text),
        windows=options.windows,
        length=options.length,
        samples=options.samples,
        seed=options.seed,
    )
    suite = halves[options.half == "test"]

    stage(f"measuring {patch}")
    allowed = limits(options.allowed)
    effects = side_effects_of(
        patch, model, suite, options.strength, allowed=allowed, random=options.random, seed=options.seed
    )
    patch.save(options.patch)
    (options.output / "side-effects.md").write_text(f"{effects}\n")
    effects.plot(options.output / "side-effects.png", allowed.get("*"))
    stage(f"side effects at strength {patch.provenance['side_effects']['strength']:g} (also in {options.output})")
    print(effects)
    print("\n" + patch.provenance["side_effects"]["verdict"])
    return 1 if effects.beyond(allowed) else 0


if __name__ == "__main__":
    sys.exit(main())
