"""Gendered pronouns (Mathwin et al. 2023; task GP of arXiv 2512.10903)."""

import random
from collections.abc import Sequence

from lrp_prune.tasks.names import FEMALE, MALE
from lrp_prune.tasks.prompts import Encoded, Prompt, Tokenizer, encode, words_of_one_token
from lrp_prune.tasks.task import Task, divided

TEMPLATES: tuple[str, ...] = (
    "So {N} is a really great friend, isn't",
    "I think {N} is such a good cook, isn't",
    "Everyone says that {N} was very happy, wasn't",
    "That {N} can sing quite well, can't",
    "My neighbour {N} will come to the party, won't",
    "The teacher told me that {N} has finished the work, hasn't",
)
"""Tag questions; ``{N}`` is the name."""


class GenderedPronoun(Task):
    """ "So Mary is a really great friend, isn't" -> " she" rather than " he"; the counterfactual has a name of the other kind.

    Args:
        tokenizer: any tokenizer of Hugging Face.
        samples: number of prompts; every second has a female name.
        seed: of the choice of templates and names.
        templates: sentences with ``{N}``.
        female: names that go with " she".
        male: names that go with " he".
        metric: see :data:`~lrp_prune.tasks.METRICS`.

    Raises:
        ValueError: for wrong arguments, or if no name of a kind is one token.

    Example:
        >>> words = "Mary John is kind, isn't she he".split()
        >>> def tokenizer(text, add_special_tokens=True):
        ...     return {"input_ids": [words.index(word) if word in words else 99 for word in text.split()]}
        >>> task = GenderedPronoun(tokenizer, 2, templates=["{N} is kind, isn't"], female=["Mary"], male=["John"])
        >>> task.samples[0].prompt.clean, task.samples[0].prompt.answers
        ("Mary is kind, isn't", (' she',))
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        samples: int = 128,
        seed: int = 0,
        templates: Sequence[str] = TEMPLATES,
        female: Sequence[str] = FEMALE,
        male: Sequence[str] = MALE,
        metric: str = "logit_difference",
    ) -> None:
        for template in templates:
            if "{N}" not in template:
                raise ValueError(f"template {template!r} must hold {{N}}")
        self.tokenizer, self.seed, self.templates = tokenizer, seed, tuple(templates)
        self.female = tuple(words_of_one_token(tokenizer, female))
        self.male = tuple(words_of_one_token(tokenizer, male))
        if not self.female or not self.male:
            raise ValueError(
                f"{len(self.female)} female and {len(self.male)} male names are one token: give female= and male="
            )
        super().__init__([self._sample(index, random.Random(f"{seed} {index}")) for index in range(samples)], metric)

    def _sample(self, index: int, choice: random.Random) -> Encoded:
        template = choice.choice(self.templates)
        woman, man = choice.choice(self.female), choice.choice(self.male)
        name, other = (woman, man) if index % 2 == 0 else (man, woman)
        pronouns = (" she", " he") if index % 2 == 0 else (" he", " she")
        prompt = Prompt(template.format(N=name), template.format(N=other), pronouns[:1], pronouns[1:], template)
        return encode(self.tokenizer, prompt)

    def split(self, held_out: float = 0.5, seed: int = 0) -> tuple["GenderedPronoun", "GenderedPronoun"]:
        """Two tasks of as many samples as this one, with neither templates nor names in common."""
        templates = divided(self.templates, held_out, seed, 1, "templates")
        female = divided(self.female, held_out, seed, 1, "female names")
        male = divided(self.male, held_out, seed, 1, "male names")
        parts = [
            GenderedPronoun(
                self.tokenizer, len(self), self.seed + part, templates[part], female[part], male[part], self.metric
            )
            for part in (0, 1)
        ]
        return parts[0], parts[1]

    def resampled(self, seed: int, samples: int | None = None) -> "GenderedPronoun":
        """Other samples from the same templates and names; None: as many."""
        number = len(self) if samples is None else samples
        return GenderedPronoun(self.tokenizer, number, seed, self.templates, self.female, self.male, self.metric)
