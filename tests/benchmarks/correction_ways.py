"""Ways to make a correction that acts everywhere, on equal footing: as many weights, the same prompts, texts and limits.

    python tests/benchmarks/correction_ways.py                  # about an hour on one core
    python tests/benchmarks/correction_ways.py --ways usual "strengths learned" --strengths 0.5

The behaviour is repetition of SmolLM2, found and measured as in examples/correction_frontier.py: general relevance of nine sets,
a contrast with the model's own repetitive answers. Of each way the share of repeated tokens is given on prompts that it was not
found with, and what it costs on texts that it was not found with: the worst of all kinds of text and tasks but copying, and
copying. The set that counts thrice, and the one that is alone, are speeches, which the frontier of that example is limited by.
What is done already is read from ``--output``.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))
from correct_repetition import repetitive, uniqueness
from correction_study import answer_batches, generate
from language_model import load_documents, load_model, sentence_beginnings, split_documents
from presenting import aligned, stage

import lrp_prune
from lrp_prune import Patch, Relevance
from lrp_prune.correction import Guard
from lrp_prune.correction.several import Together
from lrp_prune.effects import Likelihood
from lrp_prune.metrics import Suite
from lrp_prune.names import named_parameters
from lrp_prune.pruning import scorer
from lrp_prune.targets import NextToken, RepetitionMargin

Batch = dict[str, Tensor]
UNITS = {"neurons": "neuron", "heads": "head"}
WORST = "speeches"


class Setup:
    """A model, its repetitive answers, and texts of two halves: to find patches with, and to test them on."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.model, tokenizer = load_model(options.model)
        sizes = {"windows": options.windows, "length": options.length, "samples": options.samples}
        self.selection, self.test = Suite.halves(tokenizer, **sizes, seed=options.seed)
        self.collecting, _ = Suite.halves(tokenizer, **sizes, seed=options.seed + 1)
        self.tokens = options.answer_tokens
        (prompts, answers), (self.held_out, self.before) = (
            repetitive(
                self.model,
                sentence_beginnings(documents, tokenizer, options.candidates // 2, 12, options.seed),
                options,
            )
            for documents in split_documents(load_documents())
        )
        self.repeating = answer_batches(prompts, answers, answers, 8)

    def general(
        self, statistic: str, ways: Mapping[str, Together], granularity: str = "weight"
    ) -> dict[str, Relevance]:
        """Relevance of the general sets, each collected once and put together in several ways; of speeches alone as well."""
        found = {}
        for name, entry in self.collecting.items():
            if isinstance(entry, Likelihood):
                relevance = lrp_prune.attribute(
                    self.model,
                    entry.parts,
                    NextToken(odds=0),
                    "epsilon",
                    statistic,
                    granularity=granularity,
                    skip_first=1,
                )
                for way in ways.values():
                    way.add(name, relevance)
                if name == WORST:
                    found["one"] = relevance
        return {**found, **{name: way.compute() for name, way in ways.items()}}

    def undesired(self, granularity: str = "weight") -> Relevance:
        """Relevance of the repeated tokens."""
        return lrp_prune.attribute(
            self.model, self.repeating, RepetitionMargin(), "epsilon", "signed", granularity=granularity, skip_first=1
        )


def patches(setup: Setup, ways: list[str], amount: float) -> Iterator[tuple[str, Patch]]:
    """The patch of each way, all of the same number of weights, or a stated part of it."""
    for way, granularity in UNITS.items():  # first, as they take little memory
        if way in ways:
            yield way, of_units(setup, granularity, amount)
    if not set(ways) - set(UNITS):
        return
    model, undesired = setup.model, setup.undesired()
    combined = setup.general("signed", {"mean": Together(), "worst thrice": Together(weights={WORST: 3.0})})
    guards = setup.general("squared_token", {"mean": Together(), "largest": Together("largest")})

    def made(general: str = "mean", guard: str | None = "largest", share: float = 1.0, **options: Any) -> Patch:
        guarded = None if guard is None else Guard(0.7, guards[guard])
        return Patch.from_contrast(model, combined[general], undesired, amount * share, guard=guarded, **options)

    names = sorted({name.split(".layers.")[1].split(".")[0] for name in undesired if ".layers." in name}, key=int)
    third = max(len(names) // 3, 1)
    recipes: dict[str, Callable[[], Patch]] = {
        "usual": made,
        "guard by the mean over sets": lambda: made(guard="mean"),
        "no guard": lambda: made(guard=None),
        "one general set": lambda: made("one", "one"),
        "the worst set counts thrice": lambda: made("worst thrice"),
        "half as many weights": lambda: made(share=0.5),
        "first third of layers left out": lambda: made(exclude=[f"*.layers.{name}.*" for name in names[:third]]),
        "last third of layers left out": lambda: made(exclude=[f"*.layers.{name}.*" for name in names[-third:]]),
        "attention only": lambda: made(include=["*.self_attn.*"]),
        "feed-forward only": lambda: made(include=["*.mlp.*"]),
        "strengths learned": made,
    }
    for way, recipe in recipes.items():
        if way in ways:
            yield way, recipe()


def of_units(setup: Setup, granularity: str, amount: float) -> Patch:
    """Whole units, as many as have at least this share of the weights that other ways choose from."""
    entries = round(amount * sum(weight.numel() for weight in scorer("magnitude", setup.model).parameters.values()))
    general, undesired = (
        setup.general("signed", {"mean": Together()}, granularity)["mean"],
        setup.undesired(granularity),
    )
    count, patch = 1, Patch.from_contrast(setup.model, general, undesired, 1, guard=0.7)
    while patch.num_entries < entries:
        count += max(1, round(count * min((entries - patch.num_entries) / patch.num_entries, 1.0)))
        patch = Patch.from_contrast(setup.model, general, undesired, count, guard=0.7)
    return patch


@contextmanager
def weakened(model: nn.Module, patch: Patch, strengths: Mapping[str, Tensor]) -> Iterator[None]:
    """The patched weights times one less a strength each; bit for bit as before afterwards."""
    parameters = named_parameters(model)

    def write(factors: Mapping[str, Tensor] | None) -> None:
        with torch.no_grad():
            for name in patch:
                entry = patch[name]
                values = entry.originals if factors is None else entry.originals * (1 - factors[name].detach())
                parameters[name].view(-1)[entry.positions] = values

    write(strengths)
    try:
        yield
    finally:
        write(None)


def learned_strengths(setup: Setup, patch: Patch, start: float, steps: int, weight: float) -> dict[str, Tensor]:
    r"""A strength for each weight, by some steps on :math:`\max(m + 1, 0) + \lambda \sum_i \mathrm{KL}_i`.

    :math:`m` is the mean margin by which tokens are repeated, and the divergence that of a general set from the model before;
    strengths stay in [0, 1], and the weights that are patched are the same.
    """
    model, parameters = setup.model, named_parameters(setup.model)
    general = {name: entry.parts[0] for name, entry in setup.selection.items() if isinstance(entry, Likelihood)}
    with torch.no_grad():
        before = {name: _log_probabilities(model, batch) for name, batch in general.items()}
    strengths = {name: torch.full_like(patch[name].originals, start).requires_grad_() for name in patch}
    optimizer = torch.optim.Adam(strengths.values(), lr=0.05)
    chosen = {name: parameters[name] for name in patch}
    needed = {name: parameter.requires_grad for name, parameter in parameters.items()}
    names = list(general)
    try:
        for name, parameter in parameters.items():
            parameter.requires_grad_(name in chosen)
        for step in range(steps):
            with weakened(model, patch, strengths):
                batch = setup.repeating[step % len(setup.repeating)]
                loss = F.relu(RepetitionMargin()(model, batch) / (batch["labels"] != -100).sum() + 1)
                for name in (names[step % len(names)], names[(step + len(names) // 2) % len(names)]):
                    now = _log_probabilities(model, general[name])
                    loss = loss + weight * F.kl_div(now, before[name], log_target=True, reduction="batchmean")
                gradients = torch.autograd.grad(loss, list(chosen.values()))
            for (name, strength), gradient in zip(strengths.items(), gradients, strict=True):
                strength.grad = -patch[name].originals * gradient.reshape(-1)[patch[name].positions]
            optimizer.step()
            with torch.no_grad():
                for strength in strengths.values():
                    strength.clamp_(0, 1)
    finally:
        for name, parameter in parameters.items():
            parameter.requires_grad_(needed[name])
    return {name: strength.detach() for name, strength in strengths.items()}


def _log_probabilities(model: nn.Module, batch: Batch) -> Tensor:
    """Of each labelled place, ``[places, vocabulary]``."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch.get("attention_mask"), use_cache=False).logits
    return F.log_softmax(logits[:, :-1][batch["labels"][:, 1:] != -100], dim=-1)


def measured(setup: Setup, dense: Mapping[str, float]) -> dict[str, float]:
    """Of the model as it is now: repeated tokens, and the change of each line."""
    ratios = uniqueness(generate(setup.model, setup.held_out, setup.tokens))
    now = {name: measure(setup.model) for name, measure in setup.test.measures().items()}
    return {
        "repeated": 1 - sum(ratios) / len(ratios),
        **{name: (now[name] - dense[name]) / dense[name] for name in now},
    }


def table(rows: list[dict[str, Any]]) -> str:
    """One row a trial, the worst line named."""
    lines = [
        "| way | weights | strength | repeated tokens | worst but copying | copying |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        changes = {name: value for name, value in row["changes"].items() if name not in ("repeated", "copying")}
        worst = max(changes, key=lambda name: changes[name]) if changes else ""
        worst_said = f"{changes[worst]:+.1%} {worst}" if worst else ""
        copying = f"{row['changes']['copying']:+.0%}" if "copying" in row["changes"] else ""
        repeated = f"{row['changes']['repeated']:.1%}"
        lines.append(
            f"| {row['way']} | {row['weights']:,} | {row['strength']} | {repeated} | {worst_said} | {copying} |"
        )
    return "\n".join(lines)


WAYS = (
    "usual", "guard by the mean over sets", "no guard", "one general set", "the worst set counts thrice", "half as many weights",
    "first third of layers left out", "last third of layers left out", "attention only", "feed-forward only",
    "strengths learned", *UNITS,
)  # fmt: skip


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--ways", nargs="+", default=list(WAYS), choices=WAYS)
    add("--amount", type=float, default=0.0002, help="fraction of the weights")
    add("--strengths", nargs="+", type=float, default=[0.3, 0.5])
    add("--steps", type=int, default=40, help="of learning strengths")
    add("--penalty", nargs="+", type=float, default=[10.0, 50.0], help="of the divergence, where strengths are learned")
    add("--candidates", type=int, default=120, help="beginnings of sentences tried, half of them to be held out")
    add("--repetitive", type=float, default=0.5, help="largest uniqueness ratio of answers that count as repetitive")
    add("--answer-tokens", type=int, default=40, help="tokens generated for each prompt")
    add("--windows", type=int, default=3)
    add("--length", type=int, default=128)
    add("--samples", type=int, default=16)
    add("--seed", type=int, default=0)
    add("--model", default="smollm2")
    add("--output", type=Path, default=Path("outputs/correction_ways/results.jsonl"))
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    rows = [json.loads(line) for line in options.output.read_text().splitlines()] if options.output.exists() else []
    done = {row["way"] for row in rows}
    stage("loading the model and texts, and looking for prompts")
    setup = Setup(options)
    dense = {name: measure(setup.model) for name, measure in setup.test.measures().items()}

    def note(way: str, weights: int, strength: float | str, changes: dict[str, float]) -> None:
        rows.append({"way": way, "weights": weights, "strength": strength, "changes": changes})
        with options.output.open("a") as file:
            file.write(json.dumps(rows[-1]) + "\n")
        print(table(rows[-1:]).splitlines()[-1], flush=True)

    if "before" not in done:
        note("before", 0, "", measured(setup, dense))
    stage("collecting relevance, and trying each way")
    for way, patch in patches(setup, [way for way in options.ways if way not in done], options.amount):
        if way == "strengths learned":
            for penalty in options.penalty:
                strengths = learned_strengths(setup, patch, 0.5, options.steps, penalty)
                mean = float(torch.cat(list(strengths.values())).mean())
                with weakened(setup.model, patch, strengths):
                    note(way, patch.num_entries, f"{mean:.2f} in the mean, penalty {penalty:g}", measured(setup, dense))
            continue
        for strength in (
            [2 * each for each in options.strengths] if way == "half as many weights" else options.strengths
        ):
            patch.apply_(setup.model, strength)
            note(way, patch.num_entries, strength, measured(setup, dense))
            patch.revert_(setup.model)
    print(aligned(table(rows)))


if __name__ == "__main__":
    main()
