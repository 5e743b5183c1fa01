"""Pruning in rounds inside real trainings: schedules are met exactly, zeros stay, checkpoints and resumes are right."""

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, StochasticWeightAveraging
from torch import nn

import lrp_prune.pruning.scorers as scorers
from lrp_prune.callbacks import RelevancePruning
from lrp_prune.pruning import sparsity_schedule

ENTRIES = 8 * 24 + 24 * 16 + 16 * 4
METHODS = ["lrp", "wanda", "gradient", "magnitude", "random"]


class Record(Callback):
    """Zeros and figures after each epoch's training."""

    def __init__(self, count: Any) -> None:
        self.count, self.zeros, self.metrics = count, [], []

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self.zeros.append(self.count(pl_module))
        self.metrics.append({name: float(value) for name, value in trainer.callback_metrics.items()})


@pytest.mark.parametrize("method", METHODS)
def test_total_sparsity_follows_the_schedule(make_module, make_loader, make_trainer, count_zeros, method) -> None:
    pruning = RelevancePruning(sparsity=0.7, rounds=3, schedule="cubic", method=method, scope="global")
    record, module = Record(count_zeros), make_module()
    make_trainer(callbacks=[record, pruning], max_epochs=4).fit(module, make_loader(), make_loader(seed=2))
    targets = [0.0, *sparsity_schedule("cubic", 0.7, 3)]
    assert record.zeros == [round(target * ENTRIES) for target in targets]
    assert [metrics["pruning/round"] for metrics in record.metrics] == [0, 1, 2, 3]
    for metrics, zeros in zip(record.metrics, record.zeros, strict=True):
        assert metrics["pruning/sparsity"] == pytest.approx(zeros / ENTRIES)
    assert record.metrics[-1]["pruning/target"] == pytest.approx(0.7)
    assert record.metrics[-1]["pruning/newly_pruned"] == record.zeros[-1] - record.zeros[-2]
    assert pruning.masks.num_pruned == round(0.7 * ENTRIES)
    assert list(module.state_dict()) == list(make_module().state_dict())
    for name, mask in pruning.masks.items():
        assert torch.equal(module.get_parameter(name) != 0, mask)


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


def test_zeros_survive_manual_optimization(make_manual_module, make_loader, make_trainer) -> None:
    module = make_manual_module()
    pruning = RelevancePruning(sparsity=0.5, scope="global")
    make_trainer(callbacks=[pruning], max_epochs=3).fit(module, make_loader(), make_loader(seed=2))
    assert module.zeros_after_step == [0] * 4 + [ENTRIES // 2] * 8


@pytest.mark.parametrize("average", ["swa", "ema"])
def test_zeros_survive_weight_averaging(make_module, make_loader, make_trainer, count_zeros, tmp_path, average) -> None:
    callbacks = pytest.importorskip("lightning.pytorch.callbacks.weight_averaging")
    module = make_module()
    pruning = RelevancePruning(sparsity=0.5, scope="global", start_epoch=2)
    averaging = {
        "swa": lambda: StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=1),
        "ema": lambda: callbacks.EMAWeightAveraging(decay=0.9),
    }[average]()
    trainer = make_trainer(callbacks=[pruning, averaging], max_epochs=4)
    trainer.fit(module, make_loader(), make_loader(seed=2))
    assert count_zeros(module) == ENTRIES // 2
    assert module.zeros_after_step[:16] == [0] * 8 + [ENTRIES // 2] * 8  # SWA adds an epoch for batch normalization
    trainer.save_checkpoint(tmp_path / "file.ckpt")
    twin = make_module()
    saved = torch.load(tmp_path / "file.ckpt", weights_only=True)
    twin.load_state_dict({name: value for name, value in saved["state_dict"].items() if name in twin.state_dict()})
    assert count_zeros(twin) == ENTRIES // 2


def test_callback_is_pickled_after_a_fit(make_module, make_loader, make_trainer) -> None:
    pruning = RelevancePruning(sparsity=0.5)
    make_trainer(callbacks=[pruning], max_epochs=2).fit(make_module(), make_loader(), make_loader(seed=2))
    assert pickle.loads(pickle.dumps(pruning)).masks == pruning.masks


@pytest.mark.parametrize("steps", [3, 5])
def test_rounds_by_steps(make_module, make_loader, make_trainer, steps) -> None:
    module = make_module()
    pruning = RelevancePruning(
        sparsity=0.5, rounds=2, schedule="linear", every_n_steps=steps, method="magnitude", scope="global"
    )
    make_trainer(callbacks=[pruning], max_epochs=4).fit(module, make_loader(), make_loader(seed=2))
    expected = [0] * steps + [ENTRIES // 4] * steps + [ENTRIES // 2] * (16 - 2 * steps)
    assert module.zeros_after_step == expected


def test_rounds_by_steps_wait_for_the_next_validation(make_module, make_loader, make_trainer) -> None:
    module = make_module()
    pruning = RelevancePruning(sparsity=0.5, rounds=2, schedule="linear", every_n_steps=3, scope="global")
    trainer = make_trainer(callbacks=[pruning], max_epochs=3, val_check_interval=2)
    trainer.fit(module, make_loader(), make_loader(seed=2))
    # Due at steps 3 and 6; the validations are after steps 2, 4, 6, ...
    assert module.zeros_after_step == [0] * 4 + [ENTRIES // 4] * 2 + [ENTRIES // 2] * 6


def test_reference_data_need_no_validation(make_module, make_loader, make_trainer, same_weights) -> None:
    module, twin = make_module(), make_module()
    pruning = RelevancePruning(sparsity=0.5, reference=make_loader(seed=5), start_epoch=0, scope="global")
    make_trainer(callbacks=[pruning], max_epochs=1).fit(module, make_loader())
    assert module.zeros_after_step == [ENTRIES // 2] * 4
    scorer = scorers.scorer("lrp", twin)
    for batch in make_loader(seed=5):
        scorer.update(batch)
    from lrp_prune.pruning import select

    best = scorers.selection_options("lrp", "weight", "global", "absolute", "auto")
    assert select(scorer.compute(), sparsity=0.5, **best) == pruning.masks


@pytest.mark.parametrize("arguments", [{}, {"accumulate_grad_batches": 3, "val_check_interval": 2}])
@pytest.mark.parametrize("data", ["validation", "reference"])
def test_sparsity_zero_leaves_the_training_bit_for_bit(
    make_module, make_loader, make_trainer, same_weights, arguments, data
) -> None:
    reference = make_loader(seed=5) if data == "reference" else None
    modules = []
    for callbacks in ([], [RelevancePruning(sparsity=0.0, rounds=2, schedule="linear", reference=reference)]):
        torch.manual_seed(3)
        module = make_module()
        make_trainer(callbacks=callbacks, max_epochs=3, **arguments).fit(module, make_loader(), make_loader(seed=2))
        modules.append(module)
    assert same_weights(*modules)


def test_a_several_times_validated_epoch_is_collected_once(make_module, make_loader, make_trainer, monkeypatch) -> None:
    calls = []
    real = scorers.scorer
    monkeypatch.setattr(scorers, "scorer", lambda *args, **kwargs: calls.append(args) or real(*args, **kwargs))
    pruning = RelevancePruning(sparsity=0.5)
    make_trainer(callbacks=[pruning], max_epochs=3, val_check_interval=0.25).fit(
        make_module(), make_loader(), make_loader(seed=2)
    )
    assert len(calls) == 2  # one that checks the patterns at the start, one that collects


def test_checkpoints_hold_no_pruned_weights_under_an_earlier_metric(
    make_module, make_loader, make_trainer, count_zeros, tmp_path
) -> None:
    """The state dict of each file gives the metric that the file is named after."""
    module = make_module()
    pruning = RelevancePruning(sparsity=0.7, rounds=3, schedule="linear")
    checkpoint = ModelCheckpoint(dirpath=tmp_path, monitor="val_loss", save_top_k=-1, filename="{epoch}-{val_loss:.6f}")
    trainer = make_trainer(callbacks=[pruning, checkpoint], max_epochs=4, enable_checkpointing=True)
    trainer.fit(module, make_loader(), make_loader(seed=2))
    assert len(checkpoint.best_k_models) == 4
    for path, metric in checkpoint.best_k_models.items():
        saved = torch.load(path, weights_only=True)
        twin = make_module()
        twin.load_state_dict(saved["state_dict"])
        measured = make_trainer().validate(twin, make_loader(seed=2), verbose=False)[0]["val_loss"]
        assert measured == pytest.approx(float(metric), abs=1e-6)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_resume_in_the_middle_equals_the_uninterrupted_run(
    make_module, make_loader, make_trainer, same_weights, tmp_path, method, optimizer
) -> None:
    def arguments() -> dict[str, Any]:
        checkpoint = ModelCheckpoint(dirpath=tmp_path / "c", save_top_k=-1, filename="{epoch}")
        pruning = RelevancePruning(sparsity=0.7, rounds=3, schedule="cubic", method=method)
        return {"callbacks": [pruning, checkpoint, Reseed()], "max_epochs": 5, "enable_checkpointing": True}

    class Reseed(Callback):
        """Lightning does not store the random state."""

        def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
            torch.manual_seed(trainer.global_step)

    whole = make_module(optimizer=optimizer)
    uninterrupted = arguments()
    make_trainer(**uninterrupted).fit(whole, make_loader(), make_loader(seed=2))
    paths = sorted(Path(tmp_path / "c").glob("*.ckpt"))
    assert len(paths) == 5
    for path in paths[:4]:
        resumed, module = arguments(), make_module(optimizer=optimizer, seed=9)
        make_trainer(**resumed).fit(module, make_loader(), make_loader(seed=2), ckpt_path=path)
        assert same_weights(whole, module), path
        assert resumed["callbacks"][0].masks == uninterrupted["callbacks"][0].masks


def test_resume_within_an_epoch_keeps_zeros_and_prunes_on_time(
    make_module, make_loader, make_trainer, tmp_path
) -> None:
    checkpoint = ModelCheckpoint(dirpath=tmp_path, every_n_train_steps=1, save_top_k=-1, filename="{step}")
    arguments = {"sparsity": 0.5, "rounds": 2, "schedule": "linear", "scope": "global"}
    trainer = make_trainer(
        callbacks=[RelevancePruning(**arguments), checkpoint], max_epochs=3, enable_checkpointing=True
    )
    whole = make_module()
    trainer.fit(whole, make_loader(), make_loader(seed=2))
    for step in range(1, 12):
        module = make_module(seed=9)
        trainer = make_trainer(callbacks=[RelevancePruning(**arguments)], max_epochs=3)
        trainer.fit(module, make_loader(), make_loader(seed=2), ckpt_path=tmp_path / f"step={step}.ckpt")
        expected = whole.zeros_after_step[step:]
        assert module.zeros_after_step[-len(expected) :] == expected, step


def test_checkpoint_loads_with_weights_only_and_packs_masks(make_module, make_loader, make_trainer, tmp_path) -> None:
    trainer = make_trainer(callbacks=[RelevancePruning(sparsity=0.5, rounds=2, schedule="linear")], max_epochs=3)
    trainer.fit(make_module(), make_loader(), make_loader(seed=2))
    trainer.save_checkpoint(tmp_path / "file.ckpt")
    saved = torch.load(tmp_path / "file.ckpt", weights_only=True)
    state = next(value for name, value in saved["callbacks"].items() if "RelevancePruning" in name)
    assert state["version"] == 1
    assert sum(bits.numel() for bits in state["masks"]["bits"].values()) == ENTRIES // 8


def test_state_of_another_version_is_refused() -> None:
    pruning = RelevancePruning()
    state = pruning.state_dict()
    with pytest.raises(MisconfigurationException, match="version 7"):
        pruning.load_state_dict({**state, "version": 7})


def test_resuming_with_other_arguments_warns() -> None:
    state = RelevancePruning(sparsity=0.5).state_dict()
    with pytest.warns(UserWarning, match=r"0\.7.*was.*0\.5"):
        RelevancePruning(sparsity=0.7).load_state_dict(state)


def test_instances_for_different_layers_have_their_own_state(make_module, make_loader, make_trainer) -> None:
    first = RelevancePruning(sparsity=0.5, include=["net.0.weight"], method="magnitude")
    second = RelevancePruning(sparsity=0.25, include=["net.4.weight"], method="magnitude")
    assert first.state_key != second.state_key
    module = make_module()
    make_trainer(callbacks=[first, second], max_epochs=2).fit(module, make_loader(), make_loader(seed=2))
    assert int((module.net[0].weight == 0).sum()) == 8 * 24 // 2
    assert int((module.net[4].weight == 0).sum()) == 24 * 16 // 4


def test_only_trainable_weights_by_default(make_module, make_loader, make_trainer) -> None:
    module = make_module()
    module.net[0].requires_grad_(False)
    pruning = RelevancePruning(sparsity=0.5, scope="layer")
    make_trainer(callbacks=[pruning], max_epochs=2).fit(module, make_loader(), make_loader(seed=2))
    assert list(pruning.masks) == ["net.4.weight", "net.6.weight"]


def test_masks_pending_at_the_end_are_applied_with_a_warning(
    make_module, make_loader, make_trainer, count_zeros
) -> None:
    class Stop(Callback):
        def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
            trainer.should_stop = not trainer.sanity_checking

    module = make_module()
    trainer = make_trainer(callbacks=[RelevancePruning(sparsity=0.5, scope="global"), Stop()], max_epochs=2)
    with pytest.warns(UserWarning, match="applied now"):
        trainer.fit(module, make_loader(), make_loader(seed=2))
    assert module.zeros_after_step == [0] * 4
    assert count_zeros(module) == ENTRIES // 2


def test_a_second_fit_goes_on_and_another_model_starts_anew(
    make_module, make_loader, make_trainer, count_zeros
) -> None:
    pruning = RelevancePruning(sparsity=0.5, scope="global")
    module, other = make_module(), make_module(seed=4)
    make_trainer(callbacks=[pruning], max_epochs=2).fit(module, make_loader(), make_loader(seed=2))
    make_trainer(callbacks=[pruning], max_epochs=2).fit(module, make_loader(), make_loader(seed=2))
    assert module.zeros_after_step[4:] == [ENTRIES // 2] * 12
    make_trainer(callbacks=[pruning], max_epochs=2).fit(other, make_loader(), make_loader(seed=2))
    assert other.zeros_after_step == [0] * 4 + [ENTRIES // 2] * 4
    assert all(not parameter._post_accumulate_grad_hooks for parameter in [*module.parameters(), *other.parameters()])


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


def test_guarded_metric_keeps_the_best_at_the_final_sparsity(
    make_module, make_loader, make_trainer, count_zeros, tmp_path
) -> None:
    pruning = RelevancePruning(sparsity=0.9, rounds=2, schedule="linear", guard="val_loss", scope="global")
    best = ModelCheckpoint(dirpath=tmp_path, monitor="pruning/val_loss", mode="min")
    patient = EarlyStopping(monitor="pruning/val_loss", patience=1)
    module = make_module()
    trainer = make_trainer(callbacks=[pruning, best, patient], max_epochs=5, enable_checkpointing=True)
    trainer.fit(module, make_loader(), make_loader(seed=2))
    twin = make_module()
    saved = torch.load(best.best_model_path, weights_only=True)
    twin.load_state_dict(saved["state_dict"])
    assert count_zeros(twin) == round(0.9 * ENTRIES)
    measured = make_trainer().validate(twin, make_loader(seed=2), verbose=False)[0]["val_loss"]
    assert measured == pytest.approx(float(best.best_model_score), abs=1e-6)


def test_unguarded_monitors_are_warned_about(make_module, make_loader, make_trainer, tmp_path) -> None:
    callbacks = [
        RelevancePruning(method="magnitude"),
        ModelCheckpoint(dirpath=tmp_path, monitor="val_loss"),
        EarlyStopping(monitor="val_loss"),
    ]
    trainer = make_trainer(callbacks=callbacks, max_epochs=2, enable_checkpointing=True)
    with pytest.warns(UserWarning) as caught:
        trainer.fit(make_module(), make_loader(), make_loader())
    messages = [str(warning.message) for warning in caught]
    assert any("ModelCheckpoint(monitor='val_loss')" in message for message in messages)
    assert any("EarlyStopping(monitor='val_loss')" in message for message in messages)


@pytest.mark.parametrize(
    ("callback", "trainer_arguments", "message"),
    [
        ({"rounds": 3}, {"max_epochs": 3}, r"need 4 epochs.*max_epochs=4"),
        ({"rounds": 2, "every_n_epochs": 3}, {"max_epochs": 4}, "need 5 epochs"),
        ({"rounds": 2}, {"max_steps": 8}, "need 3 epochs"),
        ({"rounds": 2}, {"max_epochs": 4, "check_val_every_n_epoch": 2}, "check_val_every_n_epoch=2"),
        ({"rounds": 2, "every_n_steps": 6}, {"max_epochs": 3}, "steps"),
        ({"rounds": 2, "every_n_steps": 6, "method": "magnitude"}, {"max_epochs": 3}, "13 optimizer"),
        ({}, {"max_epochs": 3, "limit_val_batches": 0}, "reference="),
        ({"include": ["nothing_like_this"]}, {"max_epochs": 3}, "nothing_like_this"),
    ],
)
def test_what_cannot_work_is_refused_before_a_weight_changes(
    make_module, make_loader, make_trainer, same_weights, callback, trainer_arguments, message
) -> None:
    module = make_module()
    before = copy.deepcopy(module)
    with pytest.raises(MisconfigurationException, match=message):
        make_trainer(callbacks=[RelevancePruning(**callback)], **trainer_arguments).fit(
            module, make_loader(), make_loader(seed=2)
        )
    assert same_weights(before, module)


@pytest.mark.parametrize(
    ("callback", "trainer_arguments", "zeros"),
    [
        ({"every_n_epochs": 2, "start_epoch": 2}, {"max_epochs": 5, "check_val_every_n_epoch": 2}, [0, 0, 1, 1, 2]),
        ({"every_n_epochs": 2, "start_epoch": 3}, {"max_epochs": 6, "check_val_every_n_epoch": 2}, [0, 0, 0, 1, 1, 2]),
        ({}, {"max_epochs": 3, "check_val_every_n_epoch": None, "val_check_interval": 3}, [0, 1, 2]),
    ],
)
def test_rounds_use_the_last_validation_before_them(
    make_module, make_loader, make_trainer, count_zeros, callback, trainer_arguments, zeros
) -> None:
    record = Record(count_zeros)
    pruning = RelevancePruning(sparsity=0.5, rounds=2, schedule="linear", scope="global", **callback)
    trainer = make_trainer(callbacks=[record, pruning], **trainer_arguments)
    trainer.fit(make_module(), make_loader(), make_loader(seed=2))
    assert record.zeros == [ENTRIES // 4 * count for count in zeros]


def test_unreachable_structures_and_damaged_relevance_change_no_weight(
    make_module, make_loader, make_trainer, same_weights
) -> None:
    module = make_module()
    # 8 and 24 and 16 inputs: 5 does not divide them, which is known only when the module is.
    with pytest.raises(MisconfigurationException, match="2:5"):
        make_trainer(callbacks=[RelevancePruning(sparsity=0.6, scope="2:5")], max_epochs=2).fit(
            module, make_loader(), make_loader(seed=2)
        )
    assert module.zeros_after_step == [0] * 4

    module = make_module()
    loader = make_loader(seed=2)
    loader.dataset.tensors[0][40] = float("nan")
    with pytest.raises((FloatingPointError, RuntimeError, ValueError, MisconfigurationException), match="finite"):
        make_trainer(callbacks=[RelevancePruning()], max_epochs=2).fit(module, make_loader(), loader)
    assert module.zeros_after_step == [0] * 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sparsity": 1.0}, r"\[0, 1\)"),
        ({"sparsity": -0.1}, r"\[0, 1\)"),
        ({"sparsity": "half"}, r"\[0, 1\)"),
        ({"sparsity": {}}, "pattern"),
        ({"rounds": 0}, "rounds"),
        ({"rounds": 1.5}, "rounds"),
        ({"schedule": "cubical"}, "schedule"),
        ({"schedule": [0.5], "rounds": 2}, "2"),
        ({"schedule": [0.5, 0.2], "rounds": 2}, "0.2"),
        ({"schedule": 3}, "schedule"),
        ({"every_n_epochs": 1, "every_n_steps": 10}, "exclude each other"),
        ({"every_n_epochs": 0}, "every_n_epochs"),
        ({"every_n_steps": -5}, "every_n_steps"),
        ({"start_epoch": 0}, "reference="),
        ({"start_epoch": -1}, "start_epoch"),
        ({"start_step": 5}, "every_n_steps"),
        ({"method": "sparsegpt"}, "method"),
        ({"composite": "lxt"}, "composite"),
        ({"scope": "rows"}, "scope"),
        ({"scope": "5:4"}, "scope"),
        ({"scope": "2:4", "sparsity": 0.7}, "sparsity=0.5"),
        ({"scope": "2:4", "sparsity": 0.5, "rounds": 2}, "rounds=1"),
        ({"ranking": "descending"}, "ranking"),
        ({"normalize": "median"}, "normalize"),
        ({"guard_mode": "least"}, "guard_mode"),
    ],
)
def test_wrong_arguments_are_refused_at_once(arguments, message) -> None:
    with pytest.raises(MisconfigurationException, match=message):
        RelevancePruning(**arguments)


def test_summary_is_one_table_per_round(make_module, make_loader, make_trainer, monkeypatch) -> None:
    from lrp_prune.callbacks import relevance_pruning

    shown: list[str] = []
    monkeypatch.setattr(relevance_pruning, "show", lambda trainer, text: shown.append(text))
    pruning = RelevancePruning(sparsity={"net.0": 0.5, "*": 0.25}, rounds=2, schedule="linear", method="random")
    make_trainer(callbacks=[pruning], max_epochs=3).fit(make_module(), make_loader(), make_loader())
    assert [text.splitlines()[0] for text in shown] == [
        "Pruning round 1 of 2 by random",
        "Pruning round 2 of 2 by random",
    ]
    assert f"{pruning.masks.num_pruned:,} of {ENTRIES:,} weights pruned" in shown[1]
    row = next(line for line in shown[1].splitlines() if line.strip().startswith("0 "))
    assert "layers of net" in shown[1]
    assert row.split() == ["0", "1", "192", "96", "48", "50.00%", "50.00%", "50.00%"]


def test_figures_reach_the_logger(make_module, make_loader, make_trainer, tmp_path) -> None:
    from lightning.pytorch.loggers import CSVLogger

    logger = CSVLogger(tmp_path)
    pruning = RelevancePruning(sparsity=0.5, scope="layer", guard="val_loss")
    make_trainer(callbacks=[pruning], max_epochs=2, logger=logger).fit(make_module(), make_loader(), make_loader())
    columns = (Path(logger.log_dir) / "metrics.csv").read_text().splitlines()[0].split(",")
    expected = {"sparsity", "round", "target", "newly_pruned", "samples", "sparsity/net.0", "sparsity/net.4"}
    assert {f"pruning/{name}" for name in expected} <= set(columns)
    assert "pruning/val_loss" not in columns


def test_tiny_llama_by_heads(make_trainer) -> None:
    """A Hugging Face model held by a module without a forward of its own; units of grouped-query attention."""
    transformers = pytest.importorskip("transformers")
    from lightning.pytorch import LightningModule
    from torch.utils.data import DataLoader

    config = transformers.LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
    )

    class LanguageModel(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = transformers.LlamaForCausalLM(config)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self.model(**batch).loss

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val_loss", self.model(**batch).loss)

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), lr=1e-2)

    tokens = torch.randint(50, (16, 12))
    loader = DataLoader([{"input_ids": row, "labels": row} for row in tokens], 4)
    module = LanguageModel()
    pruning = RelevancePruning(sparsity=0.5, granularity="head", rounds=2, schedule="linear")
    make_trainer(callbacks=[pruning], max_epochs=3).fit(module, loader, loader)
    assert pruning.masks.granularity == "head"
    heads = sum(
        int((layer.self_attn.o_proj.weight.view(32, 4, 8).abs().sum((0, 2)) == 0).sum())
        for layer in module.model.model.layers
    )
    assert heads == 4


def test_module_without_anything_to_run(make_loader, make_trainer) -> None:
    from lightning.pytorch import LightningModule

    class Opaque(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 4)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return nn.functional.cross_entropy(self.second(self.first(batch[0])), batch[1])

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            pass

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    trainer = make_trainer(callbacks=[RelevancePruning()], max_epochs=2)
    with pytest.raises(MisconfigurationException, match="relevance_target"):
        trainer.fit(Opaque(), make_loader(), make_loader())
    Opaque.relevance_target = lambda self, batch: self.second(self.first(batch[0])).amax(dim=-1).sum()
    pruning = RelevancePruning(scope="global")
    make_trainer(callbacks=[pruning], max_epochs=2).fit(Opaque(), make_loader(), make_loader())
    assert pruning.masks.num_pruned == (64 + 32) // 2
