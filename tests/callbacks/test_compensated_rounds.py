"""Rounds in a training that update what they keep, before the training goes on."""

import copy
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader

import lrp_prune
from lrp_prune.callbacks import RelevancePruning
from lrp_prune.pruning import LeastSquares, OptimalBrainSurgeon
from lrp_prune.pruning.compensation import Compensated, compensate_
from tests.support.compensation import check_closed_form
from tests.support.small_models import build

EXACT = LeastSquares(steps=500, tolerance=1e-9)


class States(Callback):
    """The module, its optimizer and averages of it at each epoch's start: before pruning if it stands before it, else after."""

    def __init__(self) -> None:
        self.modules: list[Any] = []
        self.optimizers: list[Any] = []
        self.averages: list[Any] = []

    def on_train_epoch_start(self, trainer: Any, pl_module: LightningModule) -> None:
        with pl_module.uncorrected() if isinstance(pl_module, lrp_prune.CorrectedModule) else torch.no_grad():
            self.modules.append(copy.deepcopy(pl_module))
        self.optimizers.append(copy.deepcopy(trainer.optimizers[0].state_dict()["state"]))
        averages = [getattr(callback, "_average_model", None) for callback in trainer.callbacks]
        self.averages.append([copy.deepcopy(entry.module) for entry in averages if entry is not None])


def inside(module: Any) -> Any:
    return module.module if isinstance(module, lrp_prune.CorrectedModule) else module


@pytest.mark.parametrize("corrected", [False, True])
@pytest.mark.parametrize("reference", [False, True])
def test_a_round_updates_what_it_keeps_as_prune_does(
    reference: bool, corrected: bool, make_module: Any, make_loader: Any, make_trainer: Callable[..., Any]
) -> None:
    module, loader = make_module(), make_loader(seed=2)
    pruning = RelevancePruning(sparsity=0.6, compensation="exact", reference=loader if reference else 0)
    before, after = States(), States()
    trained = lrp_prune.CorrectedModule(module) if corrected else module
    make_trainer(callbacks=[before, pruning, after], max_epochs=2).fit(trained, make_loader(), loader)
    dense, pruned = (inside(state.modules[1]) for state in (before, after))
    masked = copy.deepcopy(dense)
    masks = lrp_prune.prune(dense, list(loader), 0.6, rounds=1, compensation="exact")
    masks.apply_(masked)
    assert pruning.masks == masks
    for name, value in dense.state_dict().items():
        torch.testing.assert_close(pruned.state_dict()[name], value, rtol=1e-5, atol=1e-6)
    kept = {name: mask for name, mask in masks.items() if mask.any()}
    assert all(not torch.equal(pruned.state_dict()[name], masked.state_dict()[name]) for name in kept)


def test_dense_is_the_model_right_before_the_round(
    make_module: Any, make_loader: Any, make_trainer: Callable[..., Any]
) -> None:
    """As it was trained since the round before, whose zeros it has; optimizer states stay as they are beside new zeros."""
    pruning = RelevancePruning(sparsity=0.7, rounds=2, schedule=[0.4, 0.7], compensation=EXACT)
    before, after, loader = States(), States(), make_loader(seed=2)
    masks: list[Any] = []
    after.on_train_epoch_end = lambda *_: masks.append(pruning.masks)  # type: ignore[method-assign]
    trainer = make_trainer(callbacks=[before, pruning, after], max_epochs=3)
    trainer.fit(make_module(), make_loader(), loader)
    assert masks[0] is None and masks[1].num_pruned < masks[2].num_pruned
    for epoch in (1, 2):
        expected = before.modules[epoch]
        found = compensate_(expected, masks[epoch], list(loader), EXACT)
        assert set(found.errors) == set(masks[epoch]) and all(after < before for before, after in found.errors.values())
        for name, value in expected.state_dict().items():
            torch.testing.assert_close(after.modules[epoch].state_dict()[name], value, rtol=1e-4, atol=1e-6)
        for (name, parameter), index in zip(expected.named_parameters(), before.optimizers[epoch], strict=True):
            theirs, ours = before.optimizers[epoch][index], after.optimizers[epoch][index]
            mask = masks[epoch][name] if name in masks[epoch] else torch.ones_like(parameter, dtype=torch.bool)
            assert not parameter[~mask].any() and not ours["exp_avg"][~mask].any()
            assert all(torch.equal(ours[key][mask], theirs[key][mask]) for key in ("exp_avg", "exp_avg_sq"))
            assert torch.equal(ours["step"], theirs["step"])


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["none", "adamw"])
def test_an_average_moves_by_what_the_weights_move_by(
    optimizer: str, make_module: Any, make_loader: Any, make_trainer: Callable[..., Any]
) -> None:
    averaging = pytest.importorskip("lightning.pytorch.callbacks.weight_averaging").EMAWeightAveraging
    pruning, before, after = RelevancePruning(sparsity=0.6, compensation="exact"), States(), States()
    trainer = make_trainer(callbacks=[before, pruning, after, averaging(decay=0.9)], max_epochs=2)
    trainer.fit(make_module(optimizer), make_loader(), make_loader(seed=2))
    masks, dense, pruned = pruning.masks, before.modules[1].state_dict(), after.modules[1].state_dict()
    (average,), (made,) = (state.averages[1] for state in (before, after))
    assert masks is not None
    for name, value in average.named_parameters():
        mask = masks[name] if name in masks else torch.ones_like(value, dtype=torch.bool)
        moved = (made.state_dict()[name] - value)[mask]
        torch.testing.assert_close(moved, (pruned[name] - dense[name])[mask], rtol=1e-4, atol=1e-6)
        assert not made.state_dict()[name][~mask].any()
        if optimizer == "none":  # an average of equal weights
            torch.testing.assert_close(made.state_dict()[name], pruned[name])
    assert optimizer == "none" or any(not torch.equal(average.state_dict()[name], dense[name]) for name in masks)


@pytest.mark.parametrize("failing", ["solving", "averaging", "keeping"])
def test_an_error_leaves_weights_and_averages_as_they_were(
    failing: str,
    make_module: Any,
    make_loader: Any,
    make_trainer: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """So that what is written then has the round yet to come."""
    averaging = pytest.importorskip("lightning.pytorch.callbacks.weight_averaging").EMAWeightAveraging

    class Failing(LeastSquares):
        def solve(self, *given: Any) -> torch.Tensor:
            found = super().solve(*given)
            if failing == "solving" and len(found) == 4:  # the last layer
                raise KeyError("not today")
            return found

    def broken(*_: Any) -> None:
        raise KeyError("not today")

    if failing == "averaging":
        monkeypatch.setattr("lrp_prune.callbacks._pruner._shift_", broken)
    if failing == "keeping":
        monkeypatch.setattr("lrp_prune.callbacks._pruner._mask_averages", broken)
    pruning, before, averages = RelevancePruning(0.6, compensation=Failing()), States(), averaging(decay=0.5)
    module = make_module()
    trainer = make_trainer(callbacks=[before, pruning, averages], max_epochs=2)
    with pytest.raises(KeyError, match="not today"):
        trainer.fit(module, make_loader(), make_loader(seed=2))
    assert (pruning.round, pruning.masks) == (0, None)
    (average,) = before.averages[1]
    for found, expected in ((module, before.modules[1]), (averages._average_model.module, average)):
        expected = expected.state_dict()
        assert all(torch.equal(value, expected[name]) for name, value in found.state_dict().items())


@pytest.mark.slow
def test_resumed_with_masks_that_wait_it_is_the_uninterrupted_training(
    make_module: Any, make_loader: Any, make_trainer: Callable[..., Any], same_weights: Any, tmp_path: Path
) -> None:
    class Reseed(Callback):
        """Lightning does not store the random state."""

        def on_train_batch_start(self, trainer: Any, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
            torch.manual_seed(trainer.global_step)

    def arguments() -> dict[str, Any]:
        checkpoint = ModelCheckpoint(dirpath=tmp_path, save_top_k=-1, filename="{epoch}")
        pruning = RelevancePruning(sparsity=0.7, rounds=2, compensation=OptimalBrainSurgeon(dense=0.25))
        return {"callbacks": [pruning, checkpoint, Reseed()], "max_epochs": 4, "enable_checkpointing": True}

    whole = make_module()
    make_trainer(**arguments()).fit(whole, make_loader(), make_loader(seed=2))
    for epoch in (0, 1):
        module = make_module(seed=9)
        trainer = make_trainer(**arguments())
        trainer.fit(module, make_loader(), make_loader(seed=2), ckpt_path=tmp_path / f"epoch={epoch}.ckpt")
        assert same_weights(whole, module)


def test_the_table_and_the_log_say_what_was_done_and_what_it_cost(
    make_module: Any,
    make_loader: Any,
    make_trainer: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "lrp_prune")
    shown: list[str] = []
    monkeypatch.setattr("lrp_prune.callbacks._round.show", lambda trainer, text: shown.append(text))
    few = make_loader(samples=8, batch_size=4, seed=2)
    for loader in (make_loader(seed=2), few):
        pruning = RelevancePruning(sparsity=0.6, rounds=2, compensation="exact", name="mine")
        make_trainer(callbacks=[pruning], max_epochs=3).fit(make_module("none"), make_loader(), loader)
    lines = [line for text in shown for line in text.splitlines() if line.startswith("compensated: ")]
    assert len(lines) == 4 and all(f"compensated on {number} samples in " in line for line, number in zip(
        lines, (64, 64, 8, 8), strict=True
    ))  # fmt: skip
    assert "in the median" in lines[0] and "only masked: net.*.weight (is reached by fewer than 16" in lines[2]
    infos = [record.message for record in caplog.records if record.message.startswith("mine: round ")]
    assert [info.partition(": ")[2].partition(": ")[0] for info in infos] == ["round 1", "round 2"] * 2
    warned = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert warned == ["not compensated, only masked: net.*.weight (is reached by fewer than 16 samples or tokens)"]


@pytest.mark.slow
def test_a_preview_changes_nothing(
    make_module: Any, make_loader: Any, make_trainer: Callable[..., Any], same_weights: Any
) -> None:
    plain, previewed = make_module(), make_module()
    for module, callbacks in ((plain, []), (previewed, [RelevancePruning(compensation="exact", preview=True)])):
        torch.manual_seed(0)
        make_trainer(callbacks=callbacks, max_epochs=2).fit(module, make_loader(), make_loader(seed=2))
    assert same_weights(plain, previewed) and callbacks[0].previewed is not None


@pytest.mark.slow
@pytest.mark.parametrize("weights", [None, "relevance"])
@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed"])
def test_half_precision(
    precision: str, weights: Any, make_module: Any, make_loader: Any, make_trainer: Callable[..., Any]
) -> None:
    way = LeastSquares(weights=weights)
    pruning, before, after, loader = RelevancePruning(0.6, compensation=way), States(), States(), make_loader(seed=2)
    trainer = make_trainer(callbacks=[before, pruning, after], max_epochs=2, precision=precision)
    trainer.fit(make_module(), make_loader(), loader)
    dense, pruned, masks = before.modules[1], after.modules[1], pruning.masks
    masked = copy.deepcopy(dense)
    masks.apply_(masked)
    kind = torch.bfloat16 if precision == "bf16-true" else torch.float32
    inputs = next(iter(loader))[0].to(kind)
    errors = []
    for name, mask in masks.items():
        weight = pruned.get_parameter(name)
        assert weight.dtype is kind and not weight[~mask].any() and not torch.equal(weight, masked.get_parameter(name))
    with torch.no_grad():
        for model in (pruned, masked):
            errors.append(float((model.eval()(inputs) - dense.eval()(inputs)).square().mean()))
    assert errors[0] < 0.8 * errors[1]


@pytest.mark.slow
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpoints_change_nothing(
    reentrant: bool, make_module: Any, make_loader: Any, make_trainer: Callable[..., Any]
) -> None:
    from torch.utils.checkpoint import checkpoint

    class Checkpointed(type(make_module())):  # type: ignore[misc]
        """Parts of its forward are computed again in the backward."""

        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            inputs = self.net[:3](inputs)
            return checkpoint(self.net[3:], inputs, use_reentrant=reentrant)

    plain, module = make_module("none"), Checkpointed("none")
    pruning = [RelevancePruning(sparsity=0.6, compensation="exact") for _ in range(2)]
    for entry, callback in zip((plain, module), pruning, strict=True):
        torch.manual_seed(0)
        make_trainer(callbacks=[callback], max_epochs=2).fit(entry, make_loader(), make_loader(seed=2))
    assert pruning[0].masks == pruning[1].masks
    for ours, theirs in zip(module.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_a_target_of_the_modules_own_is_run(
    make_module: Any, make_loader: Any, make_trainer: Callable[..., Any]
) -> None:
    class Unrunnable(type(make_module())):  # type: ignore[misc]
        """Its forward takes what no loader gives."""

        def forward(self, inputs: torch.Tensor, scale: float) -> torch.Tensor:
            return self.net(inputs) * scale

        def loss(self, batch: Any) -> torch.Tensor:
            return nn.functional.cross_entropy(self(batch[0], 1.0), batch[1])

        def relevance_target(self, batch: Any) -> torch.Tensor:
            return self(batch[0], 1.0).gather(1, batch[1][:, None])[:, 0]

    module, plain = Unrunnable("none"), make_module("none")
    for entry in (module, plain):
        pruning = RelevancePruning(
            sparsity=0.6, compensation="exact", method="magnitude", reference=make_loader(seed=2)
        )
        make_trainer(callbacks=[pruning], max_epochs=2).fit(entry, make_loader(), make_loader(seed=2))
    for ours, theirs in zip(module.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"compensation": "best"}, r"compensation must be one of \['exact', 'obs'\].* got 'best'"),
        ({"compensation": True}, "compensation must be one of .* got True"),
        ({"compensation": LeastSquares}, "compensation must be one of"),
        ({"compensation": "obs", "recalibrate": True}, "leave recalibrate as it is"),
    ],
)
def test_what_cannot_be_is_refused_when_the_callback_is_made(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(MisconfigurationException, match=message):
        RelevancePruning(**arguments)


@pytest.mark.slow
def test_without_batches_to_compensate_on_no_step_is_made(
    make_module: Any, make_loader: Any, make_trainer: Callable[..., Any]
) -> None:
    def fit(loader: Any, **options: Any) -> None:
        pruning = RelevancePruning(method="random", compensation="exact", **options)
        make_trainer(callbacks=[pruning], max_epochs=2).fit(module, make_loader(), loader)

    module = make_module()
    with pytest.raises(
        MisconfigurationException, match=r"compensation needs batches: a validation loader .* or reference="
    ):
        fit(None)
    assert not module.zeros_after_step
    fit(None, preview=True)
    module = make_module()
    fit(None, reference=make_loader(seed=2))
    assert len(module.zeros_after_step) == 8


@pytest.mark.slow
def test_all_batches_are_read_once_more_and_no_random_number_is_drawn(
    make_module: Any, make_loader: Any, make_trainer: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    counted: list[tuple[int, bool]] = []

    def counting(model: Any, masks: Any, batches: Any, *given: Any, **options: Any) -> Compensated:
        state = torch.get_rng_state()
        found = compensate_(model, masks, batches, *given, **options)
        counted.append((found.samples, torch.equal(state, torch.get_rng_state())))
        return found

    monkeypatch.setattr("lrp_prune.callbacks._pruner.compensate_", counting)
    loader = make_loader(samples=640, batch_size=20, seed=2)
    for limit in (None, 3):
        pruning = RelevancePruning(method="magnitude", compensation="obs", max_batches=limit, reference=loader)
        make_trainer(callbacks=[pruning], max_epochs=2).fit(make_module(), make_loader(), None)
    assert counted == [(640, True), (60, True)]


class Images(nn.Sequential):
    """Filters, in groups among them."""

    def __init__(self) -> None:
        super().__init__(
            nn.Unflatten(1, (2, 2, 2)), nn.Conv2d(2, 8, 2, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 2, groups=2), nn.ReLU(),
            nn.Flatten(), nn.Linear(32, 4),
        )  # fmt: skip


class Language(LightningModule):
    """A transformer, with heads."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model = build("llama")

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss: torch.Tensor = self.model(**batch, labels=batch["input_ids"]).loss
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.training_step(batch, batch_idx)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.01)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("vectors", {"scope": "2:4"}),
        ("vectors", {"granularity": "neuron"}),
        ("images", {"granularity": "neuron"}),
        ("images", {"scope": "row"}),
        ("language", {"granularity": "head"}),
        ("language", {"scope": "2:4"}),
    ],
    ids=str,
)
def test_each_layer_is_its_closed_form_after_every_kind_of_mask(
    kind: str, options: dict[str, Any], make_module: Any, make_loader: Any, make_trainer: Callable[..., Any]
) -> None:
    way, loader = LeastSquares(damping=0.05, steps=1000, tolerance=1e-12), make_loader(seed=2)
    module = Language() if kind == "language" else make_module()
    if kind == "images":
        module.net = Images()
    if kind == "language":
        ids = torch.randint(2, 50, (24, 12), generator=torch.Generator().manual_seed(0))
        loader = DataLoader([{"input_ids": entry} for entry in ids], 8)
    pruning, before, after = RelevancePruning(0.5, compensation=way, **options), States(), States()
    trainer = make_trainer(callbacks=[before, pruning, after], max_epochs=2, precision="64-true")
    trainer.fit(module, loader if kind == "language" else make_loader(), loader)
    dense, pruned = before.modules[1], after.modules[1]

    if kind == "language":
        dense, pruned = dense.model, pruned.model

    def run(model: nn.Module) -> None:
        model(torch.cat([batch["input_ids"] if kind == "language" else batch[0].double() for batch in loader]))

    checked = check_closed_form(dense, pruned, pruning.masks, run, way, 1e-6)
    masked = {name for name in pruning.masks if pruning.masks.pruned_in(name)}
    assert checked == {name for name in masked if dense.get_parameter(name).dim() > 1} and len(checked) >= 2


@pytest.mark.slow
def test_weights_beside_adapters_are_updated_and_adapters_are_not(make_trainer: Callable[..., Any]) -> None:
    peft = pytest.importorskip("peft")
    module = Language()
    module.model = peft.get_peft_model(module.model, peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
    ids = torch.randint(2, 50, (24, 12), generator=torch.Generator().manual_seed(0))
    loader = DataLoader([{"input_ids": entry} for entry in ids], 8)
    pruning = RelevancePruning(0.5, compensation="exact", include=["*.q_proj", "*.down_proj"], scope="row")
    before, after = States(), States()
    make_trainer(callbacks=[before, pruning, after], max_epochs=2).fit(module, loader, loader)
    dense, pruned = (dict(state.modules[1].named_parameters()) for state in (before, after))
    changed = {name for name in dense if not torch.equal(dense[name], pruned[name])}
    assert changed == {name for name in dense if "base_layer" in name} and any("lora_B" in name for name in dense)
    assert pruning.masks is not None and pruning.masks.sparsity == 0.5
    masked = copy.deepcopy(before.modules[1])
    pruning.masks.apply_(masked)
    with torch.no_grad():
        whole, errors = before.modules[1].eval().model(input_ids=ids).logits, []
        for entry in (after.modules[1], masked):
            errors.append(float((entry.eval().model(input_ids=ids).logits - whole).square().mean()))
    assert errors[0] < 0.9 * errors[1]
