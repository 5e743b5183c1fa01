"""Work that may hang, take all memory or crash, each piece in a process of its own, forked from this one."""

import json
import os
import resource
import signal
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

Task = TypeVar("Task")
_PAUSE, _PATIENCE = 0.05, 10
_GIGABYTE = 2**30


class Failure(str):
    """What became of a piece of work that has no result."""


def each(
    tasks: Sequence[Task],
    work: Callable[[Task], Any],
    processes: int = 1,
    seconds: int = 180,
    gigabytes: float = 4.0,
) -> Iterator[tuple[Task, Any]]:
    """Do each task in a process of its own, and give what comes of it as soon as it is there.

    Nothing is imported twice, since the processes are forked: this one should have imported what all need, and run nothing that
    starts threads.

    Args:
        tasks: what is to be done, in this order.
        work: what does it; its result must be of plain values, as it comes as JSON.
        processes: how many at a time.
        seconds: of the processor that a process may take, and a few times as many in all, whatever else the machine does.
        gigabytes: of memory that a process may take beyond what this one has.

    Yields:
        A task, and its result or a :class:`Failure`.
    """
    waiting, running = list(tasks)[::-1], dict[int, tuple[Task, Path, float]]()
    with TemporaryDirectory() as folder:
        try:
            while waiting or running:
                while waiting and len(running) < processes:
                    task, path = waiting.pop(), Path(folder) / f"{len(waiting)}.json"
                    running[_started(work, task, path, seconds, gigabytes)] = task, path, time.monotonic()
                for pid, (task, path, began) in list(running.items()):
                    done, status = os.waitpid(pid, os.WNOHANG)
                    late = time.monotonic() - began > _PATIENCE * seconds
                    if not done and not late:
                        continue
                    if not done:
                        os.kill(pid, signal.SIGKILL)
                        os.waitpid(pid, 0)
                    del running[pid]
                    yield task, _result(path, status, seconds, late and not done)
                time.sleep(_PAUSE)
        finally:
            for pid in running:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)


def _started(work: Callable[[Task], Any], task: Task, path: Path, seconds: int, gigabytes: float) -> int:
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + int(gigabytes * _GIGABYTE)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
        try:
            text = json.dumps({"result": work(task)})
        except BaseException:
            text = json.dumps({"failure": traceback.format_exc().strip().splitlines()[-1]})
        path.write_text(text)
        status = 0
    finally:
        os._exit(status)


def _result(path: Path, status: int, seconds: int, hung: bool) -> Any:
    if hung:
        return Failure(f"was not done after {_PATIENCE * seconds} s")
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGXCPU:
        return Failure(f"took longer than {seconds} s of the processor")
    if not path.exists():
        name = (
            signal.Signals(os.WTERMSIG(status)).name
            if os.WIFSIGNALED(status)
            else f"code {os.waitstatus_to_exitcode(status)}"
        )
        return Failure(f"its process ended by {name}")
    found = json.loads(path.read_text())
    return Failure(found["failure"]) if "failure" in found else found["result"]
