"""Indirect object identification (Wang et al., arXiv 2211.00593)."""

import random
from collections.abc import Sequence

from lrp_prune.tasks.names import FEMALE, MALE
from lrp_prune.tasks.prompts import Encoded, Prompt, Tokenizer, encode, words_of_one_token
from lrp_prune.tasks.task import Task, divided

TEMPLATES: tuple[str, ...] = (
    "Then, {A} and {B} went to the store. {S} gave a drink to",
    "After {A} and {B} went to the park, {S} handed a ball to",
    "When {A} and {B} got a letter at the office, {S} decided to show it to",
    "Then, {A} and {B} had a long argument. Afterwards {S} said sorry to",
    "While {A} and {B} were working at the school, {S} passed a book to",
    "The old friends {A} and {B} met at the station, and {S} offered a seat to",
    "Last week {A} and {B} found a ring in the garden. {S} wanted to give it to",
    "Today {A} and {B} cooked together. In the kitchen {S} served some food to",
    "One evening {A} and {B} were playing music, and {S} lent a guitar to",
    "At the meeting {A} and {B} sat side by side. Soon {S} wrote a note to",
    "In the morning {A} and {B} walked to the market, where {S} sold a basket to",
    "Because {A} and {B} were late for the train, {S} threw the keys to",
    "Yesterday {A} and {B} talked about the news. Then {S} read the story to",
    "Near the river {A} and {B} set up a tent, and {S} brought some water to",
    "Before {A} and {B} left the house, {S} returned the money to",
    "All week {A} and {B} had worked on a plan. On Friday {S} explained it to",
)
"""Sentences; ``{A}`` and ``{B}`` are the two names, ``{S}`` the one that is repeated."""
ORDERS: tuple[str, ...] = ("ABBA", "BABA")
COUNTERFACTUALS: tuple[str, ...] = ("names", "swap")


class IndirectObject(Task):
    """ "Then, Mary and John went to the store. John gave a drink to" -> " Mary" rather than " John".

    Half of the prompts name the indirect object first (ABBA), half second (BABA). Names that are not one token of this
    tokenizer are left out.

    Args:
        tokenizer: any tokenizer of Hugging Face.
        samples: number of prompts.
        seed: of the choice of templates and names.
        counterfactual: ``"names"``: three other names in the three places, so that nothing is repeated (the ABC prompts
            of the paper); ``"swap"``: the repeated name replaced by the other, so that the answer changes sides.
        templates: sentences with ``{A}``, ``{B}`` and ``{S}``.
        names: first names to choose from.
        orders: ``"ABBA"``, ``"BABA"`` or both.
        metric: see :data:`~lrp_prune.tasks.METRICS`.

    Raises:
        ValueError: for wrong arguments, or fewer than five names of one token.

    Example:
        >>> words = "Mary John Anna Peter Paul met and gave a pen to".split()
        >>> def tokenizer(text, add_special_tokens=True):
        ...     return {"input_ids": [words.index(word) if word in words else 99 for word in text.split()]}
        >>> task = IndirectObject(tokenizer, samples=2, templates=["{A} and {B} met and {S} gave a pen to"], names=words[:5])
        >>> len(task), task.batches(2)[0]["input_ids"].shape
        (2, torch.Size([2, 10]))
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        samples: int = 128,
        seed: int = 0,
        counterfactual: str = "names",
        templates: Sequence[str] = TEMPLATES,
        names: Sequence[str] = (*FEMALE, *MALE),
        orders: Sequence[str] = ORDERS,
        metric: str = "logit_difference",
    ) -> None:
        if counterfactual not in COUNTERFACTUALS:
            raise ValueError(f"counterfactual must be one of {COUNTERFACTUALS}, got {counterfactual!r}")
        if not orders or not set(orders) <= set(ORDERS):
            raise ValueError(f"orders must be some of {ORDERS}, got {tuple(orders)}")
        for template in templates:
            if not all(place in template for place in ("{A}", "{B}", "{S}")):
                raise ValueError(f"template {template!r} must hold {{A}}, {{B}} and {{S}}")
        self.tokenizer, self.seed, self.counterfactual = tokenizer, seed, counterfactual
        self.templates, self.orders = tuple(templates), tuple(orders)
        self.names = tuple(words_of_one_token(tokenizer, names))
        if len(self.names) < 5:
            raise ValueError(f"only {len(self.names)} of {len(names)} names are one token: give names=, at least 5")
        super().__init__([self._sample(index, random.Random(f"{seed} {index}")) for index in range(samples)], metric)

    def _sample(self, index: int, choice: random.Random) -> Encoded:
        template = choice.choice(self.templates)
        order = self.orders[index % len(self.orders)]
        indirect, subject, *others = choice.sample(self.names, 5)
        first, second = (indirect, subject) if order == "ABBA" else (subject, indirect)
        clean = template.format(A=first, B=second, S=subject)
        if self.counterfactual == "swap":
            changed = template.format(A=first, B=second, S=indirect)
        else:
            changed = template.format(A=others[0], B=others[1], S=others[2])
        prompt = Prompt(clean, changed, (f" {indirect}",), (f" {subject}",), template)
        return encode(self.tokenizer, prompt)

    def _with(self, samples: int, seed: int, templates: Sequence[str], names: Sequence[str]) -> "IndirectObject":
        return IndirectObject(
            self.tokenizer, samples, seed, self.counterfactual, templates, names, self.orders, self.metric
        )

    def split(self, held_out: float = 0.5, seed: int = 0) -> tuple["IndirectObject", "IndirectObject"]:
        """Two tasks of as many samples as this one, with neither templates nor names in common."""
        templates = divided(self.templates, held_out, seed, 1, "templates")
        names = divided(self.names, held_out, seed, 5, "names")
        return (
            self._with(len(self), self.seed, templates[0], names[0]),
            self._with(len(self), self.seed + 1, templates[1], names[1]),
        )

    def resampled(self, seed: int, samples: int | None = None) -> "IndirectObject":
        """Other samples from the same templates and names; None: as many."""
        return self._with(len(self) if samples is None else samples, seed, self.templates, self.names)
