"""Removes half of the filters of a convolutional network, with what belongs to them, trains on for one epoch, and shrinks it.

A small residual network with batch normalization is trained on the handwritten digits that scikit-learn ships. Then

* a curve: filters are removed by rate, by what LRP says of them and by other rankings, and nothing is trained;
* the callback: `RelevancePruning(0.5, granularity="neuron", scope="layer")` takes half of each layer's filters out before a
  training of one epoch, in which they stay out;
* `lrp_prune.shrink`: what is zero is taken out, the accuracy stays to the image, and a forward is measured before and after.

`--data` takes a folder with a folder of images for each class in place of the digits (ImageNet's `train`, say), and `--model` a
network of timm in place of the small one, with weights that are at hand.
"""

import argparse
import warnings
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import torch
from PIL import Image
from presenting import IN_TERMINAL, INK, aligned, colour, new_figure, quiet, stage, titled
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

import lrp_prune
from lrp_prune import LRP
from lrp_prune.callbacks import RelevancePruning, Rounds

SUFFIXES = {".jpeg", ".jpg", ".png", ".bmp", ".webp"}
RATES = tuple(step / 10 for step in range(10))


class Block(nn.Module):
    """ResNet's basic block."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.one = nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs))
        self.two = nn.Sequential(nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs))
        self.past: nn.Module = nn.Identity()
        if stride > 1:
            self.past = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return (self.two(self.one(x).relu()) + self.past(x)).relu()


def small(channels: int, classes: int) -> nn.Module:
    """A residual network of seven convolutions in a row."""
    stem = nn.Sequential(nn.Conv2d(channels, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
    blocks = (Block(16, 16, 1), Block(16, 24, 2), Block(24, 32, 2))
    return nn.Sequential(stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, classes))


class Folder(Dataset[tuple[Tensor, int]]):
    """The images of a folder, which has a folder for each class."""

    def __init__(self, root: Path, side: int) -> None:
        self.side = side
        self.classes = sorted(folder.name for folder in root.iterdir() if folder.is_dir())
        if len(self.classes) < 2:
            raise ValueError(f"{root} must have a folder for each of two classes or more, got {self.classes}")
        self.files = [
            (file, label)
            for label, name in enumerate(self.classes)
            for file in sorted((root / name).rglob("*"))
            if file.suffix.lower() in SUFFIXES
        ]
        self.labels = [label for _, label in self.files]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        file, label = self.files[index]
        image = Image.open(file).convert("RGB").resize((self.side, self.side))
        pixels = torch.from_numpy(np.asarray(image, dtype=np.float32) / 255).movedim(-1, 0)
        mean, deviation = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])  # ImageNet's
        return (pixels - mean[:, None, None]) / deviation[:, None, None], label


def digits() -> tuple[Dataset[Any], list[int]]:
    """The 1797 digits that scikit-learn ships, 8 by 8 pixels, and their labels."""
    images, labels = load_digits(return_X_y=True)
    pixels = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16 - 0.5
    return TensorDataset(pixels, torch.tensor(labels)), labels.tolist()


def loaders(data: Dataset[Any], labels: list[int], seed: int, batch: int) -> tuple[DataLoader, DataLoader, DataLoader]:
    """To train on, ten images of each class of these to score by, and a quarter of all to judge by."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed)).tolist()
    held_out, training = order[: len(order) // 4], order[len(order) // 4 :]
    by_class: dict[int, list[int]] = {}
    for index in training:
        by_class.setdefault(labels[index], []).append(index)
    reference = [index for each in by_class.values() for index in each[:10]]
    return (
        DataLoader(Subset(data, training), batch, shuffle=True),
        DataLoader(Subset(data, reference), 50),
        DataLoader(Subset(data, held_out), 250),
    )


class Classifier(lightning.LightningModule):
    """An ordinary classifier, which knows nothing of pruning."""

    def __init__(self, network: nn.Module, rate: float, steps: int) -> None:
        super().__init__()
        self.network, self.rate, self.steps = network, rate, steps

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images)

    def training_step(self, batch: list[Tensor], batch_index: int) -> Tensor:
        images, labels = batch
        return F.cross_entropy(self(images), labels)

    def validation_step(self, batch: list[Tensor], batch_index: int) -> None:
        images, labels = batch
        self.log("val_accuracy", (self(images).argmax(-1) == labels).float().mean())

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.rate)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.rate, total_steps=self.steps + 1)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


def fit(network: nn.Module, data: DataLoader, epochs: int, rate: float, callbacks: list[Any]) -> None:
    """Trains by Lightning."""
    trainer = lightning.Trainer(
        max_epochs=epochs,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=IN_TERMINAL,
    )
    trainer.fit(Classifier(network, rate, epochs * len(data)), data)
    network.cpu().eval()


def accuracy(network: nn.Module, held_out: DataLoader) -> float:
    """The share of held-out images that are told right."""
    network.eval()
    with torch.no_grad():
        right = sum(int((network(images).argmax(1) == labels).sum()) for images, labels in held_out)
    return right / len(held_out.dataset)


def filters_left(network: nn.Module) -> dict[str, tuple[int, int]]:
    """By convolution: filters that put out anything, and all."""
    return {
        name: (int(layer.weight.flatten(1).any(1).sum()), len(layer.weight))
        for name, layer in network.named_modules()
        if isinstance(layer, nn.Conv2d)
    }


def draw(
    curve: lrp_prune.Comparison,
    left: dict[str, tuple[int, int]],
    share: float,
    tuned: float,
    path: Path,
) -> None:
    """Accuracy by rate; filters that are left in each layer."""
    figure, (by_rate, by_layer) = new_figure(11, 4.4, columns=2)
    for index, (method, row) in enumerate(curve.scores.items()):
        wide = 2.6 if method == "lrp" else 1.5
        by_rate.plot(
            [100 * rate for rate in row], list(row.values()), color=colour(method, index), linewidth=wide, label=method
        )
    by_rate.scatter([100 * share], [tuned], color=INK, zorder=3, label=f"{share:.0%} of each layer, one epoch")
    titled(by_rate, "Filters removed, nothing trained", "filters removed (%)", "accuracy on held-out images")
    by_rate.legend(frameon=False, fontsize=8, loc="center right")
    rows = range(len(left))
    by_layer.barh(rows, [total for _, total in left.values()], color="#dfe4ea", label="removed")
    by_layer.barh(rows, [kept for kept, _ in left.values()], color=colour("lrp"), label="left")
    by_layer.set_yticks(rows, list(left) if len(left) <= 24 else [""] * len(left), fontsize=7)
    by_layer.invert_yaxis()
    titled(by_layer, "Filters of each convolution", "filters", "")
    by_layer.legend(frameon=False, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", type=Path, help="a folder with a folder of images for each class; the digits without it"
    )
    parser.add_argument("--side", type=int, default=64, help="of the images of --data, in pixels")
    parser.add_argument("--model", help="a network of timm with its weights, in place of the small one that is trained")
    parser.add_argument("--epochs", type=int, default=12, help="of the first training")
    parser.add_argument("--sparsity", type=float, default=0.5, help="share of each layer's filters that goes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--runs", type=int, default=20, help="of the masked and the smaller network, to measure a forward"
    )
    parser.add_argument("--output", type=Path, default=Path("outputs/prune_cnn/filters.png"), help="the picture")
    return parser.parse_args(arguments)


def prepared(given: argparse.Namespace) -> tuple[nn.Module, tuple[DataLoader, DataLoader, DataLoader]]:
    """The network, untrained or timm's, and its images: to train with, as reference, and held out."""
    if given.data is None:
        data, labels = digits()
        channels, classes = 1, 10
    else:
        data = Folder(given.data, given.side)
        labels, channels, classes = data.labels, 3, len(data.classes)
    if given.model:
        import timm

        network = timm.create_model(given.model, pretrained=True, in_chans=channels, num_classes=classes)
    else:
        network = small(channels, classes)
    return network, loaders(data, labels, given.seed, batch=50)


def compared(network: nn.Module, lrp: LRP, batches: list[Any], held_out: DataLoader) -> lrp_prune.Comparison:
    """The accuracy by rate and ranking, which is printed."""
    rankings = {
        "lrp": lrp,
        "integrated gradients": "integrated_gradients",
        "magnitude": "magnitude",
        "random": "random",
    }
    curve = lrp_prune.pruning_curve(
        network,
        rankings,
        lambda network: accuracy(network, held_out),
        RATES,
        batches=batches,
        granularity="neuron",
        progress=IN_TERMINAL,
    )
    print(curve)
    rows = [f"| {name} | {curve.area(name):.3f} | {curve.top_rate(name):.0%} |" for name in curve.scores]
    print(aligned("\n".join(["| ranking | mean accuracy over rates | rate that keeps 95 % |", "|---|---|---|", *rows])))
    return curve


def main(arguments: list[str] | None = None) -> dict[str, float]:
    given = parse(arguments)
    quiet()
    for expected in (
        ".*no `val_dataloader`.*",
        r".*module\(s\) in eval mode at the start.*",
        ".*tensors lose more than.*",
    ):
        warnings.filterwarnings("ignore", message=expected)
    lightning.seed_everything(given.seed, verbose=False)

    network, (training, reference, held_out) = prepared(given)
    batches = [tuple(batch) for batch in reference]
    stage(f"Training for {given.epochs} epochs")
    fit(network, training, given.epochs, 3e-3, [])
    dense = accuracy(network, held_out)

    stage("Filters removed by rate, by several rankings, nothing trained")
    lrp = LRP("epsilon", "pxp", "class")
    curve = compared(network, lrp, batches, held_out)

    stage(f"{given.sparsity:.0%} of each layer's filters removed by the callback, and one epoch")
    pruning = RelevancePruning(
        given.sparsity,
        rounds=Rounds(1, start=0),
        method=lrp,
        scope="layer",
        granularity="neuron",
        reference=batches,
        recalibrate=True,  # there is one epoch to mend what is lost
    )
    at_once = accuracy_at_once(network, batches, lrp, given.sparsity, held_out)
    fit(network, DataLoader(training.dataset, 16, shuffle=True), 1, 3e-3, [pruning])
    steps = {"dense": dense, "pruned": at_once, "after one epoch": accuracy(network, held_out)}
    left = filters_left(network)
    kept = sum(count for count, _ in left.values())
    for name, value in steps.items():
        print(f"{name:16} accuracy {value:.1%}")
    print(f"{kept} of {sum(total for _, total in left.values())} filters put out anything")
    draw(curve, left, given.sparsity, steps["after one epoch"], given.output)

    stage("Taken out")
    images = [next(iter(held_out))[0]]
    shrunk = lrp_prune.shrink(network, pruning.masks, images, measure=given.runs)
    print(shrunk)
    steps["shrunk"], steps["times faster"] = accuracy(network, held_out), shrunk.speed.ratio
    print(f"{'shrunk':16} accuracy {steps['shrunk']:.1%}")
    print(f"picture: {given.output}")
    return steps


def accuracy_at_once(
    network: nn.Module, batches: list[Any], method: LRP, sparsity: float, held_out: DataLoader
) -> float:
    """The accuracy without any training after the same cut; the network stays as it is."""
    state = {name: value.clone() for name, value in network.state_dict().items()}
    lrp_prune.prune(
        network, batches, sparsity, method, "layer", granularity="neuron", recalibrate=False, progress=False
    )
    found = accuracy(network, held_out)
    network.load_state_dict(state)
    return found


if __name__ == "__main__":
    main()
