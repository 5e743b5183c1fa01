"""Measures what a patch does besides what it is for: kinds of text, copying, facts, indirect objects, and words of answers.

Everything is measured before and after on the same samples, with intervals, beside as many random weights of each
parameter. The worst line comes first; what is worse than `--allowed` says is named, and the script ends with an error then.
Patches are what `correct_repetition.py` and `correct_toxicity.py` write.
"""

import argparse
import sys
from pathlib import Path

from command_line import add_patch, add_suite, limits, parser
from language_model import load_model
from presenting import quiet, stage

from lrp_prune import Patch
from lrp_prune.correction import side_effects_of
from lrp_prune.metrics import Suite


def parse() -> argparse.Namespace:
    given = parser(__doc__)
    add_patch(given)
    add = given.add_argument
    add("--text", type=Path, nargs="*", default=[], help="files or folders of one's own texts, to be measured as well")
    add("--half", choices=("selection", "test"), default="test", help="which half of all texts")
    add_suite(given, windows=8, length=256, samples=32, allowed=["*=0.02"])
    add("--output", type=Path, default=Path("outputs/side_effects"), help="folder for table and figure")
    return given.parse_args()


def own_texts(paths: list[Path]) -> dict[str, list[str]]:
    """Texts by the name of their file or folder: a file's paragraphs, or a folder's files, are its documents."""
    found = {}
    for path in paths:
        files = sorted(each for each in path.rglob("*") if each.is_file()) if path.is_dir() else [path]
        texts = [each.read_text(encoding="utf-8") for each in files]
        found[path.name] = texts if path.is_dir() else texts[0].split("\n\n")
    return found


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
