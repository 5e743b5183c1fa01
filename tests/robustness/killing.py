"""Kills real trainings by SIGKILL at random moments, resumes them, and compares them with the one that was left alone.

Processes are forked from this one, which has imported everything and run nothing: that takes a second instead of ten.
"""

import argparse
import os
import random
import select
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from lrp_prune.callbacks import Rounds
from tests.robustness.resumable_training import MODES, ROUNDS, train
from tests.support.processes import fork, free_port, wait

EVENTS = ("any", "window", "collecting", "pruning", "checkpoint")
LIMIT = 120.0  # seconds for one training


def by_steps(processes: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Rounds by steps, with validations inside epochs: arguments of the callback and of the trainer."""
    return {"rounds": Rounds(ROUNDS, every_n_steps=6 // processes)}, {"val_check_interval": max(4 // processes, 1)}


@dataclass
class Run:
    """What became of a training: the diary of its first process, and whether it came to its end."""

    directory: Path
    diary: list[tuple[str, float]] = field(default_factory=list)
    finished: bool = False

    @property
    def result(self) -> dict[str, Any]:
        return torch.load(self.directory / "result.pt", weights_only=True)

    @property
    def checkpoints(self) -> list[Path]:
        """The files that can be read, in the order of their writing."""
        found = [path for path in (self.directory / "checkpoints").glob("*.ckpt") if _readable(path)]
        return sorted(found, key=lambda path: _file_of(path).stat().st_mtime_ns)

    @property
    def log(self) -> str:
        return "\n".join(path.read_text() for path in sorted(self.directory.glob("log.*")))


@dataclass
class Kill:
    """One trial: where the training died, where it went on, and what is different at the end."""

    meant: str
    died: str
    resumed_from: str
    differences: list[str]
    control: list[str]

    @property
    def passed(self) -> bool:
        return not self.differences or bool(self.control)


def launch(
    directory: Path,
    processes: int = 1,
    kill: Callable[[list[tuple[str, float]]], float | None] = lambda diary: None,
    victim: int = 0,
    **arguments: Any,
) -> Run:
    """Run :func:`~resumable_training.train` in new processes, and wait for them.

    Args:
        directory: see there.
        processes: how many.
        kill: called after each line of the diary; the seconds after which to kill, or None to let it live.
        victim: the process that is killed first; the others follow, as a launcher would have it.
        **arguments: see there.
    """
    directory.mkdir(parents=True, exist_ok=True)
    run = Run(directory)
    reading, writing = os.pipe()
    port = free_port()

    def call(rank: int) -> Callable[[], None]:
        return lambda: train(directory, diary=writing if rank == 0 else None, **arguments)

    children = [fork(call(rank), directory / f"log.{rank}", rank, processes, port) for rank in range(processes)]
    os.close(writing)
    started, text, killed = time.monotonic(), b"", False
    while not killed and time.monotonic() - started < LIMIT:
        if not select.select([reading], [], [], 1.0)[0]:
            continue
        got = os.read(reading, 65536)
        if not got:
            break
        text += got
        *lines, text = text.split(b"\n")
        for line in lines:
            event, moment = line.decode().split()
            run.diary.append((event, float(moment)))
            delay = None if killed else kill(run.diary)
            if delay is not None:
                time.sleep(delay)
                os.kill(children[victim], signal.SIGKILL)
                killed = True
    deadline = max(started + LIMIT, time.monotonic()) if not killed else time.monotonic() + 0.1
    statuses = [wait(child, deadline) for child in children]
    rest = (text + _drain(reading)).split(b"\n")
    os.close(reading)
    run.diary += [(line.split()[0].decode(), float(line.split()[1])) for line in rest if line.count(b" ") == 1]
    run.finished = statuses == [0] * processes
    return run


class Trials:
    """Trainings that are killed and resumed, against those that are not.

    Args:
        directory: of everything that is written.
        mode: one of ``MODES``.
        processes: of each training.
        pruning: arguments of the callback.
        **arguments: of the training.
    """

    def __init__(
        self, directory: Path, mode: str, processes: int, pruning: dict[str, Any] | None = None, **arguments: Any
    ) -> None:
        self._directory, self.processes = directory, processes
        self.arguments = {"mode": mode, **arguments}
        self._pruning = pruning or {}
        self.whole = self._run("whole", pruning=self._pruning)
        self.control = self._run("control", pruning=None)
        for run in (self.whole, self.control):
            if not run.finished:
                raise RuntimeError(f"the uninterrupted training failed:\n{run.log}")
        self._controls: dict[str, list[str]] = {}

    def resume(self, checkpoint: Path | None, name: str, pruning: dict[str, Any] | None) -> list[str]:
        """What is different at the end after a resume from this checkpoint."""
        run = self._run(name, pruning=pruning, resume=checkpoint)
        expected = self.whole if pruning is not None else self.control
        if not run.finished:
            return [f"the resumed training failed: {run.log.strip().splitlines()[-1:]}"]
        return differences(expected.result, run.result)

    def resume_control(self, checkpoint: str) -> list[str]:
        """What is different without the callback, from the checkpoint of that name."""
        if checkpoint not in self._controls:
            path = self.control.directory / "checkpoints" / checkpoint
            self._controls[checkpoint] = self.resume(path, "resumed-control", None)
        return self._controls[checkpoint]

    def kill(self, meant: str, seed: int) -> Kill:
        """Kill a training once, at a random moment of that kind, and resume it."""
        dice = random.Random(seed)
        diary = self.whole.diary
        places = [place for place in range(len(diary) - 1) if meant in ("any", diary[place][0])]
        place = dice.choice(places)
        delay = dice.random() * (diary[place + 1][1] - diary[place][1])

        def when(seen: Sequence[Any]) -> float | None:
            return delay if len(seen) > place else None

        run = self._run("killed", pruning=self._pruning, kill=when, victim=dice.randrange(self.processes))
        if run.finished:
            return Kill(meant, "not in time", "-", differences(self.whole.result, run.result), [])
        found = run.checkpoints
        newest = found[-1] if found else None
        different = self.resume(newest, "resumed", self._pruning)
        control = self.resume_control(newest.name) if newest is not None else []
        died = run.diary[-1][0] if run.diary else "start"
        return Kill(meant, died, newest.name if newest is not None else "-", different, control)

    def _run(self, name: str, **arguments: Any) -> Run:
        directory = self._directory / name
        shutil.rmtree(directory, ignore_errors=True)
        return launch(directory, self.processes, **self.arguments, **arguments)


def differences(expected: Any, found: Any, name: str = "") -> list[str]:
    """Names of what is not bit for bit equal."""
    if isinstance(expected, dict) and isinstance(found, dict) and list(expected) == list(found):
        return [line for key in expected for line in differences(expected[key], found[key], f"{name}/{key}")]
    if isinstance(expected, list) and isinstance(found, list) and len(expected) == len(found):
        pairs = enumerate(zip(expected, found, strict=True))
        return [line for index, (one, two) in pairs for line in differences(one, two, f"{name}/{index}")]
    same = torch.equal(expected, found) if isinstance(expected, torch.Tensor) else expected == found
    return [] if same else [name or "everything"]


def _drain(reading: int) -> bytes:
    text = b""
    while got := os.read(reading, 65536):
        text += got
    return text


def _file_of(checkpoint: Path) -> Path:
    return checkpoint / "meta.pt" if checkpoint.is_dir() else checkpoint


def _readable(checkpoint: Path) -> bool:
    try:
        torch.load(_file_of(checkpoint), weights_only=True, mmap=True)
    except Exception:
        return False
    return not checkpoint.is_dir() or (checkpoint / ".metadata").exists()


def main(arguments: Sequence[str] | None = None) -> int:
    """Kill, resume, print a table; the number of trials that failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--mode", choices=MODES, default="one")
    parser.add_argument("--processes", type=int, default=None, help="2 by default where the mode needs several")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--by-steps", action="store_true", help="rounds by steps, with validations inside epochs")
    given = parser.parse_args(arguments)
    processes = given.processes or (1 if given.mode == "one" else 2)
    pruning, options = by_steps(processes) if given.by_steps else ({}, {})
    failed = 0
    with tempfile.TemporaryDirectory() as directory:
        trials = Trials(Path(directory), given.mode, processes, pruning, **options)
        length = trials.whole.diary[-1][1] - trials.whole.diary[0][1]
        print(f"{given.mode}, {processes} processes, {length:.1f} s each; events: {len(trials.whole.diary)}")
        print(f"{'':>3} {'meant':<11} {'died in':<11} {'resumed from':<26} result")
        for index in range(given.kills):
            kill = trials.kill(EVENTS[index % len(EVENTS)], given.seed + index)
            outcome = "equal" if not kill.differences else f"differs: {', '.join(kill.differences)[:200]}"
            if kill.control:
                outcome += f" (the control differs: {', '.join(kill.control)[:200]})"
            failed += not kill.passed
            print(f"{index + 1:>3} {kill.meant:<11} {kill.died:<11} {kill.resumed_from:<26} {outcome}", flush=True)
    print(f"{given.kills - failed} of {given.kills} equal")
    return failed
