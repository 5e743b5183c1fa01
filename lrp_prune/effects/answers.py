"""The words of a model's answers: how many, how different, and how empty of content."""

import re
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from lrp_prune.effects.entries import Entry, Measured
from lrp_prune.models.outputs import answer_of
from lrp_prune.models.subject import subject_of

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


class Answers(Entry):
    """Words of the greedy answers to prompts: their number, the share of different ones, and the share of stop words.

    They are described, not judged: a correction may mean to change them. A limit for one of them is for changes either way.

    Args:
        prompts: token ids; prompts of equal length are answered together.
        tokenizer: what turns the answers' tokens into text, by its ``decode``.
        tokens: how many are generated for each.
        batch_size: prompts at once.

    Raises:
        ValueError: without prompts, or for a tokenizer that cannot decode.
    """

    unit = "mean"
    losses = False
    directed = False
    lines = ("words", "different words", "stop words")

    def __init__(
        self, prompts: Sequence[Sequence[int]], tokenizer: Any, tokens: int = 40, batch_size: int = 32
    ) -> None:
        if not prompts or not all(len(prompt) for prompt in prompts):
            raise ValueError("answers need prompts of at least one token each")
        if not callable(getattr(tokenizer, "decode", None)):
            raise ValueError(f"the words of answers need a tokenizer with decode, {type(tokenizer).__name__} has none")
        self.decode, self.tokens, self.samples = tokenizer.decode, tokens, len(prompts)
        by_length: dict[int, list[list[int]]] = {}
        for prompt in prompts:
            by_length.setdefault(len(prompt), []).append(list(prompt))
        self.parts = [
            torch.tensor(group[start : start + batch_size], device="cpu")
            for group in by_length.values()
            for start in range(0, len(group), batch_size)
        ]

    def measure(
        self, model: nn.Module, part: Any, before: Any = None, keep: bool = False
    ) -> tuple[dict[str, Measured], Any]:
        found = [
            _WORD.findall(self.decode(ids, skip_special_tokens=True).lower())
            for ids in greedy(model, part, self.tokens)
        ]
        lengths = _column(len(words) for words in found)
        return {
            "words": Measured(lengths, torch.ones_like(lengths)),
            "different words": Measured(
                _column(len(set(words)) / max(len(words), 1) for words in found), (lengths > 0).double()
            ),
            "stop words": Measured(_column(sum(word in STOP_WORDS for word in words) for words in found), lengths),
        }, None


def _column(numbers: Iterable[float]) -> torch.Tensor:
    return torch.tensor([float(number) for number in numbers], dtype=torch.float64, device="cpu")


def greedy(model: nn.Module, prompts: torch.Tensor, tokens: int) -> list[list[int]]:
    """Greedy answers to prompts ``[prompts, tokens]``, each up to the end of its text.

    By the model's own ``generate`` where it has one, else token by token from the whole text.
    """
    inner: Any = subject_of(model).module
    device = next((parameter.device for parameter in inner.parameters()), None)
    ids, width = prompts.to(device), prompts.shape[1]
    if getattr(getattr(inner, "config", None), "is_encoder_decoder", False):
        width = 1  # what is generated begins with the decoder's start token, not with the prompt
    configured = getattr(getattr(inner, "generation_config", None), "eos_token_id", None)
    ends = {configured} if isinstance(configured, int) else set(configured or ())
    if callable(getattr(inner, "generate", None)):
        ids = inner.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=tokens,
            do_sample=False,
            pad_token_id=min(ends, default=0),
        )
    else:
        for _ in range(tokens):
            following = answer_of(model, {"input_ids": ids}).logits[:, -1].argmax(-1, keepdim=True)
            ids = torch.cat([ids, following], 1)
    rows: list[list[int]] = ids[:, width:].tolist()
    return [row[: next((place for place, token in enumerate(row) if token in ends), len(row))] for row in rows]
