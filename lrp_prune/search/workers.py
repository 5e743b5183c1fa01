"""Running trials: here, or several at once in processes of their own.

Processes and not threads: a trial prunes the model in place, rules act on what a thread runs, and random numbers are the
process's. Each has a copy of the model, started afresh (``spawn``): torch's threads and CUDA do not survive a fork. What is tried
at once is settled before it runs, and counted in its order after, so that timing decides nothing.
"""

import math
import multiprocessing
import pickle
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

import torch

from lrp_prune.engine.registry import ACTIVATION_MODULES, MODULE_RULES, REGISTERED
from lrp_prune.search.judging import Judge
from lrp_prune.search.sampling import copied, distributions, pruner_of, quiet

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

WHY, CURVE = "why", "curve"
"""What is kept with a trial: why it has no value, and the values by rate."""


class Running(Protocol):
    """Runs trials, and gives them finished, in their order."""

    def __call__(
        self, trials: "Sequence[FrozenTrial]", chosen: Sequence[dict[str, str]]
    ) -> "Sequence[FrozenTrial]": ...


def tried(judge: Judge, pruner: Any, trials: "Sequence[FrozenTrial]", chosen: dict[str, str]) -> "FrozenTrial":
    """One trial: given up if the pruner says so, and failed where relevance or its value is no number."""
    from optuna.trial import TrialState

    with quiet():
        study = copied(trials, judge.setting.maximized, pruner=pruner_of(pruner))
        study.enqueue_trial(chosen)
        trial = study.ask(distributions(judge.space.axes))
        curve: dict[float, float] = {}
        try:
            for curve in judge.curve(judge.space.composite(chosen), judge.space.order(chosen)):
                trial.report(judge.setting.so_far(curve), len(curve) - 1)
                if len(curve) < len(judge.setting.rates) and trial.should_prune():
                    trial.set_user_attr(WHY, f"given up after {max(curve):.0%}")
                    trial.set_user_attr(CURVE, list(curve.values()))
                    return study.tell(trial, state=TrialState.PRUNED)
        except FloatingPointError as error:
            trial.set_user_attr(WHY, str(error))
            return study.tell(trial, state=TrialState.FAIL)
        trial.set_user_attr(CURVE, list(curve.values()))
        value = judge.setting.value(curve)
        if math.isnan(value):
            trial.set_user_attr(WHY, f"{judge.setting.metric_name} is nan, of {curve}")
            return study.tell(trial, state=TrialState.FAIL)
        return study.tell(trial, value)


@contextmanager
def running(judge: Judge, pruner: Any, workers: int) -> Iterator[Running]:
    """Yields what runs trials, in this process or in others.

    Raises:
        ValueError: if something cannot be sent to another process, or a rule was registered in this one.
    """
    if workers == 1:
        yield lambda trials, chosen: [tried(judge, pruner, trials, each) for each in chosen]
        return
    registered = [*REGISTERED, *MODULE_RULES, *ACTIVATION_MODULES]
    if registered:
        named = getattr(registered[0], "__name__", registered[0])
        raise ValueError(
            f"workers are processes of their own, which do not know the rule that was registered for {named}: use workers=1"
        )
    threads = max(torch.get_num_threads() // workers, 1)
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, context, _begin, (_packed(judge, pruner), threads))
    try:
        yield lambda trials, chosen: list(pool.map(_run, [list(trials)] * len(chosen), chosen))
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _packed(judge: Judge, pruner: Any) -> bytes:
    """Copies as bytes: torch's own way would share the memory of the weights, which trials set to zero."""
    try:
        return pickle.dumps((judge, pruner))
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise ValueError(
            f"workers are processes, to which model, data, evaluate and metric are sent, and one of them cannot be: {error}. "
            "Define functions and classes at the top of a module, or use workers=1"
        ) from error


_judge: Judge
_pruner: Any


def _begin(packed: bytes, threads: int) -> None:
    global _judge, _pruner
    torch.set_num_threads(threads)
    _judge, _pruner = pickle.loads(packed)


def _run(trials: "Sequence[FrozenTrial]", chosen: dict[str, str]) -> "FrozenTrial":
    return tried(_judge, _pruner, trials, chosen)
