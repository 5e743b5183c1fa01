r"""Repeating, rightly and wrongly: what a text repeats on purpose, and what a loop says again for want of anything better.

A model that copies a name, a term or a list from its context repeats tokens as one that is caught in a loop does. What parts the
two is the text: repeated tokens of a text that somebody wrote are right, those of a loop are not.
"""

from typing import Any

import torch
from torch import Tensor, nn

from lrp_prune.arguments import check_integer
from lrp_prune.models.batches import IGNORED, entry
from lrp_prune.targets.likelihood import log_likelihood
from lrp_prune.targets.margins import margins, predictions


def repeated(ids: Tensor, attended: Tensor | None = None, length: int = 1) -> Tensor:
    """Which tokens are the last of ``length`` tokens that their text had before, in this order.

    Args:
        ids: ``[samples, tokens]``.
        attended: of the same shape, what is text and not padding; None for all.
        length: 1 for tokens that the text had before.

    Returns:
        Bool ``[samples, tokens]``.

    Example:
        >>> repeated(torch.tensor([[5, 6, 7, 5, 6, 8, 6]])).tolist()
        [[False, False, False, True, True, False, True]]
        >>> repeated(torch.tensor([[5, 6, 7, 5, 6, 8, 6]]), length=2).tolist()
        [[False, False, False, False, True, False, False]]
    """
    check_integer("length", length, 1)
    if ids.dim() != 2:
        raise ValueError(f"ids must be [samples, tokens], got shape {tuple(ids.shape)}")
    found = torch.zeros(ids.shape, dtype=torch.bool, device="cpu")
    counted = torch.ones_like(found) if attended is None else (attended != 0).cpu()
    for row, (tokens, text) in enumerate(zip(ids.tolist(), counted, strict=True)):
        places = text.nonzero().view(-1).tolist()
        seen: set[tuple[int, ...]] = set()
        for end in range(length, len(places) + 1):
            several = tuple(tokens[place] for place in places[end - length : end])
            found[row, places[end - 1]] = several in seen
            seen.add(several)
    return found.to(ids.device)


def repeats_only(batch: Any, length: int = 1) -> dict[str, Any]:
    """A batch of a language model with labels for repeated tokens only, to learn from or to measure them by themselves.

    Args:
        batch: a mapping with ``input_ids``, and ``labels`` and ``attention_mask`` if there are any.
        length: see :func:`repeated`.

    Raises:
        ValueError: if it has no token ids.

    Example:
        >>> repeats_only({"input_ids": torch.tensor([[5, 6, 7, 5, 6, 8]])})["labels"]
        tensor([[-100, -100, -100,    5,    6, -100]])
    """
    ids = entry(batch, "input_ids")
    if ids is None:
        raise ValueError(f"repeated tokens are of a mapping with input_ids, got {type(batch).__name__}")
    labels, mask = entry(batch, "labels"), entry(batch, "attention_mask")
    again = repeated(ids, mask, length)
    return {**batch, "labels": (ids if labels is None else labels).masked_fill(~again, IGNORED)}


class RepeatedTokens:
    r"""How likely the tokens are that a text repeats: what a correction of repetition is to leave as it is.

    :math:`\sum_t \log p_t(x_t)` over the labelled tokens that end ``length`` tokens which the text had before, on texts that are
    as they should be: what people wrote, and second passes of copied sequences. A text without any adds nothing.

    Args:
        length: 1 for every token that the text had before, 2 and more for what continues a repetition.

    Raises:
        ValueError: on a call, if the batch has no ``labels`` of the shape of its ``input_ids``.

    Example:
        >>> RepeatedTokens(length=2)
        RepeatedTokens(length=2)
    """

    def __init__(self, length: int = 1) -> None:
        check_integer("length", length, 1)
        self.length = length

    def __repr__(self) -> str:
        return f"RepeatedTokens(length={self.length})"

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        ids, logits, labelled = predictions(model, batch, "RepeatedTokens")
        again = repeated(entry(batch, "input_ids"), entry(batch, "attention_mask"), self.length)[:, 1:]
        counted = labelled & again.to(labelled.device)
        return log_likelihood(logits, ids.to(logits.device).masked_fill(~counted, IGNORED))


class LoopMargin:
    r"""How clearly a response goes on in a loop, where it could say something new.

    The sum over the tokens :math:`x_t` that end ``length`` tokens which the text had before, of
    :math:`\ell_t(x_t) - \max_{v \notin \{x_s : s < t\}} \ell_t(v)`: the logit of the token that goes on with the loop minus that
    of the token that breaks it, the best that the whole text, prompt included, does not have yet. Only what is labelled counts.
    With ``length=1`` it differs from :class:`~lrp_prune.targets.RepetitionMargin` by the prompt alone.

    Args:
        length: 2 and more leave out single words that any text repeats.
        first: only the first so many of each response, those that lead into a loop; None for all.

    Raises:
        ValueError: on a call, if the batch has no ``labels`` of the shape of its ``input_ids``, or no response at all.

    Example:
        >>> LoopMargin(length=3)
        LoopMargin(length=3, first=None)
    """

    def __init__(self, length: int = 2, first: int | None = None) -> None:
        check_integer("length", length, 1)
        if first is not None:
            check_integer("first", first, 1)
        self.length, self.first = length, first

    def __repr__(self) -> str:
        return f"LoopMargin(length={self.length}, first={self.first})"

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        ids, logits, labelled = predictions(model, batch, "LoopMargin")
        given, mask = entry(batch, "input_ids"), entry(batch, "attention_mask")
        again = repeated(given, mask, self.length)[:, 1:].to(labelled.device) & labelled
        total = logits[..., :0].sum()  # zero, and of the logits where nothing is added
        for row, scores in enumerate(logits):
            places = again[row].nonzero().view(-1)[: self.first]
            if len(places):
                text = torch.ones_like(given[row], dtype=torch.bool) if mask is None else mask[row] != 0
                had = _had_before(given[row], text, places.to(given.device) + 1, scores.shape[-1]).to(scores.device)
                total = total + margins(scores[places], ids[row].to(scores.device)[places], had).sum()
        return total


def _had_before(tokens: Tensor, text: Tensor, places: Tensor, vocabulary: int) -> Tensor:
    """``[places, vocabulary]``: True for what a text has before each place."""
    had = torch.zeros(len(places), vocabulary, dtype=torch.bool, device=tokens.device)
    for row, place in enumerate(places.tolist()):
        had[row, tokens[:place][text[:place]]] = True
    return had
