"""Searches for a correction of repetition by the worst of what it does besides, and shows the frontier.

General relevance is collected on several named sets (kinds of text, copied sequences, facts that are asked for), which count
alike, and of which any spares what matters to it. Amounts and strengths are tried, each is measured on every set with a limit of
its own, and the smallest that does enough within all limits is chosen. General relevance and choice are of one half of all
texts, with windows that are drawn for each, and the choice is tested on the other half, of which no text is in the first. The
prompts are beginnings of sentences of documents that are split by themselves: those held out are of other documents than those
that the patch is found with, but both may be of either half of the speeches.
"""

import argparse
from pathlib import Path

from command_line import add_model, add_search, add_suite, limits, parser
from correct_repetition import repetitive, uniqueness
from correction_study import answer_batches, generate
from language_model import (
    PACKAGED_TEXT,
    load_documents,
    load_model,
    sentence_beginnings,
    split_documents,
)
from presenting import quiet, stage
from transformers import PreTrainedModel

import lrp_prune
from lrp_prune import Patch, Relevance
from lrp_prune.correction import Automatic, Guard, search_amount, side_effects_of, together
from lrp_prune.effects import Likelihood
from lrp_prune.metrics import Suite
from lrp_prune.targets import NextToken, RepetitionMargin


def parse() -> argparse.Namespace:
    given = parser(__doc__)
    add = given.add_argument
    add_model(given)
    add(
        "--dataset",
        default=PACKAGED_TEXT,
        help="where prompts are from: the packaged speeches, or a hub data set's name",
    )
    add(
        "--sets",
        nargs="*",
        default=[],
        help="general sets that relevance is collected on, such as speeches; all if none is named",
    )
    add_search(given, [0.00005, 0.0002, 0.0004], [0.25, 0.5])
    add("--reduction", type=float, default=0.5, help="wanted reduction of the share of repeated tokens")
    add("--candidates", type=int, default=80, help="beginnings of sentences tried, half of them to be held out")
    add("--repetitive", type=float, default=0.5, help="largest uniqueness ratio of answers that count as repetitive")
    add("--answer-tokens", type=int, default=40, help="tokens generated for each prompt")
    add_suite(given, windows=3, length=128, samples=16, allowed=["*=0.02", "copying=0.35"])
    add("--output", type=Path, default=Path("outputs/frontier"), help="folder for the patch, tables and figures")
    return given.parse_args()


def general_relevance(model: PreTrainedModel, suite: Suite, statistic: str, combination: str) -> Relevance:
    """That of all texts for their labelled tokens together, of copied sequences for their second pass only."""
    sets = {
        name: lrp_prune.attribute(model, entry.parts, NextToken(odds=0), "epsilon", statistic, skip_first=1)
        for name, entry in suite.items()
        if isinstance(entry, Likelihood)
    }
    return together(sets, combination)


def main() -> None:
    options = parse()
    quiet()
    options.output.mkdir(parents=True, exist_ok=True)
    stage(f"loading {options.model} and texts")
    model, tokenizer = load_model(options.model)
    sizes = {"windows": options.windows, "length": options.length, "samples": options.samples}
    allowed = limits(options.allowed)
    selection, test = Suite.halves(tokenizer, **sizes, seed=options.seed, allowed=allowed)
    collecting, _ = Suite.halves(tokenizer, **sizes, seed=options.seed + 1)

    stage("looking for prompts that draw repetitive answers")
    (prompts, answers), (held_out, before) = (
        repetitive(model, sentence_beginnings(documents, tokenizer, options.candidates // 2, 12, options.seed), options)
        for documents in split_documents(load_documents(options.dataset))
    )

    stage("collecting relevance")
    chosen = collecting.only(options.sets) if options.sets else collecting
    # One after the other: each set has a number for each weight.
    general = general_relevance(model, chosen, "signed", "mean")
    guard_by = general_relevance(model, chosen, "squared_token", "largest")
    repeating = answer_batches(prompts, answers, answers, 8)
    undesired = lrp_prune.attribute(model, repeating, RepetitionMargin(), "epsilon", "signed", skip_first=1)

    def make(amount: float | int) -> Patch:
        return Patch.from_contrast(
            model, general, undesired, amount, guard=Guard(options.guard, guard_by), behaviour="repetition"
        )

    def repeated(corrected: PreTrainedModel, given: list[list[int]]) -> float:
        ratios = uniqueness(generate(corrected, given, options.answer_tokens))
        return 1 - sum(ratios) / len(ratios)

    stage(
        f"trying {len(options.amounts) * len(options.strengths)} corrections, general relevance is the {general.target}"
    )
    automatic = Automatic(options.reduction, allowed, options.amounts, options.strengths)
    found = search_amount(
        model, make, lambda corrected: repeated(corrected, prompts), selection, automatic=automatic, strict=False
    )
    (options.output / "frontier.md").write_text(f"{found}\n")
    found.plot(options.output / "frontier.png")
    print(found, flush=True)
    if found.patch is None or found.chosen is None:
        return

    stage("testing the choice on other documents and prompts")
    effects = side_effects_of(found.patch, model, test, random=options.random)
    found.patch.save(options.output / "repetition.safetensors")
    (options.output / "side-effects.md").write_text(f"{effects}\n")
    found.patch.apply_(model, found.chosen.strength)
    after = 1 - repeated(model, held_out)
    found.patch.revert_(model)
    print(effects)
    print(
        f"\nuniqueness on {len(held_out)} held-out prompts: {sum(uniqueness(before)) / len(before):.3f} -> {after:.3f}"
    )
    print(found.patch.provenance["side_effects"]["verdict"])


if __name__ == "__main__":
    main()
