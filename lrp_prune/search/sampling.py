"""Optuna's part: what is tried next, what is given up, and where trials are kept.

All follows from the seed and the finished trials, so that a search that is resumed goes on as it would have.
"""

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.pruners import BasePruner
    from optuna.samplers import BaseSampler
    from optuna.storages import BaseStorage
    from optuna.study import Study
    from optuna.trial import FrozenTrial

Sampler = str | Callable[[int], "BaseSampler"]
SAMPLERS: tuple[str, ...] = ("tpe", "random")
PRUNERS: tuple[str, ...] = ("median", "none")
_ATTEMPTS = 20
_STARTUP = 5
_STUDY = "composite"


def imported() -> Any:
    """Optuna.

    Raises:
        ImportError: if it is not installed, and says how.
    """
    try:
        import optuna
    except ImportError as error:
        raise ImportError("searching needs Optuna: pip install 'lrp-prune[search]'") from error
    return optuna


@contextmanager
def quiet() -> Iterator[None]:
    """Without Optuna's own messages about each trial."""
    optuna = imported()
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(before)


def check_sampling(sampler: Any, pruner: Any) -> None:
    """Refuse a sampler or a pruner that there is not.

    Raises:
        ValueError: likewise; and for a sampler that is an object, whose random state no file has.
    """
    optuna = imported()
    if isinstance(sampler, optuna.samplers.BaseSampler):
        raise ValueError(
            "sampler must be made from a seed, so that a resumed search goes on to the same trials: pass a function, such as "
            f"lambda seed: {type(sampler).__name__}(seed=seed)"
        )
    if sampler not in SAMPLERS and not callable(sampler):
        raise ValueError(
            f"sampler must be one of {SAMPLERS}, or a function from a seed to one of Optuna's, got {sampler!r}"
        )
    if pruner not in PRUNERS and not isinstance(pruner, optuna.pruners.BasePruner):
        raise ValueError(f"pruner must be one of {PRUNERS}, or one of Optuna's, got {pruner!r}")


def pruner_of(pruner: "str | BasePruner") -> "BasePruner":
    """The pruner of a name, or the one that is given."""
    optuna = imported()
    if not isinstance(pruner, str):
        return pruner
    made: BasePruner = optuna.pruners.NopPruner()
    if pruner == "median":
        made = optuna.pruners.MedianPruner(n_startup_trials=_STARTUP, n_warmup_steps=1)
    return made


def distributions(axes: Mapping[str, Sequence[str]]) -> "dict[str, BaseDistribution]":
    """Optuna's description of choices."""
    optuna = imported()
    return {axis: optuna.distributions.CategoricalDistribution(tuple(choices)) for axis, choices in axes.items()}


def copied(trials: "Sequence[FrozenTrial]", maximized: bool, **options: Any) -> "Study":
    """A study in memory with these trials."""
    study: Study = imported().create_study(direction="maximize" if maximized else "minimize", **options)
    study.add_trials(trials)
    return study


def suggested(
    trials: "Sequence[FrozenTrial]",
    axes: Mapping[str, Sequence[str]],
    starts: Sequence[Mapping[str, str]],
    sampler: Sampler,
    seed: int,
    maximized: bool,
    number: int,
) -> list[dict[str, str]]:
    """What is tried next, from the finished trials alone: not from a random state, which an interrupted search has lost.

    Args:
        trials: finished.
        axes: what there is to choose from.
        starts: what the first trials are.
        sampler: made anew for each trial, from the seed and the trial's number.
        seed: of the search.
        maximized: whether more is better.
        number: of trials that are run at once; they do not know of each other's values.
    """
    tried = {frozenset(trial.params.items()) for trial in trials}
    found: list[dict[str, str]] = []
    for position in range(len(trials), len(trials) + number):
        for attempt in range(_ATTEMPTS):
            if position < len(starts) and attempt == 0:
                params = dict(starts[position])
            else:
                own = int.from_bytes(hashlib.sha256(f"{seed}:{position}:{attempt}".encode()).digest()[:4], "big")
                study = copied(trials, maximized, sampler=_made(sampler if attempt < _ATTEMPTS // 2 else "random", own))
                for running in found:
                    study.enqueue_trial(running)
                    study.ask(distributions(axes))
                params = dict(study.ask(distributions(axes)).params)
            if frozenset(params.items()) not in tried:
                tried.add(frozenset(params.items()))
                found.append(params)
                break
    return found


def _made(sampler: Sampler, seed: int) -> "BaseSampler":
    optuna = imported()
    if callable(sampler):
        return sampler(seed)
    made: BaseSampler = optuna.samplers.RandomSampler(seed=seed)
    if sampler == "tpe":
        made = optuna.samplers.TPESampler(seed=seed, multivariate=True, n_startup_trials=_STARTUP)
    return made


def opened(storage: "str | os.PathLike[str] | BaseStorage | None") -> "BaseStorage | None":
    """One of Optuna's storages, of a file if that is given, which is made if it is not there; None for memory.

    Raises:
        FileNotFoundError: there is no folder for the file.
        ValueError: something else is in the file.
    """
    if not isinstance(storage, str | os.PathLike):
        return storage
    folder = os.path.dirname(os.path.abspath(storage))
    if not os.path.isdir(folder):
        raise FileNotFoundError(
            f"storage must be the path of a file, got {os.fspath(storage)!r}, and there is no folder {folder}: make it; of a "
            "database pass the storage itself, such as optuna.storages.RDBStorage('sqlite:///search.db')"
        )
    journal = imported().storages.journal
    try:
        made: BaseStorage = imported().storages.JournalStorage(journal.JournalFileBackend(os.fspath(storage)))
    except ValueError as error:
        raise ValueError(f"the file {os.fspath(storage)} is none of trials ({error}): give another storage") from None
    return made


def kept_in(storage: "BaseStorage | None", maximized: bool, setting: Mapping[str, str]) -> "Study":
    """The study of a storage, or a new one.

    Args:
        storage: one of Optuna's; None for memory.
        maximized: whether more is better.
        setting: what all trials have in common, by name; kept with them.

    Raises:
        ValueError: if the trials there are of another search, and says what differs.
    """
    wanted = {**setting, "direction": "maximize" if maximized else "minimize"}
    study: Study = imported().create_study(
        storage=storage, study_name=_STUDY, direction=wanted["direction"], load_if_exists=True
    )
    if not study.get_trials(
        deepcopy=False
    ):  # also where a search ended before the first of them, or while this was written
        for name, value in setting.items():
            study.set_user_attr(name, value)
    known = {**study.user_attrs, "direction": study.direction.name.lower()}
    differ = [name for name, value in wanted.items() if known.get(name) != value]
    if differ:
        raise ValueError(
            f"the trials in the storage are of a search with another {', another '.join(differ)}: give the same arguments "
            "to go on, or another storage"
        )
    return study
