"""Lets a patch act only where the model is about to loop, and shows what that reaches and costs.

A patch that takes repetition away takes right repetition away too: copying, names, lists. Here given patches (those of
`correct_repetition.py` and `correction_frontier.py`, which are united) are put under a condition. The condition is a direction in
the hidden states after one layer: it parts the places where the model's own repetitive answers go on with a repetition from all
places of general text, second passes of copied sequences, and facts that are asked for. The threshold is the lowest at which it
holds at no more than a given share of the places of any of these. Only entries in later layers are kept.

The condition is learned with prompts and texts of one half, and tested on the other: prompts are beginnings of sentences of other
speeches, and everyday sentences without a template or a word to fill in that it was learned with, drawn by several seeds.
"""

import argparse
import json
import math
import operator
import re
from collections.abc import Sequence
from functools import reduce
from pathlib import Path
from typing import Any

from correct_repetition import Tokens, examples, uniqueness
from correction_study import Batch, answer_batches, generate, interval
from everyday import everyday_beginnings
from language_model import (
    PACKAGED_MODEL,
    PACKAGED_TEXT,
    load_documents,
    load_model,
    sentence_beginnings,
    split_documents,
)
from presenting import quiet, stage
from side_effects import limits
from transformers import PreTrainedModel

from lrp_prune import Patch
from lrp_prune.correction import ActivationAbove, ConditionalPatch, random_like, side_effects_of
from lrp_prune.effects import Likelihood
from lrp_prune.metrics import Suite
from lrp_prune.targets import repeats_only

Prompts = dict[str, tuple[Tokens, Tokens]]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("patches", type=Path, nargs="+", help="files of patches that act everywhere, which are united")
    add("--model", default=PACKAGED_MODEL, help="the packaged model, or a causal model's hub name or folder")
    add("--dataset", default=PACKAGED_TEXT, help="where prompts are from: the packaged speeches, or a hub data set")
    add("--layers", default="model.layers.{}", help="what the model's layers are called")
    add("--layer", type=int, default=18, help="the layer after which the condition looks at the hidden states")
    add(
        "--holding",
        nargs="*",
        default=["*=0.15", "contexts of facts=0.02"],
        help="largest share of the places of each general set at which it holds",
    )
    add("--shrinkage", type=float, default=0.02, help="of the covariance that the direction is found with")
    add("--strength", type=float, default=1.0, help="by how much the entries are weakened where it holds")
    add("--candidates", type=int, default=160, help="beginnings of sentences of speeches tried to learn with")
    add("--everyday", type=int, default=96, help="everyday beginnings tried to learn with")
    add(
        "--most-to-learn", type=int, default=None, help="repetitive prompts of each kind learned with, all if not given"
    )
    add("--seeds", type=int, default=5, help="of the prompts to test with")
    add("--test-candidates", type=int, default=48, help="beginnings of sentences of speeches tried for each seed")
    add("--test-everyday", type=int, default=64, help="everyday beginnings tried for each seed")
    add("--most", type=int, default=16, help="repetitive prompts tested for each seed and kind, the first ones")
    add("--repetitive", type=float, default=0.5, help="largest uniqueness ratio of answers that count as repetitive")
    add("--answer-tokens", type=int, default=40, help="tokens generated for each prompt")
    add("--windows", type=int, default=6, help="windows of each kind of text to learn with")
    add("--test-windows", type=int, default=6, help="windows of each kind of text to test with")
    add("--length", type=int, default=128, help="tokens in a window")
    add("--samples", type=int, default=24, help="facts to learn with; half as many copied sequences")
    add("--test-samples", type=int, default=24, help="facts and prompts to test with; half as many copied sequences")
    add("--random", type=int, default=1, help="random patches under the same condition, on prompts of the first seed")
    add("--random-besides", type=int, default=0, help="of these, what they do besides")
    add("--allowed", nargs="*", default=["*=0.02", "copying=0.35"], help="the largest change of each line")
    add("--output", type=Path, default=Path("outputs/loops"), help="folder for the patch, tables and answers")
    return parser.parse_args()


def answered(model: PreTrainedModel, prompts: dict[str, Tokens], options: argparse.Namespace) -> Prompts:
    """Prompts with the model's answers; those that were given before, by the same options, are read from the folder."""
    file = options.output / "answers.json"
    known = json.loads(file.read_text()) if file.exists() else {}
    found: Prompts = {}
    for name, several in prompts.items():
        key = f"{options.model} {options.answer_tokens} {name}"
        if known.get(key, {}).get("prompts") != several:
            known[key] = {"prompts": several, "answers": generate(model, several, options.answer_tokens)}
            file.write_text(json.dumps(known))
        found[name] = several, known[key]["answers"]
    return found


def repetitive(several: tuple[Tokens, Tokens], largest: float, most: int | None = None) -> tuple[Tokens, Tokens]:
    """The prompts that draw a repetitive answer, and the answers."""
    prompts, answers = several
    kept = [place for place, ratio in enumerate(uniqueness(answers)) if ratio <= largest and answers[place]][:most]
    return [prompts[place] for place in kept], [answers[place] for place in kept]


def everywhere(batch: Batch) -> Batch:
    """A batch with labels for all of its text."""
    return {**batch, "labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)}


def later_part(patch: Patch, layers: str, layer: int) -> Patch:
    """The entries of a patch that are in later layers."""
    number = re.compile(re.escape(layers).replace(re.escape("{}"), r"(\d+)") + r"\.")
    kept = {name: patch[name] for name in patch if (found := number.match(name)) and int(found[1]) > layer}
    return Patch(kept, patch.provenance)


def row(name: str, seeds: Sequence[tuple[list[float], list[float]]], largest: float) -> str:
    """Means over all prompts with intervals, the smallest and largest mean of a seed, and what still repeats."""
    before, after = ([ratio for seed in seeds for ratio in seed[index]] for index in (0, 1))
    means = [math.fsum(ratios) / len(ratios) for _, ratios in seeds]
    figures = [
        f"{math.fsum(ratios) / len(ratios):.3f} ({low:.3f} to {high:.3f})"
        for ratios in (before, after)
        for low, high in [interval(ratios)]
    ]
    still = sum(ratio <= largest for ratio in after)
    return f"| {name} | {len(after)} | {' | '.join(figures)} | {min(means):.3f} to {max(means):.3f} | {still} |"


def drawn(
    model: PreTrainedModel, tokenizer: Any, options: argparse.Namespace
) -> tuple[dict[str, tuple[Tokens, Tokens]], dict[str, list[tuple[Tokens, Tokens]]]]:
    """Prompts with answers to learn with, and to test with for each seed of each kind."""
    learn_from, held_out = split_documents(load_documents(options.dataset))

    def everyday(half: int, count: int, seed: int) -> Tokens:
        return [tokenizer(text)["input_ids"] for text in everyday_beginnings(half, count, seed)]

    def speeches(documents: list[str], count: int, seed: int) -> Tokens:
        return sentence_beginnings(documents, tokenizer, count, 12, seed)

    to_learn = {
        "speeches, to learn with": speeches(learn_from, options.candidates, 0),
        "everyday, to learn with": everyday(0, options.everyday, 0),
    }
    to_test = {
        "other speeches": lambda seed: speeches(held_out, options.test_candidates, 100 + seed),
        "everyday sentences": lambda seed: everyday(1, options.test_everyday, seed),
    }
    return answered(model, to_learn, options), {
        kind: list(
            answered(model, {f"{kind}, seed {seed}": prompts(seed) for seed in range(options.seeds)}, options).values()
        )
        for kind, prompts in to_test.items()
    }


def learned(
    model: PreTrainedModel, selection: Suite, loops: list[tuple[Tokens, Tokens]], options: argparse.Namespace
) -> ConditionalPatch:
    """The later part of the given patches, under the condition that answers that loop tell from general sets."""
    undesired = [
        repeats_only(batch, 2) for prompts, answers in loops for batch in answer_batches(prompts, answers, answers, 8)
    ]
    # Each set counts alike in the direction: neutral sentences guard against something else, and are only judged by.
    general = {
        name: entry.parts
        for name, entry in selection.items()
        if isinstance(entry, Likelihood) and name != "neutral sentences"
    }
    # Where a fact is given nothing is repeated yet that is asked for, but what is changed there cannot be found again.
    general["contexts of facts"] = [everywhere(part) for part in general["facts in context"]]
    condition = ActivationAbove.learned(
        model, options.layers.format(options.layer), undesired, general, limits(options.holding), options.shrinkage
    )
    print("it holds at", ", ".join(f"{share:.2%} of {name}" for name, share in condition.shares.items()), flush=True)
    united = reduce(operator.or_, map(Patch.load, options.patches))
    patch = ConditionalPatch(later_part(united, options.layers, options.layer), condition)
    patch.provenance["strength"] = options.strength
    return patch


def reached(
    model: PreTrainedModel,
    tokenizer: Any,
    patch: ConditionalPatch,
    to_test: dict[str, list[tuple[Tokens, Tokens]]],
    options: argparse.Namespace,
) -> str:
    """The table of how repetitive answers are before and after, and with random weights under the same condition."""

    def corrected(given: Tokens, other: Patch = patch) -> Tokens:
        other.apply_(model, options.strength)
        try:
            return generate(model, given, options.answer_tokens)
        finally:
            other.revert_(model)

    lines = ["| prompts | number | before | after | by seed | still repetitive |", "|---|---|---|---|---|---|"]
    for kind, several in to_test.items():
        tested = [repetitive(each, options.repetitive, options.most) for each in several]
        after = [corrected(prompts) for prompts, _ in tested]
        ratios = [(uniqueness(old), uniqueness(new)) for (_, old), new in zip(tested, after, strict=True)]
        lines.append(row(kind, ratios, options.repetitive))
        print(lines[-1], flush=True)
        for number in range(options.random):
            random = random_like(patch, model, number)
            ratios = [(uniqueness(tested[0][1]), uniqueness(corrected(tested[0][0], random)))]
            lines.append(row(f"{kind}, random weights {number}, seed 0", ratios, options.repetitive))
        print(examples(tokenizer, *tested[0], after[0], 3), flush=True)
    return "\n".join(lines)


def main() -> None:
    options = parse()
    quiet()
    options.output.mkdir(parents=True, exist_ok=True)
    stage(f"loading {options.model}, and texts")
    model, tokenizer = load_model(options.model)
    sizes = {"windows": options.windows, "length": options.length, "samples": options.samples}
    test_sizes = {"windows": options.test_windows, "length": options.length, "samples": options.test_samples}
    selection, _ = Suite.halves(tokenizer, **sizes)
    _, test = Suite.halves(tokenizer, **test_sizes, allowed=limits(options.allowed))

    stage("looking for prompts that draw repetitive answers")
    to_learn, to_test = drawn(model, tokenizer, options)
    loops = [repetitive(several, options.repetitive, options.most_to_learn) for several in to_learn.values()]

    stage(f"learning where the model loops, with {sum(len(prompts) for prompts, _ in loops)} answers")
    patch = learned(model, selection, loops, options)
    patch.save(options.output / "loops.safetensors")

    stage(f"testing {patch.num_entries:,} weights at strength {options.strength:g} on prompts of {options.seeds} seeds")
    table = reached(model, tokenizer, patch, to_test, options)
    (options.output / "reach.md").write_text(table + "\n")
    print(table, flush=True)

    stage("what it does besides, the worst first (side-effects.md)")
    effects = side_effects_of(patch, model, test, options.strength, random=options.random_besides)
    patch.save(options.output / "loops.safetensors")
    (options.output / "side-effects.md").write_text(f"{effects}\n")
    print(f"{effects}\n\n{patch.provenance['side_effects']['verdict']}")


if __name__ == "__main__":
    main()
