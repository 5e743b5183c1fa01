"""A training that is killed at any moment and resumed is the uninterrupted one; in ranks more or fewer, it has the same masks.

``tests/benchmarks/kills.py`` does the same with as many kills as one likes.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lrp_prune.callbacks import Rounds
from lrp_prune.pruning import Masks
from tests.robustness.killing import EVENTS, Run, Trials, by_steps, differences, launch

pytestmark = pytest.mark.processes

PROCESSES = {"one": 1, "ddp": 2, "fsdp-sharded": 2, "fsdp-full": 2}


def of_epoch(epoch: int, run: Run) -> Path:
    """The checkpoint at the end of an epoch."""
    return next(path for path in run.checkpoints if path.name.startswith(f"epoch={epoch}") and "end" in path.name)


@pytest.fixture(scope="module", params=["one", "ddp"])
def trials(request: Any, tmp_path_factory: Any) -> Trials:
    return Trials(tmp_path_factory.mktemp("kills"), request.param, PROCESSES[request.param])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("trials", "moment"),
    [
        *(("one", moment) for moment in EVENTS[1:]),
        ("ddp", "collecting"),
        ("ddp", "checkpoint"),
        ("fsdp-sharded", "checkpoint"),
        ("fsdp-full", "window"),
    ],
    indirect=["trials"],
)
def test_a_killed_training_resumes_equal(trials: Trials, moment: str) -> None:
    kill = trials.kill(moment, seed=len(moment))
    assert not kill.control, "the training without the callback does not resume equal by itself"
    assert not kill.differences, kill


def test_the_comparison_sees_a_lost_round(trials: Trials, tmp_path: Path) -> None:
    """Were the callback's state not in the checkpoint, the harness would say so."""
    damaged = tmp_path / "damaged.ckpt"
    checkpoint = of_epoch(2, trials.whole)
    saved = torch.load(checkpoint, weights_only=True)
    state = next(value for name, value in saved["callbacks"].items() if name.startswith("RelevancePruning"))
    state |= {"masks": None, "round": 0, "pending": None}
    torch.save(saved, damaged)
    assert trials.resume(damaged, "damaged", {})


SKIPPED = {
    "by steps": (*by_steps(1), "epoch=0-step=6.ckpt"),
    "long before the round": (
        {"rounds": Rounds(start=3)},
        {"check_val_every_n_epoch": 2},
        "epoch=1-step=12.ckpt",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", SKIPPED)
def test_a_validation_that_lightning_skips_in_a_resume_is_made_up_for(tmp_path: Path, case: str) -> None:
    """Of a checkpoint written between a batch and the validation after it."""
    pruning, trainer, name = SKIPPED[case]
    trials = Trials(tmp_path, "one", 1, pruning, **trainer)
    assert not trials.resume_control(name)
    assert not trials.resume(trials.whole.directory / "checkpoints" / name, "resumed", pruning)


@pytest.fixture(scope="module")
def of_two(tmp_path_factory: Any) -> Iterator[Run]:
    run = launch(tmp_path_factory.mktemp("two"), 2, mode="ddp", pruning={})
    assert run.finished, run.log
    yield run


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 3])
def test_a_checkpoint_of_two_ranks_resumes_on_fewer_and_more(of_two: Run, tmp_path: Path, processes: int) -> None:
    checkpoint = of_epoch(2, of_two)
    state = next(
        value
        for name, value in torch.load(checkpoint, weights_only=True)["callbacks"].items()
        if name.startswith("RelevancePruning")
    )
    mode = "ddp" if processes > 1 else "one"
    run = launch(tmp_path / "resumed", processes, mode=mode, pruning={}, resume=checkpoint)
    assert run.finished, run.log
    found = torch.load(run.directory / "found.pt", weights_only=True)
    expected = {"round": 2, "masks": Masks.from_state_dict(state["masks"]).checksum(), "zeros": True}
    assert found == expected
    assert run.result["round"] == 3


@pytest.mark.slow
def test_begun_without_the_callback_and_continued_with_it(trials: Trials, tmp_path: Path) -> None:
    checkpoint = of_epoch(1, trials.control)
    options = {**trials.arguments, "pruning": {}, "resume": checkpoint}
    late = launch(tmp_path / "late", trials.processes, max_epochs=6, **options)
    assert late.finished, late.log
    assert "was written without RelevancePruning" in late.log
    assert "delayed by 2 epochs" in late.log
    assert late.result["round"] == 3
    # Its own checkpoints remember the delay.
    own = of_epoch(3, late)
    again = launch(tmp_path / "again", trials.processes, max_epochs=6, **{**options, "resume": own})
    assert again.finished, again.log
    assert "was written without" not in again.log
    assert not differences(late.result, again.result)
    short = launch(tmp_path / "short", trials.processes, **options)
    assert not short.finished
    assert "max_epochs=6" in short.log


@pytest.mark.slow
def test_continued_without_the_callback(trials: Trials, tmp_path: Path) -> None:
    checkpoint = of_epoch(2, trials.whole)
    options = {**trials.arguments, "pruning": None, "resume": checkpoint}
    run = launch(tmp_path / "without", trials.processes, **options)
    assert run.finished, run.log
    assert "RelevancePruning" in run.log  # Lightning names the callback that is missing
