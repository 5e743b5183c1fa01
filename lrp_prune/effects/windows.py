"""Windows of tokens cut from texts."""

import random
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


def windows(documents: Iterable[str], tokenizer: Any, count: int, length: int = 512, seed: int = 0) -> Tensor:
    """Cuts documents into windows of tokens: one of each document, in a seeded order, and more where needed.

    Args:
        documents: texts; those shorter than a window are joined with the ones that follow.
        tokenizer: the model's.
        count: how many windows.
        length: tokens in each window.
        seed: of the order and of the places in the documents.

    Returns:
        Token ids ``[count, length]``.

    Raises:
        ValueError: if the documents are too short for that many windows.

    Example:
        >>> def tokenizer(text, **options):
        ...     return {"input_ids": [int(word) for word in text.split()]}
        >>> windows(["1 2 3 4", "5 6"], tokenizer, count=2, length=2).shape
        torch.Size([2, 2])
    """
    picked, spare = _cut(documents, tokenizer, count, length, random.Random(seed))
    if len(picked) + len(spare) < count:
        raise ValueError(
            f"the documents hold {len(picked) + len(spare)} windows of {length} tokens, {count} are needed"
        )
    return torch.tensor([*picked, *spare][:count], device="cpu")


def up_to(documents: Iterable[str], tokenizer: Any, count: int, length: int, seed: int) -> Tensor:
    """As many windows as the documents have, ``count`` at most; what :func:`windows` gives where they suffice."""
    picked, spare = _cut(documents, tokenizer, count, length, random.Random(seed))
    return torch.tensor([*picked, *spare][:count], device="cpu").view(-1, length)


def _cut(
    documents: Iterable[str], tokenizer: Any, count: int, length: int, generator: random.Random
) -> tuple[list[list[int]], list[list[int]]]:
    order = list(documents)
    generator.shuffle(order)
    picked: list[list[int]] = []
    spare: list[list[int]] = []
    rest: list[int] = []
    for text in order:
        ids = rest + list(tokenizer(text, **_quiet(tokenizer))["input_ids"])
        pieces = [ids[start : start + length] for start in range(0, len(ids) - length + 1, length)]
        rest = [] if pieces else ids
        if pieces:
            picked.append(pieces.pop(generator.randrange(len(pieces))))
            spare.extend(pieces)
        if len(picked) == count:
            return picked, []
    generator.shuffle(spare)
    return picked, spare


def _quiet(tokenizer: Any) -> dict[str, bool]:
    """Hugging Face's tokenizers warn of texts that are longer than a model's context, and nothing here is given whole."""
    return {"verbose": False} if hasattr(tokenizer, "model_max_length") else {}
