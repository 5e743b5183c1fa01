"""Entries of a suite: what is measured on a model, sample by sample, and how far its distributions are from those before."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lrp_prune.models.outputs import answer_of
from lrp_prune.models.states import eager, unchanged_state, undisturbed
from lrp_prune.tasks.metrics import kl_divergence
from lrp_prune.tasks.task import Task, answer_logits

IGNORED = -100


class Measured(NamedTuple):
    """Sums over the tokens (or answers) of each sample; their mean is taken over all samples together.

    Attributes:
        totals: float64 ``[samples]``.
        counts: how many were summed, ``[samples]``.
        divergence: sums of the divergence from the distributions before, float64 ``[samples]``; None where there are none.
    """

    totals: Tensor
    counts: Tensor
    divergence: Tensor | None = None

    @property
    def mean(self) -> Tensor:
        """Over all samples together; NaN where nothing was counted."""
        return self.totals.double().sum() / self.counts.double().sum()


class Entry:
    """Something that a model does, in parts that fit into memory.

    Attributes:
        parts: what :meth:`measure` is called with, one after the other.
        samples: how many there are in all parts; None if that is not known before.
        unit: of the value, in a word.
        losses: whether what is summed are losses in nats, whose value is the exp of their mean; else it is the mean.
        directed: whether more is worse. What is only described has no limit unless it is named.
        lines: the names of the values that are measured; one without a name has the entry's.
    """

    parts: Sequence[Any]
    samples: int | None = None
    unit: str = "perplexity"
    losses: bool = True
    directed: bool = True
    lines: tuple[str, ...] = ("",)

    def measure(
        self, model: nn.Module, part: Any, before: Any = None, keep: bool = False
    ) -> tuple[dict[str, Measured], Any]:
        """What the model does on a part, and what that is compared with.

        Args:
            model: the model, in evaluation mode and without gradients.
            part: one of :attr:`parts`.
            before: what this returned beside the values for the model before, from which the divergence is taken.
            keep: whether to return that.

        Returns:
            Values by the names of :attr:`lines`, and with ``keep`` what others are compared with; None where there is no
            divergence, as in what has :meth:`values` only.
        """
        return self.values(model, part), None

    def values(self, model: nn.Module, part: Any) -> dict[str, Measured]:
        """What the model does on a part, of an entry without a divergence."""
        raise NotImplementedError(f"{type(self).__name__} defines neither measure nor values")

    def value(self, mean: Tensor) -> Tensor:
        """What a mean is shown as."""
        return mean.exp() if self.losses else mean


def line_name(entry: str, line: str) -> str:
    """What a line of an entry is called in tables and limits."""
    return f"{entry}: {line}" if line else entry


@contextmanager
def measuring(model: nn.Module) -> Iterator[None]:
    """A model in evaluation mode and without gradients, which comes out as it went in."""
    with torch.no_grad(), eager(model), undisturbed(model), unchanged_state(model):
        yield


def value_of(entry: Entry, model: nn.Module) -> float:
    """One number, over all of an entry's samples and lines."""
    with measuring(model):
        found = [values for part in entry.parts for values in entry.measure(model, part)[0].values()]
    totals, counts = (torch.cat(column) for column in zip(*((each.totals, each.counts) for each in found), strict=True))
    return float(entry.value(Measured(totals, counts).mean))


class Likelihood(Entry):
    """Perplexity of the labelled tokens of batches, and the divergence from the model before at these places.

    Args:
        batches: of a causal language model: token ids, or mappings with ``input_ids`` ``[samples, tokens]``, an
            ``attention_mask`` where tokens are padded, and ``labels`` (at the tokens' own places, -100 for what does not count;
            without them every token counts).
        directed: whether more is worse; not so for what a correction means to make less likely.

    Raises:
        ValueError: if there is no batch, one has no token ids, or nothing in one counts.

    Example:
        >>> entry = Likelihood([{"input_ids": torch.tensor([[1, 2, 3]])}])
        >>> class Uniform(nn.Module):
        ...     def forward(self, input_ids):
        ...         return torch.zeros(*input_ids.shape, 10)
        >>> (values, _) = entry.measure(Uniform(), entry.parts[0])
        >>> round(float((values[""].totals / values[""].counts).exp()), 3)
        10.0
    """

    def __init__(self, batches: Iterable[Mapping[str, Any] | Tensor], directed: bool = True) -> None:
        self.directed = directed
        self.parts = [_labelled(batch, number) for number, batch in enumerate(batches, 1)]
        if not self.parts:
            raise ValueError("a text needs at least one batch of tokens, there is none")
        self.samples = sum(len(part["input_ids"]) for part in self.parts)

    def measure(
        self, model: nn.Module, part: Any, before: Any = None, keep: bool = False
    ) -> tuple[dict[str, Measured], Any]:
        device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
        labels = part["labels"]
        inputs = {name: value.to(device) for name, value in part.items() if name != "labels"}
        logits = answer_of(model, inputs).logits
        if logits.dim() != 3 or logits.shape[:2] != labels.shape:
            raise ValueError(
                f"a text is for a model with logits [samples, tokens, vocabulary], got {list(logits.shape)} for tokens "
                f"{list(labels.shape)}: give a function from the model to losses instead"
            )
        totals, divergences, kept = [], [], []
        for row, label in enumerate(labels):
            places = (label[1:] != IGNORED).nonzero().view(-1)
            picked = logits[row, places.to(logits.device)].float()
            totals.append(F.cross_entropy(picked, label[1:][places].to(picked.device), reduction="sum").double().cpu())
            if keep:
                kept.append(picked)
            if before is not None:
                divergences.append(kl_divergence(before[row], picked).sum(dtype=torch.float64).cpu())
        counts = (labels[:, 1:] != IGNORED).sum(1)
        divergence = torch.stack(divergences) if divergences else None
        return {"": Measured(torch.stack(totals), counts, divergence)}, kept if keep else None


class Choice(Entry):
    r"""How surely a task's right answers are chosen over the wrong ones: :math:`-\log(p_a / (p_a + p_d))`.

    Its perplexity is 1 for a model that always chooses right and 2 for a coin; the divergence is that of the whole vocabulary.

    Args:
        task: of :mod:`lrp_prune.tasks`.
        batch_size: prompts at once.
    """

    def __init__(self, task: Task, batch_size: int = 16) -> None:
        self.parts, self.samples = task.batches(batch_size), len(task)

    def measure(
        self, model: nn.Module, part: Any, before: Any = None, keep: bool = False
    ) -> tuple[dict[str, Measured], Any]:
        log_p = answer_logits(model, part).float().log_softmax(-1)
        right, wrong = (
            log_p.gather(1, ids.clamp(min=0)).masked_fill(ids < 0, -torch.inf).logsumexp(1)
            for ids in (part[name].to(log_p.device) for name in ("answers", "distractors"))
        )
        losses = (torch.logaddexp(right, wrong) - right).double().cpu()
        divergence = None if before is None else kl_divergence(before, log_p).double().cpu()
        return {"": Measured(losses, torch.ones_like(losses), divergence)}, log_p if keep else None


class Losses(Entry):
    """Any function of the model that returns a loss for each sample; for models that are no language models, too.

    Args:
        function: from the model to losses ``[samples]`` (in nats, lower is better), the same samples in the same order each time.

    Example:
        >>> entry = Losses(lambda model: model(torch.ones(3, 2)).square().sum(1))
        >>> entry.measure(nn.Linear(2, 2), None)[0][""].counts.tolist()
        [1.0, 1.0, 1.0]
    """

    unit = "exp of the loss"
    parts = (None,)

    def __init__(self, function: Callable[[nn.Module], Any]) -> None:
        self.function = function

    def values(self, model: nn.Module, part: Any) -> dict[str, Measured]:
        losses = torch.as_tensor(self.function(model)).detach().double().cpu()
        if losses.dim() != 1 or not len(losses):
            raise ValueError(
                f"a function of a suite must return a loss for each sample, [samples], got shape {tuple(losses.shape)}: "
                "do not average them, intervals are over samples"
            )
        return {"": Measured(losses, torch.ones_like(losses))}


def _labelled(batch: Any, number: int) -> dict[str, Tensor]:
    given = {"input_ids": batch} if isinstance(batch, Tensor) else batch
    ids = given.get("input_ids") if isinstance(given, Mapping) else None
    if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.is_floating_point():
        raise ValueError(
            f"batch {number} has no token ids: give a mapping with 'input_ids' [samples, tokens], got {type(batch).__name__}"
        )
    known = {name: value for name, value in given.items() if isinstance(value, Tensor)}
    mask = known.get("attention_mask")
    labels = known.get("labels", ids).clone()
    if mask is not None:
        labels[mask == 0] = IGNORED
        labels[:, 1:][mask[:, :-1] == 0] = IGNORED  # predicted from padding
    if not bool((labels[:, 1:] != IGNORED).any()):
        raise ValueError(
            f"batch {number} has nothing to predict: its labels are -100, or each sample has one token only"
        )
    return {**known, "labels": labels}
