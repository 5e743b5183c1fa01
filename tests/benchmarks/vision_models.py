"""Three small networks, and two sets of images that they are trained on here: digits, and digits among distractors."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from prune_cnn import Block
from sklearn.datasets import load_digits
from torch import Tensor, nn

from lrp_prune.training.keeping import MaskKeeper

Batch = tuple[Tensor, Tensor]


class Images(NamedTuple):
    """Images ``[samples, 1, side, side]`` with labels: to train on, to score by (of these), and to judge by."""

    train: list[Batch]
    reference: list[Batch]
    held_out: list[Batch]


def vgg() -> nn.Sequential:
    """Convolutions and pooling, as VGG."""
    layers: list[nn.Module] = []
    for inputs, outputs, pooled in ((1, 16, False), (16, 16, True), (16, 32, False), (32, 32, True)):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU(), *([nn.MaxPool2d(2)] if pooled else [])]
    return nn.Sequential(
        *layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(128, 48), nn.ReLU(), nn.Linear(48, 10)
    )


def resnet() -> nn.Sequential:
    """Residual blocks with batch normalization, as ResNet-18."""
    stem = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
    blocks = (Block(16, 16, 1), Block(16, 24, 2), Block(24, 32, 2))
    return nn.Sequential(stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))


class ViT(nn.Module):
    """A vision transformer of sixteen patches."""

    def __init__(self, side: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, 32, side // 4, side // 4)
        self.positions = nn.Parameter(0.02 * torch.randn(16, 32))
        layer = nn.TransformerEncoderLayer(32, 4, 64, 0.0, "gelu", batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
        self.head = nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 10))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(self.patches(x).flatten(2).mT + self.positions).mean(1))


NETWORKS: dict[str, Callable[[int], nn.Module]] = {
    "VGG-like": lambda side: vgg(),
    "ResNet-like": lambda side: resnet(),
    "ViT": ViT,
}


def digits(seed: int) -> Images:
    """scikit-learn's digits, 8 by 8."""
    images, labels = _shuffled(seed)
    return _parted(images[:, None] - 0.5, labels, 450)


def distracted(seed: int, train: int = 1800) -> Images:
    """A digit somewhere on 12 by 12 pixels, with a piece of another digit beside or on it, under noise."""
    images, labels = _shuffled(seed)
    generator = torch.Generator().manual_seed(seed)

    def made(first: int, last: int, number: int) -> Batch:
        def places(span: int) -> list[list[int]]:
            return torch.randint(span, (number, 2), generator=generator).tolist()

        def some() -> Tensor:
            return torch.randint(first, last, (number,), generator=generator)

        canvas, shown = torch.zeros(number, 12, 12), some()
        for sample, (other, (y, x), (v, u)) in enumerate(zip(some().tolist(), places(9), places(5), strict=True)):
            canvas[sample, y : y + 4, x : x + 4] += 0.6 * images[other, v : v + 4, u : u + 4]
        for sample, (index, (y, x)) in enumerate(zip(shown.tolist(), places(3), strict=True)):
            canvas[sample, y + 1 : y + 9, x + 1 : x + 9] += images[index]
        canvas += 0.1 * torch.randn(canvas.shape, generator=generator)
        return canvas[:, None] - 0.5, labels[shown]

    (x, y), (held_x, held_y) = made(0, 1347, train), made(1347, 1797, 450)
    return _parted(torch.cat([x, held_x]), torch.cat([y, held_y]), 450)


DATA: dict[str, tuple[Callable[[int], Images], int, int]] = {
    "digits": (digits, 8, 15),
    "digits among distractors": (distracted, 12, 12),
}
"""Name -> images from a seed, their side, and epochs."""


def _shuffled(seed: int) -> Batch:
    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    return torch.tensor(images, dtype=torch.float32).view(-1, 8, 8)[order] / 16, torch.tensor(labels)[order]


def _parted(images: Tensor, labels: Tensor, held_out: int) -> Images:
    cut = len(images) - held_out
    train = list(zip(images[:cut].split(50), labels[:cut].split(50), strict=True))[: cut // 50]
    by_class = torch.cat([(labels[:cut] == label).nonzero()[:10, 0] for label in range(10)])  # ten of each
    reference = list(zip(images[by_class].split(50), labels[by_class].split(50), strict=True))
    return Images(train, reference, [(images[cut:], labels[cut:])])


def train(
    model: nn.Module, batches: list[Batch], epochs: float, rate: float, seed: int, masks: Any = None
) -> nn.Module:
    """AdamW, the rate rising for a tenth of the time and then falling to zero; what masks prune stays zero."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01)
    keeper = None if masks is None else MaskKeeper(model, masks, [optimizer])
    steps = round(epochs * len(batches))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / (0.1 * steps + 1), 0.5 + 0.5 * math.cos(math.pi * step / steps))
    )
    generator, order = torch.Generator().manual_seed(seed), []
    model.train()
    for _ in range(steps):
        order = order or torch.randperm(len(batches), generator=generator).tolist()
        images, labels = batches[order.pop()]
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
        schedule.step()
    if keeper is not None:
        keeper.remove()
    return model.eval()


def accuracy(model: nn.Module, batches: list[Batch]) -> float:
    """The share of images that are told right."""
    model.eval()
    with torch.no_grad():
        right = sum(int((model(images).argmax(1) == labels).sum()) for images, labels in batches)
    return right / sum(len(labels) for _, labels in batches)
