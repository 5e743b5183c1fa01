"""What can be known before the first training step is said before it, and looking changes nothing."""

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningDataModule, LightningModule
from lightning.pytorch.callbacks import ModelPruning
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lrp_prune
from lrp_prune import LRP
from lrp_prune.callbacks import CircuitDiscovery, ContrastiveCorrection, RelevanceCollector, RelevancePruning
from lrp_prune.tasks import TableTask

X = torch.linspace(-2, 2, 32 * 15).reshape(32, 15).sin()
Y = torch.arange(32) % 3


class Classifier(LightningModule):
    """Counts its training steps."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(15, 8), nn.ReLU(), nn.Linear(8, 3))
        self.steps = 0

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.net(x)
        return logits

    def loss(self, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.steps += 1
        return self.loss(batch)

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.log("val_loss", self.loss(batch))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Values(Classifier):
    """A regression by itself: no labels."""

    def loss(self, batch: Any) -> Tensor:
        loss: Tensor = self(batch[0]).square().mean()
        return loss


class WholeBatch(Classifier):
    """Its forward takes the batch and returns the loss."""

    def forward(self, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def loss(self, batch: Any) -> Tensor:
        loss: Tensor = self(batch)
        return loss


class Pixels(Classifier):
    """Segments: more labels a sample than its logits are for."""

    def loss(self, batch: Any) -> Tensor:
        return self(batch[0]).square().mean() + 0.0 * batch[1].sum()


def loader(*tensors: Tensor) -> Any:
    return DataLoader(TensorDataset(*tensors), batch_size=8)


CLASSES = loader(X, Y)


def refused(
    make_trainer: Callable[..., Any],
    module: Any,
    callbacks: list[Callback],
    match: str,
    data: Any = CLASSES,
    **options: Any,
) -> None:
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(MisconfigurationException, match=match):
        make_trainer(callbacks=callbacks, max_epochs=3, **options).fit(module, data, data)
    assert module.steps == 0
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())


@pytest.mark.parametrize("collects", [RelevancePruning, RelevanceCollector])
@pytest.mark.parametrize(
    ("make", "data", "options", "match"),
    [
        (Values, loader(X), {}, "what to explain cannot be inferred for Values .* with no labels.*relevance_target"),
        (WholeBatch, CLASSES, {}, "what to explain cannot be inferred for WholeBatch.*relevance_target"),
        (Pixels, loader(X, torch.zeros(32, 4, 4).long()), {}, "cannot be inferred for Pixels and a batch with labels"),
        (Classifier, CLASSES, {"method": LRP(target="next_token")}, "'next_token' needs logits"),
        (Classifier, CLASSES, {"granularity": "head"}, "has no head"),
        (Classifier, CLASSES, {"granularity": "block"}, "has no block"),
        (Classifier, CLASSES, {"reference": 5}, "reference=5, but there is one validation loader"),
        (Classifier, CLASSES, {"include": ["nothing.*"]}, "matches no parameter"),
    ],
)
def test_a_collection_that_must_fail_fails_before_the_first_step(
    make: type[Classifier],
    data: Any,
    options: dict[str, Any],
    match: str,
    collects: type[Callback],
    make_trainer: Callable[..., Any],
) -> None:
    refused(make_trainer, make(), [collects(**options)], match, data)


@pytest.mark.parametrize("sanity", [0, 2])
@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"sparsity": {"nothing.*": 0.5}}, "'nothing.*'.* matches no tensor"),
        ({"sparsity": {"net.0": 0.5, "net.0.weight": 0.2}}, "matches only tensors that earlier patterns took"),
        ({"scope": "2:4"}, "net.0.weight has 15 inputs, which 4 does not divide"),
        ({"scope": "2:4", "method": "magnitude"}, "net.0.weight has 15 inputs, which 4 does not divide"),
        ({"scope": "2:4", "method": "wanda"}, "net.0.weight has 15 inputs, which 4 does not divide"),
    ],
)
def test_a_selection_that_must_fail_fails_without_a_batch_too(
    options: dict[str, Any], match: str, sanity: int, make_trainer: Callable[..., Any]
) -> None:
    pruning = RelevancePruning(**options)
    refused(make_trainer, Classifier(), [pruning], match, num_sanity_val_steps=sanity)


def test_patterns_of_units_are_known_from_the_first_batch(make_trainer: Callable[..., Any]) -> None:
    pruning = RelevancePruning(sparsity={"net.0": 0.5}, granularity="neuron")  # units are named after who reads them
    refused(make_trainer, Classifier(), [pruning], "'net.0'.* matches no tensor of the relevance, which has net.2")


def test_reference_data_are_tried_as_well(make_trainer: Callable[..., Any]) -> None:
    class Module(LightningDataModule):
        def val_dataloader(self) -> Any:
            return loader(X)

    for reference in ([(X,), (X,)], loader(X), Module()):
        for make in (RelevancePruning, RelevanceCollector):
            refused(
                make_trainer, Classifier(), [make(reference=reference)], "cannot be inferred", num_sanity_val_steps=0
            )
        correction = ContrastiveCorrection(general=CLASSES, undesired=loader(X))
        refused(make_trainer, Classifier(), [correction], "cannot be inferred", num_sanity_val_steps=0)


def test_a_target_of_the_modules_own_is_run_once(make_trainer: Callable[..., Any]) -> None:
    class Own(Values):
        def __init__(self) -> None:
            super().__init__()
            self.asked: list[int] = []

        def relevance_target(self, batch: Any) -> Tensor:
            self.asked.append(len(batch))
            if self.steps == 0 and len(batch) == 1:
                raise ValueError("no batch of mine")
            explained: Tensor = self(batch[0]).sum()
            return explained

    refused(make_trainer, Own(), [RelevancePruning()], "no batch of mine", loader(X))
    module = Own()
    make_trainer(callbacks=[RelevancePruning(max_batches=1)], max_epochs=2).fit(module, CLASSES, CLASSES)
    assert len(module.asked) == 2  # once to see whether it can be, once for the round


def test_without_a_sanity_check_no_batch_is_taken_from_the_loaders(make_trainer: Callable[..., Any]) -> None:
    class Counted(torch.utils.data.Dataset[Any]):
        taken = 0

        def __len__(self) -> int:
            return 32

        def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
            self.taken += 1
            return X[index], Y[index]

    class Looks(Callback):
        def on_train_epoch_start(self, trainer: Any, pl_module: LightningModule) -> None:
            seen.append(data.taken)

    data, seen = Counted(), []  # type: ignore[var-annotated]
    trainer = make_trainer(callbacks=[RelevancePruning(), Looks()], max_epochs=2, num_sanity_val_steps=0)
    trainer.fit(Classifier(), CLASSES, DataLoader(data, batch_size=8))
    assert seen == [0, 32]


@pytest.mark.slow
@pytest.mark.parametrize("sanity", [0, 2])
def test_trying_leaves_the_training_as_it_was(sanity: int, make_trainer: Callable[..., Any]) -> None:
    """Random numbers included: the training draws some for dropout, and the reference loader for its order."""

    def trained(*callbacks: Callback) -> dict[str, Tensor]:
        torch.manual_seed(0)
        module = Classifier()
        module.net.insert(2, nn.Dropout(0.5))
        make_trainer(callbacks=list(callbacks), max_epochs=2, num_sanity_val_steps=sanity).fit(module, CLASSES, CLASSES)
        return module.state_dict()

    shuffled = DataLoader(TensorDataset(X, Y), batch_size=8, shuffle=True)
    expected = trained()
    for callbacks in (
        [RelevanceCollector()],
        [RelevanceCollector(reference=shuffled)],
        [RelevancePruning(sparsity=0.0)],
    ):
        found = trained(*callbacks)
        assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.parametrize("collects", [RelevanceCollector, ContrastiveCorrection])
def test_a_callback_that_works_in_validations_needs_some(
    collects: type[Callback], make_trainer: Callable[..., Any]
) -> None:
    class Without(Classifier):
        validation_step = LightningModule.validation_step

    sets: dict[str, Any] = (
        {"reference": CLASSES} if collects is RelevanceCollector else {"general": CLASSES, "undesired": CLASSES}
    )
    for options in ({}, sets):
        refused(make_trainer, Without(), [collects(**options)], f"{collects.__name__} .* this training has none")
    corrected = lrp_prune.CorrectedModule(Without())
    with pytest.raises(
        MisconfigurationException, match="relevance is collected in validations, but this training has none"
    ):
        make_trainer(callbacks=[RelevancePruning()], max_epochs=2).fit(corrected, CLASSES, CLASSES)


def test_a_correction_whose_loader_is_missing_is_refused(make_trainer: Callable[..., Any]) -> None:
    refused(make_trainer, Classifier(), [ContrastiveCorrection()], "validation loader 1 is a reference set")


class Words(Classifier):
    """A small language model of four tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Embedding(4, 8), nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))

    def forward(self, input_ids: Tensor) -> Tensor:
        logits: Tensor = self.net(input_ids)
        return logits

    def loss(self, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]).flatten(0, 1), batch[0].flatten())


def test_a_circuit_that_cannot_be_is_refused(make_trainer: Callable[..., Any]) -> None:
    row = {"clean": "0", "counterfactual": "1", "answers": " 2", "distractors": " 3"}
    task = TableTask(
        lambda text, **_: {"input_ids": [int(word) for word in text.split()]}, [row, {**row, "clean": "2"}]
    )
    ids = loader(torch.arange(32 * 5).reshape(32, 5) % 4)
    refused(make_trainer, Words(), [CircuitDiscovery(task, "head")], "has no head", ids)
    missing = CircuitDiscovery(task, "weight", ablation="zero", include=["nothing"])
    refused(make_trainer, Words(), [missing], "matches no parameter", ids)
    refused(make_trainer, Classifier(), [CircuitDiscovery(task, "weight", ablation="zero")], "input_ids|takes|argument")


def test_a_misspelt_guard_is_told_after_the_sanity_check(make_trainer: Callable[..., Any]) -> None:
    match = "monitor='vall_loss' is not logged in the sanity check, which logs val_loss: is 'val_loss' meant"
    refused(make_trainer, Classifier(), [RelevancePruning(monitor="vall_loss")], match)
    # Without a sanity check, or where a metric may only be left out in it, it shows after an epoch.
    for options, monitor in (({"num_sanity_val_steps": 0}, "vall_loss"), ({}, "accuracy")):
        expected = re.escape(f"monitor={monitor!r} is not logged in validation, which logs val_loss:")
        with pytest.raises(MisconfigurationException, match=expected):
            make_trainer(callbacks=[RelevancePruning(monitor=monitor)], max_epochs=2, **options).fit(
                Classifier(), CLASSES, CLASSES
            )


def test_a_metric_that_the_sanity_check_leaves_out_may_be_guarded(make_trainer: Callable[..., Any]) -> None:
    class Later(Classifier):
        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
            super().validation_step(batch, batch_idx)
            if not self.trainer.sanity_checking:
                self.log("accuracy", 0.5)

    with pytest.warns(UserWarning, match="monitor='accuracy' is not logged in the sanity check, which logs val_loss"):
        make_trainer(callbacks=[RelevancePruning(monitor="accuracy", monitor_mode="max")], max_epochs=2).fit(
            Later(), CLASSES, CLASSES
        )


@pytest.mark.parametrize("first", [True, False])
def test_lightnings_own_pruning_is_refused_beside_ours(first: bool, make_trainer: Callable[..., Any]) -> None:
    callbacks = [ModelPruning("l1_unstructured", amount=0.5), RelevancePruning()]
    refused(
        make_trainer,
        Classifier(),
        callbacks if first else callbacks[::-1],
        "ModelPruning of Lightning and RelevancePruning",
    )


@pytest.mark.parametrize(
    ("make", "way_out"),
    [
        (lambda: RelevancePruning(0.5), "there are 2 RelevancePruning callbacks, .* give each a name"),
        (
            lambda: ContrastiveCorrection(),
            "there are 2 ContrastiveCorrection callbacks, .* give each a behaviour of its own",
        ),
    ],
)
def test_the_same_callback_twice_is_answered_by_what_to_do(
    make: Callable[[], Callback], way_out: str, make_trainer: Callable[..., Any]
) -> None:
    with pytest.raises(MisconfigurationException, match=way_out):
        make_trainer(callbacks=[make(), make()])
    make_trainer(callbacks=[make()])


def test_what_is_explained_is_in_the_table(make_trainer: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[str] = []
    monkeypatch.setattr("lrp_prune.callbacks._round.show", lambda trainer, text: shown.append(text))
    for method in ("lrp", "wanda"):
        make_trainer(callbacks=[RelevancePruning(method=method)], max_epochs=2).fit(Classifier(), CLASSES, CLASSES)
    assert ["explains: the logit of each sample's class" in text for text in shown] == [True, False]
