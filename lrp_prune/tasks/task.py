"""Tasks: prompts, batches without padding, and what is measured."""

import hashlib
import inspect
import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lrp_prune.models.profile import profile_of
from lrp_prune.names import unwrap
from lrp_prune.targets.tokens import last_logits
from lrp_prune.tasks.metrics import IGNORED, METRICS, batch_metric
from lrp_prune.tasks.prompts import Encoded

Batch = dict[str, Tensor]
_T = TypeVar("_T")


class Task(ABC):
    """Samples of a task: clean and counterfactual prompts of equal length, answers, distractors, and a metric.

    Subclasses make the samples. What they have in common:

    Args:
        samples: the samples in tokens.
        metric: what is measured by default, see :data:`~lrp_prune.tasks.METRICS`.

    Raises:
        ValueError: if there are no samples, or the metric is unknown.
    """

    def __init__(self, samples: Sequence[Encoded], metric: str) -> None:
        if metric not in METRICS:
            raise ValueError(f"metric must be one of {METRICS}, got {metric!r}")
        if not samples:
            raise ValueError(f"{type(self).__name__} has no samples")
        self.samples = tuple(samples)
        self.metric = metric

    def __len__(self) -> int:
        return len(self.samples)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self)} samples, metric {self.metric!r})"

    @abstractmethod
    def split(self, held_out: float = 0.5, seed: int = 0) -> tuple["Task", "Task"]:
        """Two tasks that share no template and, where there are names, no name: for discovery, and held out.

        Args:
            held_out: the share of templates (and names) of the second.
            seed: of the division.
        """

    @abstractmethod
    def resampled(self, seed: int, samples: int | None = None) -> "Task":
        """Other samples from the same templates and names, for intervals over seeds; None: as many."""

    @property
    def fingerprint(self) -> str:
        """A hash of all samples, by which evaluation on the prompts of the discovery is noticed."""
        digest = hashlib.sha256()
        for sample in self.samples:
            digest.update(repr((sample.clean, sample.counterfactual, sample.answers, sample.distractors)).encode())
        return digest.hexdigest()

    def batches(self, batch_size: int = 16) -> list[Batch]:
        """All samples in batches of prompts that are equally long, so that nothing is padded.

        Each is a dict of ``input_ids`` and ``counterfactual_ids`` ``[samples, tokens]``, ``attention_mask`` (ones) of
        that shape, and ``answers`` and ``distractors`` ``[samples, any]`` (filled up by -1). The order is that of the
        first sample of each length.

        Raises:
            ValueError: if the batch size is not positive.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        by_length: dict[int, list[Encoded]] = {}
        for sample in self.samples:
            by_length.setdefault(len(sample.clean), []).append(sample)
        return [
            _collate(group[start : start + batch_size])
            for group in by_length.values()
            for start in range(0, len(group), batch_size)
        ]

    def target(self, metric: str | None = None) -> Callable[[nn.Module, Any], Tensor]:
        """The metric summed over a batch's samples as a target of :func:`lrp_prune.attribute`.

        Raises:
            ValueError: for a metric that has no gradient (``accuracy``), or none at the full model (``kl``).
        """
        chosen = self.metric if metric is None else metric
        if chosen not in ("logit_difference", "probability_difference"):
            raise ValueError(
                f"metric {chosen!r} cannot be explained (its gradient vanishes): use 'logit_difference' or "
                "'probability_difference'"
            )

        def target(model: nn.Module, batch: Any) -> Tensor:
            return batch_metric(chosen, answer_logits(model, batch), batch).sum()

        target.__qualname__ = f"{type(self).__name__}.{chosen}"
        return target


def answer_logits(model: nn.Module, batch: Mapping[str, Tensor], counterfactual: bool = False) -> Tensor:
    """Run the model on a task's batch; the logits ``[samples, vocabulary]`` at the position before the answer.

    Raises:
        ValueError: the model has an encoder beside its decoder, is known not to continue a text, or has outputs that are no
            vocabulary.
    """
    kind = profile_of(model).kind
    if kind is not None and "next_token" not in kind.targets:
        raise ValueError(
            f"tasks continue a prompt: {type(unwrap(model)).__name__} is a {kind.task}, which predicts no next token, use a "
            "causal language model"
        )
    if profile_of(model).encoder_decoder:
        raise ValueError(
            f"tasks continue a prompt: {type(unwrap(model)).__name__} has an encoder, use a causal language model"
        )
    parameter = next(model.parameters(), None)
    device = parameter.device if parameter is not None else None
    ids = batch["counterfactual_ids" if counterfactual else "input_ids"].to(device)
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": batch["attention_mask"].to(device)}
    if "logits_to_keep" in inspect.signature(unwrap(model).forward).parameters:
        # Nothing is padded, so that the last position is the answer's: the others need no vocabulary. An index, since it
        # copies, where the slice of an integer is multiplied sample by sample.
        inputs["logits_to_keep"] = torch.tensor([ids.shape[1] - 1], device=ids.device)
    logits = last_logits(model, inputs)
    largest = int(max(batch["answers"].max(), batch["distractors"].max()))
    if logits.shape[-1] <= largest:
        raise ValueError(
            f"{type(unwrap(model)).__name__} has {logits.shape[-1]} outputs, and answers are tokens up to {largest}: use a "
            "causal language model with the tokenizer of the task"
        )
    return logits


def _collate(samples: Sequence[Encoded]) -> Batch:
    ids = torch.tensor([sample.clean for sample in samples], device="cpu")
    return {
        "input_ids": ids,
        "counterfactual_ids": torch.tensor([sample.counterfactual for sample in samples], device="cpu"),
        "attention_mask": torch.ones_like(ids),
        "answers": _filled([sample.answers for sample in samples]),
        "distractors": _filled([sample.distractors for sample in samples]),
    }


def _filled(rows: Sequence[Sequence[int]]) -> Tensor:
    width = max(len(row) for row in rows)
    return torch.tensor([[*row, *[IGNORED] * (width - len(row))] for row in rows], device="cpu")


def divided(items: Sequence[_T], held_out: float, seed: int, minimum: int, what: str) -> tuple[list[_T], list[_T]]:
    """Two disjoint parts of at least ``minimum`` items each, in their order, drawn by the seed.

    Raises:
        ValueError: if the share is not in (0, 1), or there are too few items.

    Example:
        >>> first, second = divided("abcd", 0.5, 0, 1, "letters")
        >>> sorted(first + second)
        ['a', 'b', 'c', 'd']
    """
    if not 0 < held_out < 1:
        raise ValueError(f"held_out must be in (0, 1), got {held_out}")
    if len(items) < 2 * minimum:
        raise ValueError(f"{len(items)} {what} cannot be split in two: at least {2 * minimum} are needed")
    number = min(max(round(held_out * len(items)), minimum), len(items) - minimum)
    second = set(random.Random(seed).sample(range(len(items)), number))
    return (
        [item for index, item in enumerate(items) if index not in second],
        [item for index, item in enumerate(items) if index in second],
    )
