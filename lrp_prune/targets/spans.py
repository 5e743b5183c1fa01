"""A target for question answering, whose answer is a span of the text."""

from typing import Any

import torch
from torch import Tensor, nn

from lrp_prune.models.batches import SPANS, entry
from lrp_prune.models.calling import call_of, called
from lrp_prune.models.outputs import noting
from lrp_prune.models.profile import profile_of


class AnswerSpan:
    r"""The logits of the answer's first and last token, :math:`\sum z^{\mathrm{start}}_{s} + z^{\mathrm{end}}_{e}`.

    The batch has ``start_positions`` and ``end_positions``, ``[samples]``; positions outside of the text are left out, as the
    models' own loss does. Logits ``[samples, tokens]`` are the output's ``start_logits`` and ``end_logits``, or a pair.

    Raises:
        ValueError: on a call, if the batch has no positions, none of them is in the text, or the output has no such logits.

    Example:
        >>> class Reader(nn.Module):
        ...     def forward(self, x):
        ...         return x, -x
        >>> answer = {"start_positions": torch.tensor([2]), "end_positions": torch.tensor([0])}
        >>> AnswerSpan()(Reader(), {"x": torch.tensor([[1.0, 2.0, 3.0]]), **answer})
        tensor(2.)
    """

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        positions = span_positions(batch)
        if positions is None:
            raise ValueError(f"target 'span' needs {' and '.join(SPANS)} in the batch")
        logits = span_logits(model, batch)
        total, counted = logits[0].new_zeros(()), False
        for scores, given in zip(logits, positions, strict=True):
            places = given.view(-1).long().to(scores.device)
            inside = (places >= 0) & (places < scores.shape[1])
            chosen = scores.gather(1, places.clamp(0, scores.shape[1] - 1)[:, None])[:, 0]
            total = total + torch.where(inside, chosen, 0.0).sum()
            counted = counted or bool(inside.any())
        if not counted:
            raise ValueError("no start or end position of the batch is in its text: nothing can be explained by 'span'")
        return total


def span_positions(batch: Any) -> tuple[Tensor, Tensor] | None:
    """Where the answers begin and end, ``[samples]`` each; None if the batch does not say."""
    start, end = (entry(batch, name) for name in SPANS)
    return (start, end) if isinstance(start, Tensor) and isinstance(end, Tensor) else None


def span_logits(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
    """Run the model; its logits of starts and of ends.

    Raises:
        ValueError: if it returns none.
    """
    with noting(profile_of(model)) as inside:
        output = called(model, call_of(model, batch))
    found = spans_in(output) or (spans_in(inside.outputs[0]) if len(inside.outputs) == 1 else None)
    if found is None:
        raise ValueError(
            f"target 'span' needs start_logits and end_logits in the output, {profile_of(model).name} returned "
            f"{type(output).__name__}"
        )
    return found


def spans_in(output: Any) -> tuple[Tensor, Tensor] | None:
    """The logits of starts and ends in an output, ``[samples, tokens]`` each."""
    named = [entry(output, name) for name in ("start_logits", "end_logits")]
    if any(value is None for value in named) and isinstance(output, tuple | list):
        named = [value for value in output if isinstance(value, Tensor) and value.dim() == 2]
    if len(named) != 2 or not all(isinstance(value, Tensor) and value.dim() == 2 for value in named):
        return None
    return named[0], named[1]
