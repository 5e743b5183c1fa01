"""Finds the weights that make a language model repeat itself, weakens them, and shows what that does and costs.

Prompts are beginnings of sentences of State of the Union speeches; those that the model's greedy continuation answers with a
uniqueness ratio (distinct over generated tokens) of at most 0.5 are kept. A patch is found with prompts of some speeches and
measured on prompts and text of others, beside random weights, the smallest weights, neurons by their activation, and other
ways to propagate relevance. The recipe, in rounds:

1. What serves repetition: the relevance (signed sums) of each repeated token's logit minus the best logit among tokens that
   the answer does not have yet, on the model's own answers.
2. What serves everything else: the same of the log-probability of general text; and, as a guard, the sums of squares over
   tokens: the 30 % of the weights that matter most to any token are spared.
3. The weights where the first exceeds the second most, both divided by their totals, are weakened by a half, not removed.
4. Once more with the answers of the model as it is corrected now, and with less weight for the general text; of several
   amounts the largest is taken that costs little on text that is used for nothing else.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from correction_comparisons import activation_patch, comparisons, mean_activations
from correction_rounds import ContrastRounds, last_within
from correction_study import Batch, Result, Study, answer_batches, generate, interval, plot, report_side_effects, table
from language_model import (
    PACKAGED_MODEL,
    PACKAGED_TEXT,
    batches,
    load_documents,
    load_model,
    sentence_beginnings,
    split_documents,
    windows,
)
from presenting import quiet, stage
from transformers import PreTrainedModel

from lrp_prune.metrics import response_uniqueness_ratio
from lrp_prune.targets import RepetitionMargin

Tokens = list[list[int]]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--model", default=PACKAGED_MODEL, help="the packaged model, or a causal model's hub name or folder")
    add("--dataset", default=PACKAGED_TEXT, help="the packaged speeches, or a hub data set's name")
    add("--candidates", type=int, default=220, help="beginnings of sentences tried, half of them to be held out")
    add("--prompt-tokens", type=int, default=12, help="tokens in each prompt")
    add("--answer-tokens", type=int, default=50, help="tokens generated for each prompt")
    add("--repetitive", type=float, default=0.5, help="largest uniqueness ratio of answers that count as repetitive")
    add("--composite", default="epsilon", help="rules: epsilon, gradient, attnlrp, cp_lrp")
    add("--compare", nargs="*", default=["gradient"], help="other rules to compare with, at equal cost")
    add("--amount", type=float, default=0.0004, help="fraction of the weights in the first round")
    add(
        "--further",
        nargs="*",
        type=float,
        default=[0.00002, 0.00003, 0.00004],
        help="fractions that the second round adds, to choose from; none for one round",
    )
    add("--general-weight", type=float, default=0.3, help="of the general text in the second round; 1 in the first")
    add("--strength", type=float, default=0.5, help="by how much they are weakened: 1 removes them")
    add("--guard", type=float, default=0.7, help="fraction of the weights that may be chosen at all")
    add(
        "--allowed",
        type=float,
        default=0.01,
        help="more perplexity that is allowed: a quarter of it where the amount is chosen, since texts differ",
    )
    add("--seeds", type=int, default=5, help="of random weights")
    add("--general-windows", type=int, default=16, help="windows of text that general relevance is collected on")
    add("--held-out-windows", type=int, default=8, help="windows of other speeches that the perplexity is measured on")
    add("--window", type=int, default=256, help="tokens in a window")
    add("--seed", type=int, default=0, help="of the choice of prompts and windows")
    add("--output", type=Path, default=Path("outputs/repetition"), help="folder for the patch, table and plot")
    add("--quick", action="store_true", help="few prompts and one seed: shows in two minutes that everything runs")
    options = parser.parse_args()
    if options.quick:
        options.candidates, options.general_windows, options.held_out_windows, options.seeds = 40, 2, 2, 1
        options.further, options.compare = options.further[:1], []
    return options


def uniqueness(answers: Tokens) -> list[float]:
    """The ratio of distinct to generated tokens of each answer."""
    width = max(map(len, answers))
    tokens = torch.tensor([answer + [0] * (width - len(answer)) for answer in answers])
    counted = torch.tensor([[1] * len(answer) + [0] * (width - len(answer)) for answer in answers])
    ratios: list[float] = response_uniqueness_ratio(tokens, counted).tolist()
    return ratios


def repetitive(model: PreTrainedModel, prompts: Tokens, options: argparse.Namespace) -> tuple[Tokens, Tokens]:
    """The prompts that draw a repetitive answer, and the answers."""
    answers = generate(model, prompts, options.answer_tokens)
    ratios = uniqueness(answers)
    kept = [place for place, ratio in enumerate(ratios) if ratio <= options.repetitive and answers[place]]
    mean = sum(ratios) / len(ratios)
    print(f"{len(kept)} of {len(prompts)} prompts draw a repetitive answer; mean uniqueness of all {mean:.2f}")
    if len(kept) < 2:
        raise ValueError("hardly any prompt draws a repetitive answer: try more with --candidates")
    return [prompts[place] for place in kept], [answers[place] for place in kept]


def examples(tokenizer: Any, prompts: Tokens, before: Tokens, after: Tokens, count: int = 4) -> str:
    """The answers to a few prompts before and after."""
    lines = []
    for row in list(zip(prompts, before, after, strict=True))[:count]:
        texts = [" ".join(tokenizer.decode(ids, skip_special_tokens=True).split()) for ids in row]
        lines.append("> {}\n  before: {}\n  after:  {}".format(*texts))
    return "\n".join(lines)


def compared(
    study: Study, contrast: ContrastRounds, repeating: list[Batch], count: int, options: argparse.Namespace
) -> dict[str, list[Result]]:
    """What a patch of so many weights is compared with: random and small weights, activations, other rules."""
    model, general, names = contrast.model, contrast.general, contrast.names
    # Neurons of an MLP are the inputs of its last layer; other models get all weights' inputs.
    down = [name for name in names if name.endswith("down_proj.weight")] or names
    means = [mean_activations(model, reference, down) for reference in (general, repeating)]
    points: dict[str, list[Result]] = {}
    for name, result in comparisons(
        study,
        names,
        lambda entries: activation_patch(model, means[0], means[1], entries),
        count,
        options.strength,
        options.allowed,
        options.seeds,
    ):
        points.setdefault(name, []).append(result)
        print(f"{name}: uniqueness {result.score:.3f} at {result.cost:+.2%}", flush=True)
    for composite in options.compare:
        rival = ContrastRounds(
            model, general, RepetitionMargin(), "repetition", composite, options.guard, contrast.guard_by
        )
        sets = rival.collect(repeating)
        found = study.at_cost(
            lambda entries, rival=rival, sets=sets: rival.patch(sets, entries),
            count,
            options.allowed,
            options.strength,
        )
        points[f"{composite} contrast in one round, same cost"] = [found] if found is not None else []
    return points


def show(
    study: Study,
    ours: list[Result],
    chosen: int,
    groups: dict[str, list[Result]],
    points: dict[str, list[Result]],
    options: argparse.Namespace,
) -> None:
    """The table and the plot, printed and written."""
    figures = table(groups | points, "uniqueness")
    (options.output / "table.md").write_text(figures + "\n")
    count = len(study.base.scores)
    figure = plot(
        {f"contrastive relevance ({options.composite})": ours},
        points,
        study.base,
        "uniqueness of greedy answers",
        0.7,
        f"Repetition: {count} held-out prompts of {options.model}",
    )
    figure.savefig(options.output / "trade-off.png", dpi=120)
    stage(f"results (table.md, trade-off.png and repetition.safetensors are in {options.output})")
    print(figures)
    low, high = interval(ours[chosen].scores)
    still = sum(ratio <= options.repetitive for ratio in ours[chosen].scores)
    print(
        f"\nuniqueness {study.base.score:.3f} -> {ours[chosen].score:.3f} ({low:.3f} to {high:.3f}) at {ours[chosen].cost:+.2%} "
        f"perplexity; {still} of {count} answers are still repetitive"
    )


def main() -> None:
    options = parse()
    quiet()
    options.output.mkdir(parents=True, exist_ok=True)

    stage(f"loading {options.model} and {options.dataset}")
    model, tokenizer = load_model(options.model)
    calibration, held_out = split_documents(load_documents(options.dataset))
    found_with = windows(calibration, tokenizer, 2 * options.general_windows, options.window, options.seed + 1)
    general, to_choose = batches(found_with[::2], 4), found_with[1::2]
    text = windows(held_out, tokenizer, options.held_out_windows, options.window, options.seed)

    stage("looking for prompts that draw repetitive answers")
    (prompts, answers), (test, before) = (
        repetitive(
            model,
            sentence_beginnings(documents, tokenizer, options.candidates // 2, options.prompt_tokens, options.seed),
            options,
        )
        for documents in (calibration, held_out)
    )

    def answered(given: Tokens) -> list[Batch]:
        return answer_batches(prompts, given, given, 8)

    stage(f"finding the patch with {len(prompts)} prompts, by {options.composite}")
    contrast = ContrastRounds(model, general, RepetitionMargin(), "repetition", options.composite, options.guard)
    patches = contrast.rounds(
        answered(answers),
        lambda: answered(generate(model, prompts, options.answer_tokens)),
        options.amount,
        options.further,
        options.general_weight,
        options.strength,
    )
    chosen = last_within(model, patches, options.strength, to_choose, options.allowed / 4)
    patch = patches[chosen]
    patch.save(options.output / "repetition.safetensors")

    stage(f"measuring on {len(test)} held-out prompts")
    study = Study(model, lambda corrected: uniqueness(generate(corrected, test, options.answer_tokens)), text)
    ours = [study.measure(each, options.strength) for each in patches]
    groups = {"before": [study.base]}
    for number, result in enumerate(ours):
        groups[f"round {min(number + 1, 2)}{' (chosen)' * (number == chosen)}, {result.entries:,} weights"] = [result]
    print(table(groups, "uniqueness"), flush=True)

    stage("measuring what it is compared with")
    points = compared(study, contrast, answered(answers), patch.num_entries, options)
    show(study, ours, chosen, groups, points, options)
    patch.apply_(model, options.strength)
    after = generate(model, test, options.answer_tokens)
    patch.revert_(model)
    print(examples(tokenizer, test, before, after))

    stage("what the patch does besides, the worst first (side-effects.md, side-effects.png)")
    report_side_effects(model, tokenizer, patch, options.output / "repetition.safetensors", options)


if __name__ == "__main__":
    main()
