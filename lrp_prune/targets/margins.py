r"""Margins: by how much tokens that should not be said win over the best that may be said.

A greedy continuation says the token with the largest logit. What decides between an undesired token and another one is
therefore the difference of two logits, not a probability; it is what a correction has to turn.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lrp_prune.models.batches import IGNORED, entry
from lrp_prune.models.calling import labels_of
from lrp_prune.models.outputs import logits_for


class RepetitionMargin:
    r"""How clearly a response prefers to repeat itself.

    The sum over the tokens :math:`x_t` of a response that the response has already, of
    :math:`\ell_t(x_t) - \max_{v \notin \{x_s : s < t\}} \ell_t(v)`: the logit of the repeated token minus the best logit
    among tokens that the response does not have yet. What belongs to the response is labelled; the prompt, and padding, have
    the label -100. A response without any repetition adds nothing.

    Args:
        first: only the first so many repetitions of each response, those that lead into a loop; None for all.

    Raises:
        ValueError: on a call, if the batch has no ``labels`` of the shape of its ``input_ids``, or no response at all.

    Example:
        >>> RepetitionMargin()
        RepetitionMargin(first=None)
    """

    def __init__(self, first: int | None = None) -> None:
        if first is not None and (isinstance(first, bool) or not isinstance(first, int) or first < 1):
            raise ValueError(f"first must be a count of at least 1 or None, got {first!r}")
        self.first = first

    def __repr__(self) -> str:
        return f"RepetitionMargin(first={self.first})"

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        ids, logits, labelled = predictions(model, batch, "RepetitionMargin")
        total = logits[..., :0].sum()  # zero, and of the logits where nothing is added
        for tokens, scores, counted in zip(ids, logits, labelled, strict=True):
            places = counted.nonzero().view(-1)
            said = tokens[places]
            used = _used_before(said, scores.shape[-1])
            again = used.gather(1, said[:, None]).view(-1).nonzero().view(-1)[: self.first]
            if len(again):
                total = total + margins(scores[places[again]], said[again], used[again]).sum()
        return total


class TokenMargin:
    r"""How clearly labelled tokens win over all tokens that are allowed instead.

    The sum over labelled tokens of :math:`\ell_t(x_t) - \max_{v \notin A} \ell_t(v)` with the tokens :math:`A` to avoid. A
    token that is labelled is itself no alternative.

    Args:
        avoid: ids of tokens that are no alternatives: everything undesired.

    Raises:
        ValueError: if an id is negative; on a call, if the batch has no labels of the shape of its ``input_ids``, nothing is
            labelled, or an id is outside of the vocabulary.

    Example:
        >>> TokenMargin([7, 9])
        TokenMargin(2 tokens to avoid)
    """

    def __init__(self, avoid: Iterable[int]) -> None:
        self.avoid = tuple(sorted({int(token) for token in avoid}))
        if self.avoid and self.avoid[0] < 0:
            raise ValueError(f"token ids to avoid must not be negative, got {self.avoid[0]}")

    def __repr__(self) -> str:
        return f"TokenMargin({len(self.avoid)} tokens to avoid)"

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        ids, logits, labelled = predictions(model, batch, "TokenMargin")
        if self.avoid and self.avoid[-1] >= logits.shape[-1]:
            raise ValueError(
                f"token {self.avoid[-1]} to avoid is outside of the vocabulary of {logits.shape[-1]} tokens"
            )
        tokens = ids[labelled]
        avoided = torch.zeros(logits.shape[-1], dtype=torch.bool, device=logits.device)
        avoided[list(self.avoid)] = True
        return margins(logits[labelled], tokens, avoided.expand(len(tokens), -1)).sum()


def margins(logits: Tensor, tokens: Tensor, avoided: Tensor) -> Tensor:
    """Logit of each token ``[tokens, vocabulary]`` minus the best that is neither avoided nor the token itself."""
    own = tokens[:, None]
    best = logits.masked_fill(avoided.scatter(1, own, True), float("-inf")).amax(1)
    return logits.gather(1, own).view(-1) - best


def _used_before(said: Tensor, vocabulary: int) -> Tensor:
    """``[tokens, vocabulary]``: True for what was said before each token."""
    used = torch.zeros(len(said) + 1, vocabulary, dtype=torch.bool, device=said.device)
    for place, token in enumerate(said.tolist()):
        used[place + 1] = used[place]
        used[place + 1, token] = True
    return used[:-1]


def predictions(model: nn.Module, batch: Any, target: str) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens from the second on, the logits that predicted them, and which of them are labelled."""
    ids, labels, mask = entry(batch, "input_ids"), labels_of(model, batch), entry(batch, "attention_mask")
    if ids is None or labels is None or labels.shape != ids.shape or ids.dim() != 2:
        raise ValueError(
            f"{target} needs input_ids and labels of one shape [batch, tokens]; labels are -100 for all that is not meant"
        )
    labelled = labels != IGNORED
    if mask is not None:
        labelled = labelled & (mask != 0)
    if not bool(labelled[:, 1:].any()):
        raise ValueError(f"{target} has nothing to explain: no token but the first is labelled and attended to")
    logits = logits_for(model, batch)
    # Differences of large logits need more than half precision.
    logits = logits[:, :-1].to(torch.promote_types(logits.dtype, torch.float32))
    return ids[:, 1:], logits, labelled[:, 1:].to(logits.device)
