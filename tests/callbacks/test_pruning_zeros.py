"""Zeros survive every optimizer, precision, loop and average, step by step."""

from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision

from lrp_prune import CorrectedModule, Patch
from lrp_prune.callbacks import RelevancePruning, Rounds

ENTRIES = 8 * 24 + 24 * 16 + 16 * 4


@pytest.mark.slow
@pytest.mark.parametrize(
    ("optimizer", "arguments"),
    [
        ("adamw", {}),
        ("sgd", {}),
        ("adamw", {"accumulate_grad_batches": 3}),
        ("adamw", {"gradient_clip_val": 0.5}),
        ("sgd", {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}),
        ("adamw", {"precision": "bf16-mixed"}),
        ("sgd", {"precision": "bf16-true"}),
    ],
)
def test_zeros_survive_every_step(make_module, make_loader, make_trainer, optimizer, arguments) -> None:
    module = make_module(optimizer=optimizer)
    pruning = RelevancePruning(sparsity=0.5, rounds=2, schedule=[0.25, 0.5], scope="global")
    make_trainer(callbacks=[pruning], max_epochs=4, **arguments).fit(module, make_loader(), make_loader(seed=2))
    assert module.zeros_after_step == [0] * 4 + [ENTRIES // 4] * 4 + [ENTRIES // 2] * 8


class Noise(Callback):
    """Changes gradients where Lightning lets callbacks do so: within the closure of the optimizer's step."""

    def __init__(self, assign: bool) -> None:
        self.assign = assign

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        for parameter in pl_module.parameters():
            noise = torch.randn_like(parameter)
            if self.assign:
                parameter.grad = parameter.grad + noise
            else:
                parameter.grad.add_(noise)


class Constraint(Callback):
    """Writes to weights after a step: in place, out of autograd's sight, or by putting others in their place."""

    def __init__(self, way: str) -> None:
        self.way = way

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        for parameter in pl_module.parameters():
            if self.way == "data":
                parameter.data.clamp_(min=0.01)
            elif self.way == "copied":
                parameter.data = parameter.data.clamp(min=0.01)
            else:
                with torch.no_grad():
                    parameter.clamp_(min=0.01)


class Zeros(Callback):
    """Counts them where a model is used or kept."""

    def __init__(self) -> None:
        self.found: set[tuple[str, int]] = set()

    def _count(self, where: str, trainer: Any, weights: Any) -> None:
        if trainer.global_step > 4:  # the first epoch's, after which there is something to keep
            self.found.add((where, sum(int((value == 0).sum()) for value in weights if value.dim() == 2)))

    def on_validation_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self._count("validation", trainer, pl_module.parameters())

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        self._count("checkpoint", trainer, checkpoint["state_dict"].values())


@pytest.mark.parametrize("way", ["in place", "data", "copied"])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_zeros_survive_what_writes_to_weights_after_a_step(
    make_module, make_loader, make_trainer, tmp_path, optimizer, way
) -> None:
    module, zeros = make_module(optimizer=optimizer), Zeros()
    seen: list[int] = []
    module.register_forward_pre_hook(
        lambda module, _: (
            seen.append(sum(int((p == 0).sum()) for p in module.parameters() if p.dim() == 2))
            if module.training
            else None
        )
    )
    saving = ModelCheckpoint(tmp_path, every_n_train_steps=3, save_top_k=-1)
    pruning = RelevancePruning(sparsity=0.5, scope="global")
    trainer = make_trainer(callbacks=[pruning, Constraint(way), zeros, saving], max_epochs=3, enable_checkpointing=True)
    with pytest.warns(UserWarning, match=r"between two steps something writes to pruned weights of .*weight") as told:
        trainer.fit(module, make_loader(), make_loader(seed=2))
    assert sum("between two steps" in str(each.message) for each in told) == 1
    assert seen == [0] * 4 + [ENTRIES // 2] * 8
    assert zeros.found == {("validation", ENTRIES // 2), ("checkpoint", ENTRIES // 2)}


@pytest.mark.parametrize("weights_only", [False, True])
def test_zeros_survive_in_averages_and_in_checkpoints_of_weights(
    make_module, make_loader, make_trainer, tmp_path, weights_only
) -> None:
    saving = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=2, save_top_k=-1, save_weights_only=weights_only)
    pruning, constraint = RelevancePruning(sparsity=0.5, scope="global"), Constraint("in place")
    averaged = [pruning, constraint, EMAWeightAveraging(decay=0.5)]  # which does without such checkpoints
    callbacks = [*([constraint, pruning] if weights_only else averaged), Zeros(), saving]
    module, zeros = make_module(optimizer="adamw"), callbacks[-2]
    with pytest.warns(UserWarning, match="between two steps something writes"):
        make_trainer(callbacks=callbacks, max_epochs=3, enable_checkpointing=True).fit(
            module, make_loader(), make_loader(seed=2)
        )
    assert {count for where, count in zeros.found if where == "validation"} == {ENTRIES // 2}
    for step in (6, 8, 10, 12):
        saved = torch.load(tmp_path / f"step={step}.ckpt", weights_only=False)
        for state in (saved["state_dict"], saved.get("current_model_state", saved["state_dict"])):
            assert sum(int((value == 0).sum()) for value in state.values() if value.dim() == 2) == ENTRIES // 2


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("order", [1, -1])
def test_zeros_survive_noise_on_gradients(make_module, make_loader, make_trainer, assign, order) -> None:
    module = make_module(optimizer="adamw")
    callbacks = [RelevancePruning(sparsity=0.5, scope="global"), Noise(assign)][::order]
    make_trainer(callbacks=callbacks, max_epochs=3).fit(module, make_loader(), make_loader(seed=2))
    assert module.zeros_after_step == [0] * 4 + [ENTRIES // 2] * 8


@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_zeros_survive_patches_and_their_removal(make_module, make_loader, make_trainer, tmp_path, strength) -> None:
    """Patched weights are small, so that they are pruned first: what they were before must not come back."""
    module = make_module(optimizer="adamw")
    corrected = CorrectedModule(module)
    name = next(name for name, parameter in module.named_parameters() if parameter.dim() == 2)
    corrected.add("a", Patch.from_positions(module, {name: torch.arange(40)}), strength)
    pruning = RelevancePruning(sparsity=0.5, rounds=2, scope="global", method="magnitude")
    trainer = make_trainer(callbacks=[pruning], max_epochs=4)
    trainer.fit(corrected, make_loader(), make_loader(seed=2))

    parameters = dict(module.named_parameters())
    masks = {key.removeprefix("module."): mask for key, mask in pruning.masks.items()}
    assert (~masks[name].reshape(-1)[:40]).sum() > 10
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    saved = torch.load(tmp_path / "last.ckpt", weights_only=False)["state_dict"]
    for state in (parameters, {key.removeprefix("module."): value for key, value in saved.items()}):
        assert not any(state[key][~mask].count_nonzero() for key, mask in masks.items())
    corrected.disable("a")
    assert not any(parameters[key][~mask].count_nonzero() for key, mask in masks.items())


def test_zeros_survive_manual_optimization(make_manual_module, make_loader, make_trainer) -> None:
    module = make_manual_module()
    pruning = RelevancePruning(sparsity=0.5, scope="global")
    make_trainer(callbacks=[pruning], max_epochs=3).fit(module, make_loader(), make_loader(seed=2))
    assert module.zeros_after_step == [0] * 4 + [ENTRIES // 2] * 8


def _adafactor(module: Any) -> Any:
    return pytest.importorskip("transformers").Adafactor(module.parameters(), lr=1e-2, relative_step=False)


def _scheduled(module: Any) -> Any:
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.05, total_steps=64)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


@pytest.mark.parametrize("optimizer", [_adafactor, _scheduled])
def test_zeros_survive_in_windows_that_are_clipped(make_module, make_loader, make_trainer, optimizer) -> None:
    module = make_module(optimizer=optimizer)
    pruning = RelevancePruning(sparsity=0.5, scope="global")
    arguments = {"accumulate_grad_batches": 2, "gradient_clip_val": 0.5, "max_epochs": 3}
    make_trainer(callbacks=[pruning], **arguments).fit(module, make_loader(), make_loader(seed=2))
    assert module.zeros_after_step == [0] * 4 + [ENTRIES // 2] * 8


def test_zeros_survive_gradient_scaling(make_module, make_loader, make_trainer) -> None:
    """``16-mixed``, as far as a CPU has it; the scale is not lowered by what is pruned."""
    module = make_module()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    pruning = RelevancePruning(sparsity=0.5, scope="global")
    trainer = make_trainer(
        callbacks=[pruning], max_epochs=3, plugins=[MixedPrecision("16-mixed", "cpu", scaler)], gradient_clip_val=0.5
    )
    trainer.fit(module, make_loader(), make_loader(seed=2))
    assert module.zeros_after_step == [0] * 4 + [ENTRIES // 2] * 8
    assert scaler.get_scale() == 2.0**10


def test_clipping_counts_kept_gradients_only(make_module, make_loader, make_trainer) -> None:
    norms = []

    class Watch(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            if pruning.masks is not None and batch_idx % 2:  # after a step, with its clipped gradients
                for name, mask in pruning.masks.items():
                    assert pl_module.get_parameter(name).grad[~mask].count_nonzero() == 0
                norms.append(float(torch.cat([p.grad.flatten() for p in pl_module.parameters()]).norm()))

    pruning = RelevancePruning(sparsity=0.9, scope="global")
    arguments = {"max_epochs": 2, "gradient_clip_val": 1e-3, "accumulate_grad_batches": 2}
    make_trainer(callbacks=[pruning, Watch()], **arguments).fit(make_module(), make_loader(), make_loader(seed=2))
    assert norms and all(norm == pytest.approx(1e-3, rel=1e-3) for norm in norms)


def test_hooks_are_gone_after_an_exception(make_module, make_loader, make_trainer) -> None:
    class Fail(Callback):
        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            if trainer.current_epoch == 1:
                raise RuntimeError("stop here")

    module = make_module()
    pruning = RelevancePruning(sparsity=0.5)
    trainer = make_trainer(callbacks=[pruning, Fail()], max_epochs=2)
    with pytest.raises(RuntimeError, match="stop here"):
        trainer.fit(module, make_loader(), make_loader(seed=2))
    assert pruning.round == 1
    assert all(not parameter._post_accumulate_grad_hooks for parameter in module.parameters())


def test_only_trainable_weights_by_default(make_module, make_loader, make_trainer) -> None:
    module = make_module()
    module.net[0].requires_grad_(False)
    pruning = RelevancePruning(sparsity=0.5, scope="layer")
    make_trainer(callbacks=[pruning], max_epochs=2).fit(module, make_loader(), make_loader(seed=2))
    assert list(pruning.masks) == ["net.4.weight", "net.6.weight"]


def test_instances_for_different_layers_have_their_own_state(make_module, make_loader, make_trainer) -> None:
    first = RelevancePruning(sparsity=0.5, include=["net.0.weight"], method="magnitude")
    second = RelevancePruning(sparsity=0.25, include=["net.4.weight"], method="magnitude", name="second")
    assert first.state_key != second.state_key
    module = make_module()
    trainer = make_trainer(callbacks=[first, second], max_epochs=2)
    trainer.fit(module, make_loader(), make_loader(seed=2))
    assert trainer.callback_metrics["pruning/sparsity"] == 0.5 and trainer.callback_metrics["second/sparsity"] == 0.25
    assert int((module.net[0].weight == 0).sum()) == 8 * 24 // 2
    assert int((module.net[4].weight == 0).sum()) == 24 * 16 // 4


@pytest.mark.parametrize("sanity", [0, 2])
@pytest.mark.parametrize(
    ("options", "others"),
    [
        ({"method": "magnitude"}, {"method": "magnitude"}),
        ({"include": ["net.0", "net.4"]}, {"include": ["net.4", "net.6"], "method": "wanda"}),
        ({"granularity": "neuron"}, {"granularity": "neuron"}),
    ],
    ids=["all weights", "one layer", "neurons"],
)
def test_the_same_weights_under_two_names_are_refused(
    options: Any, others: Any, sanity: int, make_module, make_loader, make_trainer
) -> None:
    callbacks = [RelevancePruning(0.5, **options, summary=False), RelevancePruning(0.25, **others, name="second")]
    module, match = make_module(), r"name='pruning'\) and .*name='second'\) would both prune .*net\.[4*].*include="
    trainer = make_trainer(callbacks=callbacks, max_epochs=2, num_sanity_val_steps=sanity)
    with pytest.raises(MisconfigurationException, match=match):
        trainer.fit(module, make_loader(), make_loader(seed=2))
    known = sanity or "granularity" not in options  # of units, what there are shows on the first batch
    assert len(module.zeros_after_step) == (0 if known else 4) and not any(module.zeros_after_step)


@pytest.mark.parametrize("when", ["on_train_epoch_start", "on_train_end"])
def test_a_pruned_layer_that_is_replaced_by_a_larger_one_is_named(
    when: str, make_module, make_loader, make_trainer
) -> None:
    class Growing(Callback):
        def grow(self, trainer: Any, pl_module: Any) -> None:
            if trainer.current_epoch >= 2:
                pl_module.net[4], pl_module.net[6] = torch.nn.Linear(24, 20), torch.nn.Linear(20, 4)

    setattr(Growing, when, Growing.grow)
    pruning = RelevancePruning(sparsity=0.5, include=["net.4"], method="magnitude", summary=False)
    trainer = make_trainer(callbacks=[Growing(), pruning], max_epochs=3)
    told = r"net.4.weight has shape \(20, 24\) now, and its mask \(16, 24\).*before the first round"
    ends = when == "on_train_end"
    with pytest.warns(UserWarning, match=told) if ends else pytest.raises(MisconfigurationException, match=told):
        trainer.fit(make_module(), make_loader(), make_loader(seed=2))


@pytest.mark.parametrize("first", ["weight", "neuron"])
def test_weights_and_units_of_the_same_layers_are_refused(first: str, make_module, make_loader, make_trainer) -> None:
    kinds = [first, "neuron" if first == "weight" else "weight"]
    callbacks = [RelevancePruning(0.5, granularity=kind, name=kind, summary=False) for kind in kinds]
    module = make_module()
    with pytest.raises(MisconfigurationException, match=r"would both prune net\..*weight.*include="):
        make_trainer(callbacks=callbacks, max_epochs=2).fit(module, make_loader(), make_loader(seed=2))
    assert not module.zeros_after_step


def test_weights_and_units_of_different_layers_go_together(make_module, make_loader, make_trainer) -> None:
    weights = RelevancePruning(0.5, include=["net.6.weight"], scope="layer", summary=False)
    neurons = RelevancePruning(0.5, granularity="neuron", include=["net.0*"], name="neurons", summary=False)
    trainer = make_trainer(callbacks=[weights, neurons], max_epochs=2)
    trainer.fit(make_module(), make_loader(), make_loader(seed=2))
    assert trainer.callback_metrics["pruning/sparsity"] == 0.5 and neurons.round == 1
    assert not set(weights.masks) & set(neurons.masks)


def test_rounds_that_are_done_have_their_weights_still(make_module, make_loader, make_trainer) -> None:
    first, module = RelevancePruning(0.5, Rounds(start=0), method="magnitude", summary=False), make_module()
    make_trainer(callbacks=[first], max_epochs=1).fit(module, make_loader(), make_loader(seed=2))
    second = RelevancePruning(0.5, Rounds(start=0), method="magnitude", name="second", include=["net.0"])
    with pytest.raises(MisconfigurationException, match=r"would both prune net\.0\.weight"):
        make_trainer(callbacks=[first, second], max_epochs=1).fit(module, make_loader(), make_loader(seed=2))


def test_a_preview_may_look_at_what_another_prunes(make_module, make_loader, make_trainer) -> None:
    pruning = RelevancePruning(0.5, method="magnitude", summary=False)
    shows = RelevancePruning(0.25, preview=True, name="shown")
    make_trainer(callbacks=[shows, pruning], max_epochs=2).fit(make_module(), make_loader(), make_loader(seed=2))
    assert pruning.round == 1 and shows.previewed is not None


def test_two_meanings_of_one_metric_are_refused(make_module, make_loader, make_trainer) -> None:
    callbacks = [
        RelevancePruning(sparsity=0.5, include=["net.0"], method="magnitude"),
        RelevancePruning(sparsity=0.25, include=["net.4"], method="magnitude"),
    ]
    with pytest.raises(MisconfigurationException, match=r"would log pruning/sparsity.*name='attention'"):
        make_trainer(callbacks=callbacks, max_epochs=2).fit(make_module(), make_loader(), make_loader(seed=2))
    with pytest.raises(MisconfigurationException, match="name must be a word"):
        RelevancePruning(name="a/b")


def test_the_same_weights_under_two_names_have_their_own_state() -> None:
    """A magnitude callback beside one by relevance, say; only the names differ."""
    keys = {RelevancePruning(name=name).state_key for name in ("pruning", "other", "third")}
    assert len(keys) == 3
    assert RelevancePruning().state_key == RelevancePruning(name="pruning").state_key


def test_the_guarded_metric_begins_with_the_name(make_module, make_loader, make_trainer) -> None:
    pruning = RelevancePruning(sparsity=0.5, monitor="val_loss", name="trimming")
    trainer = make_trainer(callbacks=[pruning], max_epochs=2)
    trainer.fit(make_module(), make_loader(), make_loader(seed=2))
    assert trainer.callback_metrics["trimming/val_loss"] == trainer.callback_metrics["val_loss"]
    assert trainer.callback_metrics["trimming/sparsity"] == 0.5
    assert not any(name.startswith("pruning/") for name in trainer.callback_metrics)
