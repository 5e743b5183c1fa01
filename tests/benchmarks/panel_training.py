"""What a model of the panel learns, how it is trained, and how it is judged."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.benchmarks.panel_data import Batch, Data, Split


@dataclass(frozen=True)
class Case:
    """One kind of model on one kind of data.

    Args:
        name: what it is called in tables.
        build: an untrained model.
        data: from a seed.
        loss: of a model on a batch, for the training.
        score: of a model's outputs on a batch: sum over what is judged, and how many that is; higher is better.
        chance: the score of a model that knows nothing, or what computes it.
        epochs: of the training; none: the model comes trained, and is pruned in one shot alone.
        rate: the training's largest learning rate.
        include: weights that are pruned; None: those that are by default.
        target: what is explained; None: inferred.
    """

    name: str
    build: Callable[[], nn.Module]
    data: Callable[[int], Data]
    loss: Callable[[nn.Module, Batch], Tensor]
    score: Callable[[nn.Module, Batch], tuple[float, int]]
    chance: float | Callable[[], float]
    epochs: float = 10
    rate: float = 2e-3
    include: tuple[str, ...] | None = None
    target: Any = None
    options: dict[str, Any] = field(default_factory=dict)


def score_of(case: Case, model: nn.Module, batches: Split) -> float:
    """The mean score over batches."""
    model.eval()
    total, number = 0.0, 0
    with torch.no_grad():
        for batch in batches:
            value, count = case.score(model, batch)
            total, number = total + value, number + count
    return total / max(number, 1)


def train(case: Case, model: nn.Module, batches: Split, epochs: float, rate: float, seed: int) -> Iterator[None]:
    """An ordinary training: AdamW, the rate rising for a tenth of the time and then falling to zero; yields after each step."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.01)
    steps = max(round(epochs * len(batches)), 1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / (0.1 * steps + 1), 0.5 + 0.5 * math.cos(math.pi * step / steps))
    )
    generator, order = torch.Generator().manual_seed(seed), []
    for _ in range(steps):
        if not order:
            order = torch.randperm(len(batches), generator=generator).tolist()
        model.train()
        loss = case.loss(model, batches[order.pop()])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        yield


def class_loss(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(class_logits(model, batch), labels_of(batch))


def class_logits(model: nn.Module, batch: Batch) -> Tensor:
    if isinstance(batch, dict):
        logits: Tensor = model(**{name: value for name, value in batch.items() if name != "labels"}).logits
    else:
        logits = model(batch[0])
    return logits


def labels_of(batch: Batch) -> Tensor:
    labels: Tensor = batch["labels"] if isinstance(batch, dict) else batch[1]
    return labels


def accuracy(model: nn.Module, batch: Batch) -> tuple[float, int]:
    labels = labels_of(batch)
    return float((class_logits(model, batch).argmax(-1) == labels).sum()), labels.numel()


def own_loss(model: nn.Module, batch: Batch) -> Tensor:
    loss: Tensor = model(**batch).loss
    return loss


def likelihood(model: nn.Module, batch: Batch) -> tuple[float, int]:
    """The mean log-likelihood of the labels, each batch counted once."""
    return -float(own_loss(model, batch)), 1


def accuracy_from_the_third_token(model: nn.Module, batch: Batch) -> tuple[float, int]:
    """Of a language model, where two tokens tell what follows."""
    right = model(**batch).logits[:, 1:-1].argmax(-1) == batch["labels"][:, 2:]
    return float(right.sum()), right.numel()


def sequence_accuracy(model: nn.Module, batch: Batch) -> tuple[float, int]:
    logits = model(**batch).logits
    return float((logits.argmax(-1) == batch["labels"]).sum()), batch["labels"].numel()


def squared_loss(model: nn.Module, batch: Batch) -> Tensor:
    return F.mse_loss(model(batch[0]), batch[1])


def minus_squares(model: nn.Module, batch: Batch) -> tuple[float, int]:
    return -float(F.mse_loss(model(batch[0]), batch[1], reduction="sum")), len(batch[1])
