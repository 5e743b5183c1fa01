"""From words to tokens: one prompt, its counterfactual of the same length, and the tokens that may follow."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol


class Tokenizer(Protocol):
    """What is needed of a tokenizer; those of Hugging Face are such."""

    def __call__(self, text: str, *, add_special_tokens: bool = True) -> Mapping[str, Any]:
        """``input_ids`` of one text, a list of integers."""


@dataclass(frozen=True)
class Prompt:
    """One sample in words.

    Args:
        clean: the prompt. What is predicted is the token after its last one.
        counterfactual: the same prompt with what matters changed; it must have as many tokens.
        answers: continuations that are right, with the space that precedes them where the tokenizer has one.
        distractors: continuations that are wrong.
        template: what kind of sentence this is; :meth:`~lrp_prune.tasks.Task.split` holds out some of them.
    """

    clean: str
    counterfactual: str
    answers: tuple[str, ...]
    distractors: tuple[str, ...]
    template: str = ""


@dataclass(frozen=True)
class Encoded:
    """One sample in tokens."""

    prompt: Prompt
    clean: tuple[int, ...]
    counterfactual: tuple[int, ...]
    answers: tuple[int, ...]
    distractors: tuple[int, ...]


def tokens(tokenizer: Tokenizer, text: str) -> tuple[int, ...]:
    """The text's tokens with what the tokenizer puts before it, without what it puts after it (end of text, separator)."""
    ids = [int(token) for token in tokenizer(text)["input_ids"]]
    special = {*getattr(tokenizer, "all_special_ids", ())} - {getattr(tokenizer, "unk_token_id", None)}
    while ids and ids[-1] in special:
        ids.pop()
    return tuple(ids)


def continuation(tokenizer: Tokenizer, prompt: str, text: str) -> tuple[int, ...]:
    """The tokens by which ``text`` continues ``prompt``; empty where the two are not tokenized one after the other.

    Example:
        >>> vocabulary = {"a": 0, "b": 1, "c": 2}
        >>> def tokenizer(text, add_special_tokens=True):
        ...     return {"input_ids": [vocabulary[word] for word in text.split()]}
        >>> continuation(tokenizer, "a b", " c")
        (2,)
    """
    return _after(tokens(tokenizer, prompt), tokens(tokenizer, prompt + text))


def _after(before: tuple[int, ...], both: tuple[int, ...]) -> tuple[int, ...]:
    return both[len(before) :] if both[: len(before)] == before else ()


def encode(tokenizer: Tokenizer, prompt: Prompt) -> Encoded:
    """The sample in tokens.

    Raises:
        ValueError: if the prompts differ in length or in nothing, an answer or distractor is not one token, there is none of
            either, or a token is both.
    """
    clean, counterfactual = tokens(tokenizer, prompt.clean), tokens(tokenizer, prompt.counterfactual)
    if len(clean) != len(counterfactual):
        raise ValueError(
            f"clean and counterfactual prompt must have equally many tokens, got {len(clean)} for {prompt.clean!r} and "
            f"{len(counterfactual)} for {prompt.counterfactual!r}: change words until they match"
        )
    if clean == counterfactual:
        raise ValueError(
            f"the counterfactual of {prompt.clean!r} is {prompt.counterfactual!r}, the same tokens, so that nothing would "
            "change: change the words that the answer depends on, by ones that the tokenizer knows"
        )
    answers = _single(tokenizer, prompt, clean, prompt.answers, "answer")
    distractors = _single(tokenizer, prompt, clean, prompt.distractors, "distractor")
    if set(answers) & set(distractors):
        raise ValueError(f"the answers and distractors of {prompt.clean!r} share a token")
    return Encoded(prompt, clean, counterfactual, answers, distractors)


def _single(
    tokenizer: Tokenizer, prompt: Prompt, clean: tuple[int, ...], texts: Iterable[str], what: str
) -> tuple[int, ...]:
    found: list[int] = []
    for text in texts:
        ids = _after(clean, tokens(tokenizer, prompt.clean + text))
        if len(ids) != 1:
            raise ValueError(
                f"the {what} {text!r} continues {prompt.clean!r} by {len(ids)} tokens: it must be a single token, written "
                "with the space before it"
            )
        found += ids
    if not found:
        raise ValueError(f"the prompt {prompt.clean!r} has no {what}: give at least one")
    return tuple(dict.fromkeys(found))


def words_of_one_token(tokenizer: Tokenizer, words: Iterable[str], carrier: str = "Then") -> list[str]:
    """The words that are one token after a space."""
    return [word for word in words if len(continuation(tokenizer, carrier, f" {word}")) == 1]
