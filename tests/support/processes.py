"""Processes of a distributed run, forked from this one: no import is done twice, and one that hangs is killed.

A process that has started CUDA cannot be forked. So this one never sees a GPU (:data:`GPUS` counts those of the machine), and its
children do if they are asked to.
"""

import os
import pickle
import signal
import socket
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

_VISIBLE = "CUDA_VISIBLE_DEVICES"


def _hide_gpus() -> tuple[int, str | None]:
    """How many GPUs this process would see (the driver tells, nothing is started), and by which setting; none from now on."""
    number, setting = torch.cuda.device_count(), os.environ.get(_VISIBLE)
    os.environ[_VISIBLE] = ""
    return number, setting


GPUS, _SETTING = _hide_gpus()
"""How many GPUs the machine has for children that are asked to see them."""


class HangError(AssertionError):
    """A process did not come to its end in time."""


def run(
    function: Callable[[], Any], processes: int, directory: Path, limit: float = 300.0, gpus: bool = False
) -> list[Any]:
    """Call a function in new processes, as ``torchrun`` would start them, and return what each gave or raised.

    Args:
        function: called without arguments; may use ``torch.distributed`` by the environment's variables.
        processes: how many.
        directory: of the results and logs.
        limit: seconds.
        gpus: whether they see the machine's GPUs.

    Raises:
        HangError: a process was still running after that time.
    """
    directory.mkdir(parents=True, exist_ok=True)
    port = free_port()

    def call(rank: int) -> Callable[[], None]:
        def called() -> None:
            if gpus:
                _show_gpus()
            try:
                outcome = function()
            except Exception as error:
                traceback.print_exc()
                outcome = error
            try:
                payload = pickle.dumps(outcome)
            except Exception:
                payload = pickle.dumps(RuntimeError(f"{type(outcome).__name__}: {outcome}"))
            (directory / f"result.{rank}").write_bytes(payload)

        return called

    children = [fork(call(rank), directory / f"log.{rank}", rank, processes, port) for rank in range(processes)]
    deadline = time.monotonic() + limit
    statuses = [wait(child, deadline) for child in children]
    logs = "\n".join((directory / f"log.{rank}").read_text()[-2000:] for rank in range(processes))
    if any(status == -signal.SIGKILL for status in statuses):
        raise HangError(f"statuses {statuses} after {limit} s:\n{logs}")
    assert statuses == [0] * processes, logs
    return [pickle.loads((directory / f"result.{rank}").read_bytes()) for rank in range(processes)]


def _show_gpus() -> None:
    if _SETTING is None:
        os.environ.pop(_VISIBLE, None)
    else:
        os.environ[_VISIBLE] = _SETTING


def fork(function: Callable[[], None], log: Path, rank: int, processes: int, port: int) -> int:
    """Call a function in a new process with the environment of a rank; its output goes to a file."""
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, 1)
        os.dup2(file, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
        # pytest collects warnings in this process's memory.
        warnings.showwarning = lambda *told, **_: sys.stderr.write(warnings.formatwarning(*told[:4]))
        if processes > 1:
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
            launcher = {
                "GROUP_RANK": 0,
                "TORCHELASTIC_RUN_ID": "tests",
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
            }
            os.environ.update({key: str(value) for key, value in {**place, **launcher}.items()})
        function()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def wait(child: int, deadline: float) -> int:
    """The exit status of a process, which is killed if it is still there at that time of ``time.monotonic``."""
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return -signal.SIGKILL
        time.sleep(0.01)


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])
