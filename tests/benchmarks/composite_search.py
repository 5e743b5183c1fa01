"""Does a composite that was searched prune better than plain epsilon? Three networks, two sets of digits, held-out data.

``python tests/benchmarks/composite_search.py`` trains each network for some seconds, searches (some ten minutes of one
core in all), and prints a table as in ``docs/results.md``; what is done is kept in a file and not done again.
"""

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

import lrp_prune

RATES = tuple(step / 10 for step in range(10))
# Two-sided quantiles of Student's t for 95 %, by the number of seeds.
_QUANTILES = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78}


class VGG(nn.Sequential):
    """Five convolutions without normalisation, and two dense layers."""

    def __init__(self) -> None:
        def convolution(inputs: int, outputs: int) -> list[nn.Module]:
            return [nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU()]

        super().__init__(
            *convolution(1, 12), *convolution(12, 12), nn.MaxPool2d(2), *convolution(12, 24), *convolution(24, 24),
            nn.MaxPool2d(2), *convolution(24, 24), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
            nn.Linear(96, 32), nn.ReLU(), nn.Linear(32, 10),
        )  # fmt: skip


class Block(nn.Module):
    """Two convolutions with batch normalisation beside a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first, self.first_norm = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs)
        self.second, self.second_norm = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs)
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        inside = self.second_norm(self.second(F.relu(self.first_norm(self.first(x)))))
        return F.relu(inside + self.shortcut(x))


class ResNet(nn.Sequential):
    """Three blocks."""

    def __init__(self) -> None:
        stem = nn.Conv2d(1, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12), nn.ReLU()
        super().__init__(
            *stem, Block(12, 12, 1), Block(12, 24, 2), Block(24, 32, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10)
        )  # fmt: skip


class Encoder(nn.Module):
    """Attention and a multilayer perceptron, each after a norm and beside a sum."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.norm, self.other_norm = heads, nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(self.norm(x)).chunk(3, -1)
        )
        x = x + self.out(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.other_norm(x))))


class ViT(nn.Module):
    """Three encoders over patches of two by two."""

    def __init__(self, size: int, width: int = 32) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, 2, 2)
        self.positions = nn.Parameter(0.02 * torch.randn(1, (size // 2) ** 2, width))
        self.encoders = nn.Sequential(*(Encoder(width, 4) for _ in range(3)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).transpose(1, 2) + self.positions
        return self.head(self.norm(self.encoders(tokens).mean(1)))


NETWORKS: dict[str, Callable[[int], nn.Module]] = {
    "VGG-like": lambda size: VGG(),
    "ResNet-like": lambda size: ResNet(),
    "ViT": ViT,
}


UNITS: dict[str, str | list[str]] = {"VGG-like": "neuron", "ResNet-like": "neuron", "ViT": ["head", "neuron"]}
"""What is pruned: filters and hidden units; heads and hidden units, each to the rate."""


EPOCHS: dict[str, int] = {"VGG-like": 20, "ResNet-like": 20, "ViT": 45}


def digits(seed: int) -> tuple[Tensor, Tensor]:
    """Handwritten digits of eight by eight pixels, shuffled."""
    data = load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(seed))
    return torch.tensor(data.images, dtype=torch.float32)[order, None] / 16, torch.tensor(data.target)[order]


def cluttered(seed: int) -> tuple[Tensor, Tensor]:
    """The same somewhere in ten by ten pixels, with pieces of other digits and noise: a harder task."""
    images, labels = digits(seed)
    generator = torch.Generator().manual_seed(seed + 1)

    def drawn(high: int) -> int:
        return int(torch.randint(high, (), generator=generator))

    canvas = 0.15 * torch.randn(len(images), 1, 10, 10, generator=generator)
    for picture, image in zip(canvas, images, strict=True):
        for _ in range(2):
            piece = images[drawn(len(images)), :, 2:5, 2:5]
            top, left = drawn(8), drawn(8)
            picture[:, top : top + 3, left : left + 3] += 0.4 * piece
        top, left = drawn(3), drawn(3)
        picture[:, top : top + 8, left : left + 8] += image
    return canvas, labels


SETS: dict[str, Callable[[int], tuple[Tensor, Tensor]]] = {"digits": digits, "cluttered digits": cluttered}

Batches = list[tuple[Tensor, Tensor]]


def batches_of(images: Tensor, labels: Tensor, size: int = 128) -> Batches:
    return list(zip(images.split(size), labels.split(size), strict=True))


def accuracy(model: nn.Module, batches: Sequence[tuple[Tensor, Tensor]]) -> float:
    with torch.no_grad():
        right = sum(int((model(images).argmax(1) == labels).sum()) for images, labels in batches)
    return right / sum(len(labels) for _, labels in batches)


def trained(model: nn.Module, images: Tensor, labels: Tensor, epochs: int) -> nn.Module:
    steps = epochs * math.ceil(len(labels) / 64)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    for _ in range(epochs):
        for chosen in torch.randperm(len(labels)).split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(images[chosen]), labels[chosen]).backward()
            optimizer.step()
            schedule.step()
    return model.eval()


def measured(network: str, data: str, seed: int, trials: int) -> dict[str, Any]:
    """One network, trained and searched for; relevance is of training samples, all else of samples that were held out."""
    torch.manual_seed(seed)
    images, labels = SETS[data](seed)
    train, selection = 900, 1300
    model = trained(NETWORKS[network](images.shape[-1]), images[:train], labels[:train], EPOCHS[network])
    parts = {
        "reference": batches_of(images[:128], labels[:128]),
        "selection": batches_of(images[train:selection], labels[train:selection]),
        "test": batches_of(images[selection:], labels[selection:]),
    }
    start = time.process_time()
    found = lrp_prune.search_composite(
        model, parts, accuracy, trials=trials, granularity=UNITS[network], rates=RATES, seed=seed, progress=False
    )
    return {
        "dense": found.searched.test_curve[0.0],
        "searched": found.searched.test,
        "epsilon": found.plain.test,
        "selection": [found.searched.selection, found.plain.selection],
        "chosen": found.chosen,
        "seconds": time.process_time() - start,
    }


def interval(values: Sequence[float]) -> str:
    """The mean, and half of the 95 % interval over seeds."""
    mean = statistics.mean(values)
    if len(values) < 2:
        return f"{mean:.3f}"
    return f"{mean:.3f} ± {_QUANTILES.get(len(values), 2.6) * statistics.stdev(values) / math.sqrt(len(values)):.3f}"


def table(results: dict[str, dict[str, Any]]) -> str:
    """By network and set, over the seeds that are there."""
    lines = [
        "| network | data | seeds | dense accuracy | epsilon | searched | searched - epsilon |",
        "|---|---|---|---|---|---|---|",
    ]
    for network in NETWORKS:
        for data in SETS:
            rows = [row for key, row in results.items() if key.startswith(f"{network}, {data}, ")]
            if rows:
                columns = [[row[name] for row in rows] for name in ("dense", "epsilon", "searched")]
                gains = [row["searched"] - row["epsilon"] for row in rows]
                cells = [interval(column) for column in (*columns, gains)]
                lines.append(f"| {network} | {data} | {len(rows)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--trials", type=int, default=24)
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=list(NETWORKS))
    parser.add_argument("--results", type=Path, default=Path("composite_search.json"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    results: dict[str, dict[str, Any]] = json.loads(options.results.read_text()) if options.results.exists() else {}
    for seed in options.seeds:
        for data in SETS:
            for network in options.networks:
                key = f"{network}, {data}, {seed}"
                if key not in results:
                    results[key] = measured(network, data, seed, options.trials)
                    part = options.results.with_suffix(".part")  # the file is whole, whenever it is stopped
                    part.write_text(json.dumps(results))
                    part.replace(options.results)
                    print(key, json.dumps(results[key]), flush=True)
    print(table(results))


if __name__ == "__main__":
    main()
