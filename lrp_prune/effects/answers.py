"""A model's greedy answers: their words, and whether they show a behaviour."""

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn

from lrp_prune.effects.entries import Entry, Measured
from lrp_prune.effects.generating import greedy

STOP_WORDS: frozenset[str] = frozenset(
    """
    a about above after again against all am an and any are as at be because been before being below between both but by can
    could did do does doing down during each few for from further had has have having he her here hers herself him himself his
    how i if in into is it its itself just me more most my myself no nor not now of off on once only or other our ours ourselves
    out over own same she should so some such than that the their theirs them themselves then there these they this those
    through to too under until up very was we were what when where which while who whom why will with would you your yours
    yourself yourselves
    """.split()
)
"""English words without content."""
_WORD = re.compile(r"[^\W_]+(?:['\u2019-][^\W_]+)*")


class Greedy(Entry):
    """Something about the greedy answers to prompts. It is described, not judged: a correction may mean to change it.

    A limit for one of them is for changes either way.

    Args:
        prompts: token ids; prompts of about the same length are answered together.
        tokenizer: what turns the answers' tokens into text, by its ``decode``.
        tokens: how many are generated for each.
        batch_size: prompts at once.

    Raises:
        ValueError: without prompts, or for a tokenizer that cannot decode.
    """

    unit = "mean"
    losses = False
    directed = False

    def __init__(
        self, prompts: Sequence[Sequence[int]], tokenizer: Any, tokens: int = 40, batch_size: int = 32
    ) -> None:
        if not prompts or not all(len(prompt) for prompt in prompts):
            raise ValueError("answers need prompts of at least one token each")
        if not callable(getattr(tokenizer, "decode", None)):
            raise ValueError(f"the words of answers need a tokenizer with decode, {type(tokenizer).__name__} has none")
        self.decode, self.tokens, self.samples = tokenizer.decode, tokens, len(prompts)
        ordered = sorted((list(prompt) for prompt in prompts), key=len)
        self.parts = [ordered[start : start + batch_size] for start in range(0, len(ordered), batch_size)]

    def values(self, model: nn.Module, part: Any) -> dict[str, Measured]:
        return self.judged([self.decode(ids, skip_special_tokens=True) for ids in greedy(model, part, self.tokens)])

    def judged(self, texts: Sequence[str]) -> dict[str, Measured]:
        """The values of answers, by the names of :attr:`lines`."""
        raise NotImplementedError


class Answers(Greedy):
    """Words of the greedy answers to prompts: their number, the share of different ones, and the share of stop words."""

    lines = ("words", "different words", "stop words")

    def judged(self, texts: Sequence[str]) -> dict[str, Measured]:
        found = [_WORD.findall(text.lower()) for text in texts]
        lengths = _column(len(words) for words in found)
        return {
            "words": Measured(lengths, torch.ones_like(lengths)),
            "different words": Measured(
                _column(len(set(words)) / max(len(words), 1) for words in found), (lengths > 0).double()
            ),
            "stop words": Measured(_column(sum(word in STOP_WORDS for word in words) for words in found), lengths),
        }


class Shown(Greedy):
    """The share of greedy answers to prompts that show a behaviour.

    Args:
        prompts: token ids.
        tokenizer: the model's.
        shows: from the text of an answer to whether it shows the behaviour, or how much of it, in [0, 1].
        tokens: how many are generated for each.
        batch_size: prompts at once.
    """

    unit = "share of answers"

    def __init__(
        self,
        prompts: Sequence[Sequence[int]],
        tokenizer: Any,
        shows: Callable[[str], float],
        tokens: int = 40,
        batch_size: int = 32,
    ) -> None:
        super().__init__(prompts, tokenizer, tokens, batch_size)
        self.shows = shows

    def judged(self, texts: Sequence[str]) -> dict[str, Measured]:
        found = _column(float(self.shows(text)) for text in texts)
        return {"": Measured(found, torch.ones_like(found))}


def _column(numbers: Iterable[float]) -> torch.Tensor:
    return torch.tensor([float(number) for number in numbers], dtype=torch.float64, device="cpu")
