"""Greater-than (Hanna et al., arXiv 2305.00586): the later year."""

import random
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace

from lrp_prune.tasks.prompts import Encoded, Prompt, Tokenizer, continuation, encode
from lrp_prune.tasks.task import Task, divided

TEMPLATES: tuple[str, ...] = (
    "The {N} lasted from the year {Y} to the year {C}",
    "The {N} began in {Y} and ended in {C}",
    "They say that the {N} started in {Y} and went on until {C}",
    "From {Y} on there was a {N}, which was over in {C}",
)
"""Sentences that end with the century; ``{N}`` is a noun, ``{Y}`` the first year, ``{C}`` the century."""
NOUNS: tuple[str, ...] = tuple(
    "war campaign expedition project program reign journey dispute conflict trade study trial strike tour voyage".split()
)
CENTURIES: tuple[int, ...] = (14, 15, 16, 17, 18)
_ATTEMPTS = 50


class GreaterThan(Task):
    """ "The war lasted from the year 1732 to the year 17" -> a later year; the counterfactual begins in 1701.

    What follows "17" depends on the tokenizer, and so do the answers: the last two digits where all of them are one token
    (33 ... 99 against 02 ... 31), else the decade's digit (4 ... 9 against 0 ... 2), else, where years are one token, the
    prompt ends before the century and the answers are years.

    Args:
        tokenizer: any tokenizer of Hugging Face.
        samples: number of prompts.
        seed: of the choice of templates, nouns and years.
        templates: sentences with ``{N}``, ``{Y}`` and, at the end, ``{C}``.
        nouns: what lasts.
        centuries: the years' first two digits.
        metric: see :data:`~lrp_prune.tasks.METRICS`.

    Raises:
        ValueError: for wrong arguments, or a tokenizer that writes years in none of these ways.

    Example:
        >>> def tokenizer(text, add_special_tokens=True):
        ...     return {"input_ids": [ord(letter) for letter in text]}
        >>> task = GreaterThan(tokenizer, samples=1)
        >>> task.form, len(task.samples[0].answers + task.samples[0].distractors)
        ('digit', 9)
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        samples: int = 128,
        seed: int = 0,
        templates: Sequence[str] = TEMPLATES,
        nouns: Sequence[str] = NOUNS,
        centuries: Sequence[int] = CENTURIES,
        metric: str = "probability_difference",
    ) -> None:
        for template in templates:
            if not template.endswith(" {C}") or "{N}" not in template or "{Y}" not in template:
                raise ValueError(f"template {template!r} must hold {{N}} and {{Y}} and end with ' {{C}}'")
        self.tokenizer, self.seed, self.templates = tokenizer, seed, tuple(templates)
        self.nouns, self.centuries = tuple(nouns), tuple(centuries)
        self.form = self._form()
        super().__init__([self._sample(random.Random(f"{seed} {index}")) for index in range(samples)], metric)

    def _form(self) -> str:
        """``"digits"``, ``"digit"`` or ``"year"``: how the tokenizer writes what follows."""
        stem = self.templates[0].removesuffix(" {C}").format(N=self.nouns[0], Y=1732)
        endings = [
            len(continuation(self.tokenizer, f"{stem} {century}", f"{year:02d}"))
            for century in self.centuries
            for year in (2, 10, 32, 57, 99)
        ]
        # Most of them: GPT-2 has some whole years as tokens.
        ((usual, _),) = Counter(endings).most_common(1)
        if usual in (1, 2):
            return "digits" if usual == 1 else "digit"
        if all(
            len(continuation(self.tokenizer, stem, f" {century}{year:02d}")) == 1
            for century in self.centuries
            for year in range(2, 99)
        ):
            return "year"
        raise ValueError(
            "the tokenizer writes years neither as century and ending, nor digit by digit, nor as one token: use a "
            "TableTask with prompts for it"
        )

    def _sample(self, choice: random.Random) -> Encoded:
        """A prompt with all the answers and distractors that are one token; drawn again where there are none."""
        for _ in range(_ATTEMPTS):
            prompt = self._prompt(choice)
            try:
                return encode(self.tokenizer, prompt)
            except ValueError as error:
                reason = error
            answers, distractors = (
                tuple(text for text in texts if len(continuation(self.tokenizer, prompt.clean, text)) == 1)
                for texts in (prompt.answers, prompt.distractors)
            )
            with suppress(ValueError):
                return encode(self.tokenizer, replace(prompt, answers=answers, distractors=distractors))
        raise ValueError(f"none of {_ATTEMPTS} prompts can be used with this tokenizer, of the last {reason}")

    def _prompt(self, choice: random.Random) -> Prompt:
        template, noun, century = (
            choice.choice(self.templates),
            choice.choice(self.nouns),
            choice.choice(self.centuries),
        )
        # The first year leaves room on both sides, also where only the decade is asked for.
        year = choice.randint(11, 88)
        if self.form == "digit":
            decade = year // 10
            answers = [str(digit) for digit in range(decade + 1, 10)]
            distractors = [str(digit) for digit in range(decade)]
        else:
            prefix = "" if self.form == "digits" else f" {century}"
            answers = [f"{prefix}{ending:02d}" for ending in range(year + 1, 100)]
            distractors = [f"{prefix}{ending:02d}" for ending in range(2, year)]
            if self.form == "year":
                answers.pop()
        if self.form == "year":
            template = template.removesuffix(" {C}")
        clean = template.format(N=noun, Y=f"{century}{year:02d}", C=century)
        changed = template.format(N=noun, Y=f"{century}01", C=century)
        return Prompt(clean, changed, tuple(answers), tuple(distractors), template)

    def split(self, held_out: float = 0.5, seed: int = 0) -> tuple["GreaterThan", "GreaterThan"]:
        """Two tasks of as many samples as this one, with neither templates nor nouns in common."""
        templates = divided(self.templates, held_out, seed, 1, "templates")
        nouns = divided(self.nouns, held_out, seed, 1, "nouns")
        parts = [
            GreaterThan(
                self.tokenizer, len(self), self.seed + part, templates[part], nouns[part], self.centuries, self.metric
            )
            for part in (0, 1)
        ]
        return parts[0], parts[1]

    def resampled(self, seed: int, samples: int | None = None) -> "GreaterThan":
        """Other samples from the same templates, nouns and centuries; None: as many."""
        number = len(self) if samples is None else samples
        return GreaterThan(self.tokenizer, number, seed, self.templates, self.nouns, self.centuries, self.metric)
