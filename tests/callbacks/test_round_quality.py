"""A metric by round, and rounds that are taken back: weights, masks and averages as they were, on two processes and resumed."""

import copy
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint, WeightAveraging
from lightning.pytorch.loggers import CSVLogger

from lrp_prune.callbacks import Distillation, RelevancePruning, RoundQuality, Rounds
from tests.support.trainers import forked

ROUNDS = [0.3, 0.6, 0.9]


class Planned(Callback):
    """Logs what it is told to by epoch; notes the weights at the end of each, and seeds each batch."""

    def __init__(self, values: list[float]) -> None:
        self.values = values
        self.weights: list[dict[str, torch.Tensor]] = []
        self.steps = 0

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        torch.manual_seed(trainer.global_step)

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        self.steps += 1

    def on_validation_epoch_end(self, trainer: Any, module: Any) -> None:
        if not trainer.sanity_checking:
            module.log("quality", self.values[trainer.current_epoch] + 0.1 * trainer.global_rank)

    def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
        self.weights.append(copy.deepcopy(module.state_dict()))


def pruning(**options: Any) -> RelevancePruning:
    return RelevancePruning(0.9, Rounds(3), schedule=ROUNDS, method="magnitude", **options)


@pytest.mark.slow
def test_a_rounds_value_is_the_last_one_before_the_next(make_module, make_loader, make_trainer, tmp_path: Path) -> None:
    values = [1.0, 3.0, 2.0, 5.0, 4.0, 7.0, 6.0]
    masks = RelevancePruning(0.9, Rounds(3, every_n_epochs=2), schedule=ROUNDS, method="magnitude")
    quality, logger = RoundQuality("quality"), CSVLogger(tmp_path, "logs")
    trainer = make_trainer(callbacks=[masks, Planned(values), quality], max_epochs=7, logger=logger)
    trainer.fit(make_module(), make_loader(), make_loader(seed=2))
    found = [(point.round, point.value, point.step, point.undone) for point in quality.points]
    assert found == [(0, 1.0, 4, False), (1, 2.0, 12, False), (2, 4.0, 20, False), (3, 6.0, 28, False)]
    assert [point.sparsity for point in quality.points] == pytest.approx([0.0, *ROUNDS], abs=0.01)
    rows = [row.split(",") for row in Path(logger.log_dir, "metrics.csv").read_text().splitlines()]
    columns = {name: rows[0].index(name) for name in ("rounds/quality", "rounds/sparsity", "rounds/round", "step")}
    logged = [
        {name: float(row[at]) for name, at in columns.items()} for row in rows[1:] if row[columns["rounds/round"]]
    ]
    assert [entry["rounds/quality"] for entry in logged] == [1.0, 2.0, 4.0, 6.0]
    assert [entry["step"] for entry in logged] == [4, 12, 20, 28]
    assert "dense" in quality.table() and "+5" in quality.table().splitlines()[-1]
    axes = quality.plot(tmp_path / "rounds.png").axes[0]
    assert list(axes.lines[0].get_ydata()) == [1.0, 2.0, 4.0, 6.0] and (tmp_path / "rounds.png").stat().st_size > 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("guard", "values", "bad"),
    [
        ({"limit": 2.5}, [1.0, 2.0, 3.0, 4.0], 2),
        ({"margin": 0.5}, [1.0, 2.0, 1.2, 1.0], 1),
        ({"limit": 0.5, "mode": "max"}, [0.9, 0.8, 0.7, 0.3], 3),
        ({"margin": 0.5}, [1.0, 1.2, float("nan"), 1.0], 2),
    ],
)
def test_a_round_beyond_the_limit_is_taken_back(
    make_module, make_loader, make_trainer, guard: dict[str, Any], values: list[float], bad: int
) -> None:
    module, masks, planned, quality = make_module(), pruning(), Planned(values), RoundQuality("quality", **guard)
    trainer = make_trainer(callbacks=[masks, planned, quality], max_epochs=4)
    with pytest.warns(UserWarning, match=rf"round {bad} ended.*beyond.*Checkpoints that were written since"):
        trainer.fit(module, make_loader(), make_loader(seed=2))
    for name, value in module.state_dict().items():
        assert torch.equal(value, planned.weights[bad - 1][name]), name
    assert masks.round == bad - 1 and planned.steps == 4 * (bad + 1)
    assert (masks.masks.sparsity if masks.masks else 0.0) == pytest.approx([0.0, *ROUNDS][bad - 1], abs=0.01)
    assert [point.undone for point in quality.points] == [False] * bad + [True]
    assert "undone" in quality.table().splitlines()[-1] and len(quality.plot().axes[0].lines) == 3


@pytest.mark.slow
def test_zeros_are_kept_where_the_training_has_to_go_on(make_module, make_loader, make_trainer) -> None:
    module, masks, quality = make_module(), pruning(), RoundQuality("quality", limit=2.5)
    planned = Planned([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    trainer = make_trainer(callbacks=[masks, planned, quality], max_epochs=6, min_epochs=6)
    with pytest.warns(UserWarning, match="round 2 ended"):
        trainer.fit(module, make_loader(), make_loader(seed=2))
    assert planned.steps == 24 and masks.round == 1 and len(quality.points) == 3
    for name, mask in masks.masks.items():
        weights = module.get_parameter(name)
        assert not weights[~mask].any() and weights[mask].all()
        assert not torch.equal(weights, planned.weights[1][name])


def test_masks_that_a_guard_refuses_at_the_end_are_not_said_to_be_applied(
    make_module, make_loader, make_trainer
) -> None:
    class Stop(Callback):
        def on_validation_end(self, trainer: Any, module: Any) -> None:
            trainer.should_stop = not trainer.sanity_checking

    module, masks = make_module(), RelevancePruning(0.9, 2, summary=False)
    trainer = make_trainer(callbacks=[masks, RoundQuality("val_loss", limit=100.0), Stop()], max_epochs=4)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(module, make_loader(), make_loader(seed=2))
    messages = [str(entry.message) for entry in caught if "the training ended after" in str(entry.message)]
    assert len(messages) == 1 and "after 0 of 2 pruning rounds: round 1 had collected and is not applied" in messages[0]
    assert masks.masks is None and not any((entry == 0).any() for entry in module.parameters() if entry.dim() == 2)


@pytest.mark.slow
def test_averages_of_weights_go_back_as_well(make_module, make_loader, make_trainer) -> None:
    module, averages, masks = make_module(), WeightAveraging(), pruning()
    average: list[Any] = []

    class Noting(Callback):
        def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
            average.append(copy.deepcopy(averages._average_model.module.state_dict()))

        def on_fit_end(self, trainer: Any, module: Any) -> None:
            average.append(copy.deepcopy(averages._average_model.module.state_dict()))

    callbacks = [averages, masks, Planned([1.0, 2.0, 3.0]), RoundQuality("quality", limit=1.5), Noting()]
    with pytest.warns(UserWarning, match="round 1 ended"):
        make_trainer(callbacks=callbacks, max_epochs=4).fit(module, make_loader(), make_loader(seed=2))
    assert all(torch.equal(average[-1][name], value) for name, value in average[0].items())


@pytest.mark.slow
def test_a_resumed_training_goes_back_to_the_same(make_module, make_loader, make_trainer, tmp_path: Path) -> None:
    def run(path: Path | None = None) -> tuple[Any, RoundQuality]:
        checkpoint = ModelCheckpoint(dirpath=tmp_path / "c", save_top_k=-1, filename="{epoch}")
        quality, module = RoundQuality("quality", limit=2.5), make_module()
        callbacks = [pruning(), Distillation(), Planned([1.0, 2.0, 3.0, 4.0]), quality, checkpoint]
        trainer = make_trainer(callbacks=callbacks, max_epochs=4, enable_checkpointing=True)
        trainer.fit(module, make_loader(), make_loader(seed=2), ckpt_path=path)
        return module, quality

    whole, quality = run()
    for path in sorted((tmp_path / "c").glob("*.ckpt"))[:3]:
        resumed, again = run(path)
        assert again.points == quality.points, path
        for one, other in zip(whole.state_dict().values(), resumed.state_dict().values(), strict=True):
            assert torch.equal(one, other), path


@pytest.mark.slow
@pytest.mark.parametrize("guard", [{}, {"limit": 2.5}], ids=["curve", "guard"])
def test_a_round_whose_validation_a_resume_leaves_out_is_not_judged_and_the_next_is(
    make_module, make_loader, make_trainer, tmp_path: Path, guard: dict[str, float]
) -> None:
    def fit(**options: Any) -> tuple[Any, RelevancePruning, RoundQuality]:
        written = ModelCheckpoint(dirpath=tmp_path, every_n_train_steps=4, save_top_k=-1, filename="{step}")
        module, masks, quality = make_module(), pruning(), RoundQuality("quality", **guard)
        callbacks = [masks, Planned([1.0, 2.0, 3.0, 4.0]), quality, *([] if options else [written])]
        trainer = make_trainer(callbacks=callbacks, max_epochs=4, enable_checkpointing=not options)
        trainer.fit(module, make_loader(), make_loader(seed=2), **options)
        return module, masks, quality

    fit()
    with pytest.warns(UserWarning) as told:
        module, masks, quality = fit(ckpt_path=tmp_path / "step=8.ckpt")
    said = [str(entry.message) for entry in told]
    assert any(
        "before the validation of epoch 1, which Lightning takes for done: RoundQuality" in each for each in said
    )
    assert any("'quality' was not logged in round 1, which has no point" in each for each in said)
    points = [(point.round, point.value, point.undone) for point in quality.points]
    if guard:
        assert points == [(0, 1.0, False), (2, 3.0, True)] and masks.masks is None
        good = torch.load(tmp_path / "step=4.ckpt", weights_only=True)["state_dict"]
        assert all(torch.equal(good[name], value) for name, value in module.state_dict().items() if "num_" not in name)
    else:
        assert points == [(0, 1.0, False), (2, 3.0, False), (3, 4.0, False)]


@pytest.mark.slow
def test_a_margin_needs_the_dense_model(make_module, make_loader, make_trainer, tmp_path: Path) -> None:
    """Where the validation that is left out is the only one before the first round: else nothing would guard the others."""
    written = ModelCheckpoint(dirpath=tmp_path, every_n_train_steps=4, save_top_k=-1, filename="{step}")

    def fit(callbacks: list[Callback], **options: Any) -> None:
        trainer = make_trainer(callbacks=callbacks, max_epochs=4, enable_checkpointing=not options)
        trainer.fit(make_module(), make_loader(), make_loader(seed=2), **options)

    fit([pruning(), Planned([1.0] * 4), RoundQuality("quality", margin=0.1), written])
    again = [pruning(), Planned([1.0, 50.0, 60.0, 80.0]), RoundQuality("quality", margin=0.1)]
    with pytest.raises(MisconfigurationException, match="or resume from a checkpoint that was written in a validation"):
        fit(again, ckpt_path=tmp_path / "step=4.ckpt")


@pytest.mark.slow
@pytest.mark.processes
def test_two_processes_go_back_together(make_module, make_loader, make_trainer, tmp_path: Path) -> None:
    """Also where one of them, by its own figures, would have gone on: they are 2 and 2.1."""

    class Save(Callback):
        def on_fit_end(self, trainer: Any, module: Any) -> None:
            weights = {name: value.clone() for name, value in module.state_dict().items()}
            found = (weights, masks.round, quality.points)
            (tmp_path / f"{trainer.global_rank}").write_bytes(pickle.dumps(found))

    masks, quality = pruning(), RoundQuality("quality", limit=2.05)
    trainer = make_trainer(
        callbacks=[masks, Planned([1.0, 2.0, 3.0, 4.0]), quality, Save()], max_epochs=4, devices=2, strategy=forked()
    )
    module = make_module()
    module.net[1] = torch.nn.Identity()  # whose statistics are each process's own
    trainer.fit(module, make_loader(), make_loader(seed=2))
    first, second = (pickle.loads((tmp_path / str(rank)).read_bytes()) for rank in (0, 1))
    assert first[1:] == second[1:] and first[1] == 1 and [point.undone for point in first[2]] == [False, False, True]
    assert all(torch.equal(value, second[0][name]) for name, value in first[0].items())


def test_a_dense_model_beyond_the_limit_is_not_pruned(make_module, make_loader, make_trainer) -> None:
    module, masks, planned = make_module(), pruning(), Planned([3.0, 2.0, 1.0, 1.0])
    with pytest.warns(UserWarning, match="the dense model is there with quality=3, beyond 2: nothing more is pruned"):
        make_trainer(callbacks=[masks, planned, RoundQuality("quality", limit=2)], max_epochs=4).fit(
            module, make_loader(), make_loader(seed=2)
        )
    assert masks.round == 0 and masks.masks is None and planned.steps == 4


@pytest.mark.slow
def test_a_round_that_nobody_can_judge_is_not_pruned(make_module, make_loader, make_trainer) -> None:
    """Masks that wait when the training ends are applied without a guard, and not with one."""
    for guard, rounds in (({}, 1), ({"limit": 5.0}, 0)):
        masks = RelevancePruning(0.5, Rounds(1, every_n_steps=4, start=4))
        quality, module = RoundQuality("quality", **guard), make_module()
        trainer = make_trainer(callbacks=[masks, Planned([1.0] * 3), quality], max_epochs=1)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(type(masks._times), "check_fit", lambda *_: None)
            trainer.fit(module, make_loader(), make_loader(seed=2))
        assert masks.round == rounds


def test_a_value_from_before_a_round_does_not_judge_it(make_module, make_loader, make_trainer) -> None:
    """Of epochs without a validation Lightning has the metrics of the last one still."""
    masks = RelevancePruning(0.9, Rounds(2, start=2), method="magnitude", reference=make_loader())
    trainer = make_trainer(
        callbacks=[masks, Planned([1.0] * 5), RoundQuality("quality", limit=5.0)],
        max_epochs=5,
        check_val_every_n_epoch=2,
    )
    with pytest.raises(MisconfigurationException, match="'quality' was not logged between round 1 and the next"):
        trainer.fit(make_module(), make_loader(), make_loader(seed=2))
    assert masks.round == 1


def test_what_it_cannot_do_is_refused_by_name(make_module, make_loader, make_trainer) -> None:
    for options, message in (
        ({"mode": "low"}, "mode must be one of min, max"),
        ({"monitor": ""}, "monitor must be the name of a metric"),
        ({"limit": "5"}, "limit must be a number or None, got '5'"),
        ({"margin": -1.0}, "margin must be at least 0"),
        ({"limit": 1.0, "margin": 1.0}, "exclude each other"),
    ):
        with pytest.raises(MisconfigurationException, match=message):
            RoundQuality(**options)
    with pytest.raises(MisconfigurationException, match="none of the trainer's callbacks"):
        make_trainer(callbacks=[RoundQuality()], max_epochs=1).fit(make_module(), make_loader(), make_loader(seed=2))
    with pytest.raises(MisconfigurationException, match=r"'acc' was not logged.*there is .*val_loss"):
        make_trainer(callbacks=[RelevancePruning(), RoundQuality("acc", limit=1.0)], max_epochs=2).fit(
            make_module(), make_loader(), make_loader(seed=2)
        )
    with pytest.raises(MisconfigurationException, match="is 'val_loss' meant"):
        make_trainer(callbacks=[RelevancePruning(), RoundQuality("val_los")], max_epochs=2).fit(
            make_module(), make_loader(), make_loader(seed=2)
        )
