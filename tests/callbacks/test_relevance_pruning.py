"""Pruning in rounds inside real trainings: schedules are met exactly, at the right times, and told about."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback

import lrp_prune.pruning.scorers as scorers
from lrp_prune.callbacks import RelevancePruning, Rounds, _collection
from lrp_prune.pruning import sparsity_schedule
from tests.support.small_models import llama

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


@pytest.mark.parametrize("steps", [3, 5])
def test_rounds_by_steps(make_module, make_loader, make_trainer, steps) -> None:
    module = make_module()
    pruning = RelevancePruning(
        sparsity=0.5, rounds=Rounds(2, every_n_steps=steps), schedule="linear", method="magnitude", scope="global"
    )
    make_trainer(callbacks=[pruning], max_epochs=4).fit(module, make_loader(), make_loader(seed=2))
    expected = [0] * steps + [ENTRIES // 4] * steps + [ENTRIES // 2] * (16 - 2 * steps)
    assert module.zeros_after_step == expected


@pytest.mark.slow
def test_rounds_by_steps_wait_for_the_next_validation(make_module, make_loader, make_trainer) -> None:
    module = make_module()
    pruning = RelevancePruning(sparsity=0.5, rounds=Rounds(2, every_n_steps=3), schedule="linear", scope="global")
    trainer = make_trainer(callbacks=[pruning], max_epochs=3, val_check_interval=2)
    trainer.fit(module, make_loader(), make_loader(seed=2))
    # Due at steps 3 and 6; the validations are after steps 2, 4, 6, ...
    assert module.zeros_after_step == [0] * 4 + [ENTRIES // 4] * 2 + [ENTRIES // 2] * 6


def test_reference_data_need_no_validation(make_module, make_loader, make_trainer, same_weights) -> None:
    module, twin = make_module(), make_module()
    pruning = RelevancePruning(sparsity=0.5, rounds=Rounds(start=0), reference=make_loader(seed=5), scope="global")
    make_trainer(callbacks=[pruning], max_epochs=1).fit(module, make_loader())
    assert module.zeros_after_step == [ENTRIES // 2] * 4
    scorer = scorers.scorer("lrp", twin)
    for batch in make_loader(seed=5):
        scorer.update(batch)
    from lrp_prune.pruning import select

    assert select(scorer.compute(), sparsity=0.5) == pruning.masks


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [{}, {"accumulate_grad_batches": 3, "val_check_interval": 2}])
@pytest.mark.parametrize("data", ["validation", "reference"])
def test_sparsity_zero_leaves_the_training_bit_for_bit(
    make_module, make_loader, make_trainer, same_weights, arguments, data
) -> None:
    reference = make_loader(seed=5) if data == "reference" else 0
    modules = []
    for callbacks in ([], [RelevancePruning(sparsity=0.0, rounds=2, schedule="linear", reference=reference)]):
        torch.manual_seed(3)
        module = make_module()
        make_trainer(callbacks=callbacks, max_epochs=3, **arguments).fit(module, make_loader(), make_loader(seed=2))
        modules.append(module)
    assert same_weights(*modules)


@pytest.mark.slow
def test_a_several_times_validated_epoch_is_collected_once(make_module, make_loader, make_trainer, monkeypatch) -> None:
    calls = []
    real = _collection.scorer
    monkeypatch.setattr(_collection, "scorer", lambda *args, **kwargs: calls.append(args) or real(*args, **kwargs))
    pruning = RelevancePruning(sparsity=0.5)
    make_trainer(callbacks=[pruning], max_epochs=3, val_check_interval=0.25).fit(
        make_module(), make_loader(), make_loader(seed=2)
    )
    assert len(calls) == 3  # one that checks the patterns at the start, one that is tried on a batch, one that collects


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


@pytest.mark.slow
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


@pytest.mark.slow
@pytest.mark.parametrize(
    ("callback", "trainer_arguments", "zeros"),
    [
        ({"every_n_epochs": 2, "start": 2}, {"max_epochs": 5, "check_val_every_n_epoch": 2}, [0, 0, 1, 1, 2]),
        ({"every_n_epochs": 2, "start": 3}, {"max_epochs": 6, "check_val_every_n_epoch": 2}, [0, 0, 0, 1, 1, 2]),
        ({}, {"max_epochs": 3, "check_val_every_n_epoch": None, "val_check_interval": 3}, [0, 1, 2]),
    ],
)
def test_rounds_use_the_last_validation_before_them(
    make_module, make_loader, make_trainer, count_zeros, callback, trainer_arguments, zeros
) -> None:
    record = Record(count_zeros)
    pruning = RelevancePruning(sparsity=0.5, rounds=Rounds(2, **callback), schedule="linear", scope="global")
    trainer = make_trainer(callbacks=[record, pruning], **trainer_arguments)
    trainer.fit(make_module(), make_loader(), make_loader(seed=2))
    assert record.zeros == [ENTRIES // 4 * count for count in zeros]


def test_summary_is_one_table_per_round(make_module, make_loader, make_trainer, monkeypatch) -> None:
    from lrp_prune.callbacks import _round

    shown: list[str] = []
    monkeypatch.setattr(_round, "show", lambda trainer, text: shown.append(text))
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
    pruning = RelevancePruning(sparsity=0.5, scope="layer", monitor="val_loss")
    make_trainer(callbacks=[pruning], max_epochs=2, logger=logger).fit(make_module(), make_loader(), make_loader())
    columns = (Path(logger.log_dir) / "metrics.csv").read_text().splitlines()[0].split(",")
    expected = {"sparsity", "round", "target", "newly_pruned", "samples", "sparsity/net.0", "sparsity/net.4"}
    assert {f"pruning/{name}" for name in expected} <= set(columns)
    assert "pruning/val_loss" not in columns


@pytest.mark.slow
def test_tiny_llama_by_heads(make_trainer) -> None:
    """A Hugging Face model held by a module without a forward of its own; units of grouped-query attention."""
    pytest.importorskip("transformers")
    from lightning.pytorch import LightningModule
    from torch.utils.data import DataLoader

    class LanguageModel(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = llama(
                vocab_size=50,
                hidden_size=32,
                intermediate_size=48,
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=32,
            )

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
