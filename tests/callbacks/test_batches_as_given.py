"""What is explained is a batch as its loader gave it, whatever a validation step takes out of it."""

from collections import UserDict
from collections.abc import Callable, Iterator, MutableMapping
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader

import lrp_prune
from lrp_prune import CorrectedModule
from lrp_prune.callbacks import ContrastiveCorrection, RelevanceCollector, RelevancePruning

X = torch.linspace(-2, 2, 32 * 8).reshape(4, 8, 8).sin()
Y = torch.arange(32).reshape(4, 8) % 3


class Store(MutableMapping[str, Any]):
    """Keeps its entries in a dictionary of its own."""

    def __init__(self, **entries: Any) -> None:
        self.entries = entries

    def __getitem__(self, name: str) -> Any:
        return self.entries[name]

    def __setitem__(self, name: str, value: Any) -> None:
        self.entries[name] = value

    def __delitem__(self, name: str) -> None:
        del self.entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)


class Taking(LightningModule):
    """Its validation step takes the labels out of the batch."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.net(x)
        return logits

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        return batch

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch if isinstance(batch, list) else (batch["x"], batch["y"])
        return nn.functional.cross_entropy(self(x), y)

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        y = batch.pop() if isinstance(batch, list) else batch.pop("y")
        self.log("val_loss", nn.functional.cross_entropy(self(batch[0] if isinstance(batch, list) else batch["x"]), y))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def loader(make: Callable[[Tensor, Tensor], Any]) -> Any:
    return DataLoader(range(4), batch_size=None, collate_fn=lambda index: make(X[index], Y[index]))


@pytest.mark.parametrize(
    "make",
    [
        lambda x, y: {"x": x, "y": y},
        lambda x, y: UserDict(x=x, y=y),
        lambda x, y: Store(x=x, y=y),
        lambda x, y: [x, y],
    ],
    ids=["dict", "UserDict", "a mapping of its own", "list"],
)
def test_the_labels_that_a_step_takes_out_are_explained(
    make: Callable[[Tensor, Tensor], Any], make_trainer: Callable[..., Any]
) -> None:
    found = RelevanceCollector()
    make_trainer(callbacks=[found]).validate(Taking(), loader(make), verbose=False)
    expected = RelevanceCollector(reference=[[x, y] for x, y in zip(X, Y, strict=True)])
    make_trainer(callbacks=[expected]).validate(Taking(), loader(make), verbose=False)
    assert found.relevance.target == expected.relevance.target == "class"
    for name, sums in expected.relevance.items():
        torch.testing.assert_close(found.relevance[name], sums)


@pytest.mark.parametrize("sanity", [0, 2])
def test_a_training_prunes_by_the_batches_as_they_were(sanity: int, make_trainer: Callable[..., Any]) -> None:
    batches = loader(lambda x, y: {"x": x, "y": y})
    pruning, correction = RelevancePruning(0.5, 1), ContrastiveCorrection(amount=2)
    trainer = make_trainer(callbacks=[pruning, correction], max_epochs=2, num_sanity_val_steps=sanity)
    trainer.fit(Taking(), batches, [batches, loader(lambda x, y: {"x": -x, "y": y})])
    assert pruning.round == 1
    assert correction.patch.num_entries == 2


@pytest.mark.parametrize(
    "callback",
    [
        lambda: RelevancePruning(0.5, rounds=2, monitor="val_loss", summary=False),
        lambda: ContrastiveCorrection(
            0,
            [(torch.randn(8, 8), torch.zeros(8, dtype=torch.long))],
            amount=0.1,
            undesired_metric=lambda model: 1.0,
        ),
    ],
    ids=["pruning", "correction"],
)
@pytest.mark.filterwarnings("ignore:.*dataloader_iter")
def test_a_training_step_that_takes_batches_by_itself(callback, make_module, make_loader, make_trainer) -> None:
    class Taking(make_module):  # type: ignore[misc,valid-type]
        def training_step(self, dataloader_iter: Iterator[Any]) -> Tensor:
            batch, *_ = next(dataloader_iter)
            return self.loss(batch)

        def on_train_batch_end(self, *_: Any) -> None:
            pass

    trainer = make_trainer(callbacks=[made := callback()], max_epochs=3)
    trainer.fit(CorrectedModule(Taking()), make_loader(), make_loader(seed=2))
    assert made.round == 2 if isinstance(made, RelevancePruning) else "correction/undesired" in trainer.callback_metrics


@pytest.mark.parametrize("method", ["lrp", "wanda"])
def test_a_label_before_its_image_says_what_was_run_and_how_to_say_otherwise(
    method: Any, make_module, make_loader, make_trainer
) -> None:
    class Turned(make_module):  # type: ignore[misc,valid-type]
        def loss(self, batch: Any) -> Tensor:
            return super().loss(batch[::-1])

    pairs = [(labels, inputs) for inputs, labels in make_loader().dataset]
    module, loader = Turned(), DataLoader(pairs, 16)
    trainer = make_trainer(callbacks=[RelevancePruning(0.5, method=method)], max_epochs=2)
    with pytest.raises(
        MisconfigurationException, match=r"Turned.forward failed \(RuntimeError.*(?s:.)*def relevance_target"
    ):
        trainer.fit(module, loader, loader)
    assert not module.zeros_after_step


def test_errors_of_a_forward_that_are_not_about_its_input_are_its_own() -> None:
    class Broken(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            raise RuntimeError("the cable is out")

    with pytest.raises(RuntimeError, match="the cable is out"):
        lrp_prune.attribute(Broken(3, 2), [(torch.ones(4, 3), torch.zeros(4, dtype=torch.long))])
