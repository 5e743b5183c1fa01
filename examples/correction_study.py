"""What the correction examples share: generation, measuring patches, comparing them at equal cost, table and plot.

A study has a model, a score of its greedy answers to held-out prompts, and general text. Every patch is measured by both,
and the model is as before afterwards.
"""

import argparse
import math
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from language_model import batches
from matplotlib.figure import Figure
from presenting import FAINT, INK, aligned, colour, new_figure, progress, titled
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lrp_prune import Patch
from lrp_prune.correction import side_effects_of
from lrp_prune.metrics import KLToBase, Perplexity, Suite

Batch = dict[str, Tensor]
IGNORED = -100


@torch.inference_mode()
def generate(
    model: PreTrainedModel, prompts: Sequence[list[int]], tokens: int, batch_size: int = 64
) -> list[list[int]]:
    """Greedy answers by the model's ordinary `generate`, up to the end of the text; shorter prompts are padded on the left."""
    end = model.generation_config.eos_token_id
    ends = {end} if isinstance(end, int) else set(end or ())
    answers = []
    for start in progress(range(0, len(prompts), batch_size), "generating"):
        part = prompts[start : start + batch_size]
        width = max(map(len, part))
        ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in part])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in part])
        output = model.generate(
            ids, attention_mask=mask, max_new_tokens=tokens, do_sample=False, pad_token_id=min(ends, default=0)
        )
        for row in output[:, width:].tolist():
            answers.append(row[: next((place for place, token in enumerate(row) if token in ends), len(row))])
    return answers


def answer_batches(
    prompts: Sequence[list[int]], answers: Sequence[list[int]], labels: Sequence[list[int]], batch_size: int
) -> list[Batch]:
    """Batches of prompts with their answers, padded on the right; `labels` of each answer's tokens, -100 for the rest."""
    made = []
    for start in range(0, len(prompts), batch_size):
        rows = range(start, min(start + batch_size, len(prompts)))
        width = max(len(prompts[row]) + len(answers[row]) for row in rows)
        ids = torch.zeros(len(rows), width, dtype=torch.long)
        mask, marked = torch.zeros_like(ids), torch.full_like(ids, IGNORED)
        for index, row in enumerate(rows):
            begin, stop = len(prompts[row]), len(prompts[row]) + len(answers[row])
            ids[index, :stop] = torch.tensor(prompts[row] + answers[row])
            mask[index, :stop] = 1
            marked[index, begin:stop] = torch.tensor(labels[row], dtype=torch.long)
        made.append({"input_ids": ids, "attention_mask": mask, "labels": marked})
    return made


def interval(values: Sequence[float], seed: int = 0, draws: int = 2000) -> tuple[float, float]:
    """95 % of the means of samples drawn with replacement: how much the mean depends on which prompts were chosen."""
    chooser = random.Random(seed)
    means = sorted(math.fsum(chooser.choices(values, k=len(values))) / len(values) for _ in range(draws))
    return means[round(0.025 * (draws - 1))], means[round(0.975 * (draws - 1))]


def report_side_effects(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, patch: Patch, file: Path, options: argparse.Namespace
) -> None:
    """Measures what a patch does besides, prints it, and keeps it in the patch's file, as a table and as a figure.

    Args:
        model: The model, which is as before afterwards.
        tokenizer: Its own.
        patch: With its strength in its description.
        file: Of the patch; table and figure are beside it.
        options: `held_out_windows`, `window` and `seeds`: how much text, and how many random patches, 3 at most.
    """
    _, suite = Suite.halves(tokenizer, windows=options.held_out_windows, length=options.window)
    effects = side_effects_of(patch, model, suite, random=min(options.seeds, 3))
    patch.save(file)
    (file.parent / "side-effects.md").write_text(f"{effects}\n")
    effects.plot(file.parent / "side-effects.png")
    print(f"{effects}\n{patch.provenance['side_effects']['verdict']}\n", flush=True)


class Result(NamedTuple):
    """One patch as measured: a score per held-out prompt, the perplexity of general text and its share more than before."""

    entries: int
    strength: float
    scores: list[float]
    perplexity: float
    cost: float
    divergence: float

    @property
    def score(self) -> float:
        """The mean over the prompts."""
        return math.fsum(self.scores) / len(self.scores)


class Study:
    """Measures patches of a model, each applied for the time being.

    Args:
        model: The model to correct.
        behaviour: From the model to a score for each held-out prompt.
        text: Token ids `[windows, tokens]` of general text that nothing is found with.
        batch_size: Windows at once.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        behaviour: Callable[[PreTrainedModel], list[float]],
        text: Tensor,
        batch_size: int = 2,
    ) -> None:
        self.model, self.behaviour = model, behaviour
        self._text = batches(text, batch_size)
        # Of the first windows only: distributions over the vocabulary are large.
        with torch.inference_mode():
            self._distributions = [model(input_ids=part["input_ids"]).logits for part in self._text[:2]]
        self.perplexity, _ = self._general()
        self.base = Result(0, 0.0, behaviour(model), self.perplexity, 0.0, 0.0)

    @torch.inference_mode()
    def _general(self) -> tuple[float, float]:
        perplexity, divergence = Perplexity(), KLToBase()
        for index, part in enumerate(self._text):
            logits = self.model(input_ids=part["input_ids"]).logits
            perplexity.update(logits, part["input_ids"])
            if index < len(self._distributions):
                divergence.update(logits, self._distributions[index])
        return float(perplexity.compute()), float(divergence.compute())

    def cost(self, patch: Patch, strength: float = 1.0) -> float:
        """The share by which the perplexity grows."""
        patch.apply_(self.model, strength)
        try:
            return self._general()[0] / self.perplexity - 1
        finally:
            patch.revert_(self.model)

    def measure(self, patch: Patch, strength: float = 1.0) -> Result:
        """All figures of a patch."""
        patch.apply_(self.model, strength)
        try:
            perplexity, divergence = self._general()
            scores = self.behaviour(self.model)
        finally:
            patch.revert_(self.model)
        cost = perplexity / self.perplexity - 1
        return Result(patch.num_entries, strength, scores, perplexity, cost, divergence)

    def at_cost(
        self,
        make: Callable[[int], Patch],
        start: int,
        allowed: float,
        strength: float = 1.0,
        trials: int = 4,
    ) -> Result | None:
        """The figures of the largest patch found whose cost is allowed: counts are tried by halving their logarithm.

        Returns:
            None if no count was allowed.
        """
        low, high, count = 0, 0, start
        best: Patch | None = None
        for _ in range(trials):
            patch = make(count)
            cost = self.cost(patch, strength)
            if cost <= allowed:
                best, low = patch, count
                if cost > 0.8 * allowed:
                    break
            else:
                high = count
            count = round(math.sqrt(low * high)) if low and high else (4 * low if low else max(high // 4, 1))
        return None if best is None else self.measure(best, strength)


def table(groups: dict[str, list[Result]], score: str) -> str:
    """The figures as a markdown table: the interval of the mean over prompts, or where there are several seeds, their range."""
    lines = [f"| | entries | strength | {score} | perplexity | cost | KL to before |", "|---|---|---|---|---|---|---|"]
    for name, results in groups.items():
        if not results:
            continue
        first = results[0]
        low, high = interval(first.scores)
        spread = f"95 %: {low:.3f} to {high:.3f}"
        if len(results) > 1:
            spread = f"{len(results)} seeds: {min(r.score for r in results):.3f} to {max(r.score for r in results):.3f}"
        score_, perplexity, cost, divergence = (
            math.fsum(values) / len(results)
            for values in zip(*((r.score, r.perplexity, r.cost, r.divergence) for r in results), strict=True)
        )
        lines.append(
            f"| {name} | {first.entries:,} | {first.strength:g} | {score_:.3f} ({spread}) | {perplexity:.2f} | {cost:+.1%} | "
            f"{divergence:.4f} |"
        )
    return aligned("\n".join(lines))


def plot(
    curves: dict[str, list[Result]],
    points: dict[str, list[Result]],
    base: Result,
    score: str,
    wanted: float,
    title: str,
) -> Figure:
    """The trade-off: score by cost, curves for what was tried at several amounts and points for single patches."""
    figure, (axes,) = new_figure(8, 6)
    for name, results in curves.items():
        ordered = sorted([base, *results], key=lambda result: result.entries * result.strength)
        costs, scores = [100 * r.cost for r in ordered], [r.score for r in ordered]
        axes.plot(costs, scores, marker="o", color=colour("lrp"), linewidth=2.4, label=name)
    for index, (name, results) in enumerate(points.items(), start=1):
        axes.plot(
            [100 * r.cost for r in results],
            [r.score for r in results],
            linestyle="",
            marker="xs^vD*P"[index % 7],
            color=colour(name.split(",")[0].split()[0], index),
            label=name,
        )
    axes.plot([0], [base.score], marker="o", color=INK, linestyle="", label="before")
    axes.axvline(1.0, color=FAINT, linewidth=1, linestyle="dotted", label="1 % more perplexity")
    axes.axhline(wanted, color=FAINT, linewidth=1, linestyle="dashed", label=f"aim: {wanted:g}")
    titled(axes, title, "more perplexity on general text (%)", score)
    figure.legend(loc="outside lower center", ncols=2, fontsize=9, frameon=False)
    return figure
