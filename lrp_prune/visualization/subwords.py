"""What tokens are called, and which of them begin a word."""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

_MARKS = {"Ġ": True, "▁": True, "##": False}
"""How pieces of words are marked: at the beginning of a word, or (by ``##``) everywhere else."""
_PARTIAL, _MOST_BYTES = "\ufffd", 4
"""What a part of a letter is decoded to, and of how many parts one may be."""
_LOOKED_AT = 5000


def mark_of(tokenizer: Any) -> str | None:
    """The mark that a tokenizer's vocabulary has; None where it has none, and each token is a word.

    Example:
        >>> class Tokenizer:
        ...     def get_vocab(self):
        ...         return {"play": 0, "##ing": 1, "the": 2}
        >>> mark_of(Tokenizer())
        '##'
    """
    found: Counter[str] = Counter()
    for number, piece in enumerate(tokenizer.get_vocab()):
        found.update(mark for mark in _MARKS if piece.startswith(mark) and piece != mark)
        if number > _LOOKED_AT and found:
            break
    return found.most_common(1)[0][0] if found else None


def labelled(ids: Sequence[int], tokenizer: Any) -> tuple[list[str], list[bool]]:
    """The text of each token, with its blanks, and whether it begins a word; without a tokenizer the ids themselves.

    Args:
        ids: of the tokens.
        tokenizer: one of transformers, or what has its ``convert_ids_to_tokens``, ``convert_tokens_to_string``, ``get_vocab``
            and ``all_special_ids``; None if there is none.
    """
    if tokenizer is None:
        return [str(number) for number in ids], [True] * len(ids)
    special = frozenset(tokenizer.all_special_ids)
    mark = mark_of(tokenizer)
    pieces: list[str] = [str(piece) for piece in tokenizer.convert_ids_to_tokens(list(ids))]
    texts = _texts(pieces, [number in special for number in ids], tokenizer, mark)
    begins, alone = [], True
    for number, piece, text in zip(ids, pieces, texts, strict=True):
        by_itself = number in special or mark is None or not _is_word(text)
        marked = mark is not None and piece.startswith(mark)
        begin = by_itself or alone or (marked if mark is not None and _MARKS[mark] else not marked)
        begins.append(begin and text != "")
        alone = by_itself
    return texts, begins


def _is_word(text: str) -> bool:
    """Whether a piece can be a part of a word: it has a letter, or is a part of one (of several bytes)."""
    return text == "" or any(letter.isalnum() for letter in text)


def _texts(pieces: Sequence[str], special: Sequence[bool], tokenizer: Any, mark: str | None) -> list[str]:
    """What each piece adds to the text, with the blank before it; a letter of several pieces is the first one's."""
    texts: list[str] = []
    waiting: list[str] = []
    for piece, is_special in zip(pieces, special, strict=True):
        if is_special:
            texts.append(piece)
            waiting = []
        elif mark == "##":
            texts.append(piece.removeprefix(mark) if piece.startswith(mark) else f" {piece}")
        elif mark == "▁":
            texts.append(piece.replace(mark, " "))
        else:
            text = str(tokenizer.convert_tokens_to_string([*waiting, piece]))
            if waiting:
                texts[len(texts) - len(waiting)] = text
            texts.append("" if waiting else text)
            waiting = [*waiting, piece] if _PARTIAL in text and len(waiting) < _MOST_BYTES else []
    return texts


def words(labels: Sequence[str], begins: Iterable[bool]) -> list[list[int]]:
    """The positions of each word.

    Example:
        >>> words(["un", "like", "ly", " so"], [True, False, False, True])
        [[0, 1, 2], [3]]
    """
    found: list[list[int]] = []
    for position, begin in zip(range(len(labels)), begins, strict=True):
        if begin or not found:
            found.append([])
        found[-1].append(position)
    return found
