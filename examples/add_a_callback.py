"""Adds pruning to a training that already exists: one line, `callbacks=[RelevancePruning(...)]`.

The classifier and its data know nothing of pruning. It is trained twice on the handwritten digits that scikit-learn
ships, as it is and with the callback, and both accuracies on held-out digits are printed.
"""

import argparse

import lightning
import torch
from presenting import IN_TERMINAL, quiet
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lrp_prune.callbacks import RelevancePruning


class Classifier(lightning.LightningModule):
    """An ordinary classifier of 8 x 8 images of digits."""

    def __init__(self, hidden: int = 128) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(64, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, 10)
        )

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images)

    def training_step(self, batch: list[Tensor], batch_index: int) -> Tensor:
        images, labels = batch
        return F.cross_entropy(self(images), labels)

    def validation_step(self, batch: list[Tensor], batch_index: int) -> None:
        images, labels = batch
        self.log("val_accuracy", (self(images).argmax(-1) == labels).float().mean(), prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def digits(seed: int = 0) -> tuple[DataLoader, DataLoader]:
    """Splits the 1797 digits into a training and a validation loader."""
    images, labels = load_digits(return_X_y=True)
    parts = train_test_split(images / 16, labels, test_size=0.3, random_state=seed, stratify=labels)
    train_x, test_x = (torch.tensor(part, dtype=torch.float32) for part in parts[:2])
    train_y, test_y = (torch.tensor(part) for part in parts[2:])
    return (
        DataLoader(TensorDataset(train_x, train_y), batch_size=32, shuffle=True),
        DataLoader(TensorDataset(test_x, test_y), batch_size=128),
    )


def train(callbacks: list[lightning.Callback], epochs: int, seed: int) -> tuple[Classifier, float]:
    """Trains the classifier and returns it with its accuracy on the held-out digits."""
    lightning.seed_everything(seed, verbose=False)
    train_loader, validation_loader = digits(seed)
    module = Classifier()
    trainer = lightning.Trainer(
        max_epochs=epochs,
        callbacks=callbacks,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=IN_TERMINAL,
    )
    trainer.fit(module, train_loader, validation_loader)
    (result,) = trainer.validate(module, validation_loader, verbose=False)
    return module, result["val_accuracy"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument(
        "--sparsity", type=float, default=0.9, help="fraction of the weights removed after the last round"
    )
    parser.add_argument("--rounds", type=int, default=5, help="prune / train rounds, one per epoch")
    parser.add_argument("--epochs", type=int, default=12, help="epochs of each of the two trainings")
    parser.add_argument("--method", default="lrp", help="lrp, wanda, gradient, magnitude or random")
    parser.add_argument(
        "--seed", type=int, default=0, help="of the split, the initial weights and the order of the data"
    )
    options = parser.parse_args()
    quiet()

    _, dense = train([], options.epochs, options.seed)

    pruning = RelevancePruning(sparsity=options.sparsity, rounds=options.rounds, method=options.method)
    module, pruned = train([pruning], options.epochs, options.seed)  # the one line: callbacks=[pruning]

    weights = [layer.weight for layer in module.layers if isinstance(layer, nn.Linear)]
    zeros = sum(int((weight == 0).sum()) for weight in weights)
    print(f"\ndense   accuracy {dense:.1%}")
    print(f"pruned  accuracy {pruned:.1%}, {zeros} of {sum(w.numel() for w in weights)} weights are zero")


if __name__ == "__main__":
    main()
