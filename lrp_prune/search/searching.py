"""The search for the composite that a model is best pruned by."""

import hashlib
import json
import logging
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lrp_prune.arguments import check_flag, check_integer
from lrp_prune.engine.composites import composite_of
from lrp_prune.metrics.pruning import RATES
from lrp_prune.names import named_parameters
from lrp_prune.pruning.comparing import rates_of, stepping
from lrp_prune.pruning.scope import Scope, scope_of
from lrp_prune.relevance import granularities_of
from lrp_prune.relevance.statistics import Statistic
from lrp_prune.search import sampling
from lrp_prune.search.found import CompositeSearch, Judged, Tried, tried_of
from lrp_prune.search.judging import METRICS, Evaluate, Judge, Metric, Setting
from lrp_prune.search.parts import parted
from lrp_prune.search.space import SearchSpace
from lrp_prune.search.workers import CURVE, WHY, running

if TYPE_CHECKING:
    from optuna.pruners import BasePruner
    from optuna.storages import BaseStorage
    from optuna.study import Study

_logger = logging.getLogger("lrp_prune")


def search_composite(
    model: nn.Module,
    batches: Iterable[Any] | Mapping[str, Iterable[Any]],
    evaluate: Evaluate,
    space: SearchSpace | None = None,
    *,
    trials: int = 60,
    granularity: str | Sequence[str] = "neuron",
    scope: str | Scope = "global",
    rates: Sequence[float] = RATES,
    metric: Metric = "area",
    higher_is_better: bool = True,
    statistic: str | Statistic | None = None,
    target: Any = None,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
    shares: Sequence[float] = (0.25, 0.35, 0.4),
    sampler: sampling.Sampler = "tpe",
    pruner: "str | BasePruner" = "median",
    storage: "str | os.PathLike[str] | BaseStorage | None" = None,
    workers: int = 1,
    seed: int = 0,
    progress: bool = True,
) -> CompositeSearch:
    r"""Search the composite by which a model is best pruned, as Pruning by eXplaining does (arXiv 2408.12568).

    Each trial is a rule for each group of layers, a softmax variant and a ranking: relevance is collected once on the reference
    part, and the model pruned to rate after rate and evaluated on the selection part. The winner, and the plain base composite,
    are then evaluated on the test part, which nothing was chosen by. The model comes out bit for bit as it went in, also after an
    error or an interrupt.

    What is tried next follows from the seed and the trials that are finished. So a search that was interrupted goes on, from its
    ``storage``, to the same trials as one that was not, and the number of trials can be raised afterwards.

    Args:
        model: any module.
        batches: as the model takes them, with labels: one set, which is parted by ``shares`` and ``seed``; or the parts by name,
            ``{"reference": ..., "selection": ..., "test": ...}``, which must have no sample in common. Gone through once, and
            kept in lists.
        evaluate: from the model and the batches of a part to a number, such as the accuracy.
        space: what there is to choose from; None for :class:`SearchSpace` by default.
        trials: how many in all, those in the storage among them.
        granularity: of what is pruned, see :func:`lrp_prune.attribute`.
        scope: what is compared, see :func:`lrp_prune.select`; its order is chosen by the search.
        rates: of pruning; 0 is always among them.
        metric: ``"area"`` (:func:`~lrp_prune.metrics.pruning_area`, the paper's A_PR), ``"top_rate"``
            (:func:`~lrp_prune.metrics.top_pruning_rate`, more is better), or a function of ``{rate: value}``.
        higher_is_better: False if ``evaluate`` gives a loss or a perplexity; of a function as ``metric`` as well.
        statistic: of relevance that is ranked by its absolute value; None for ``"geometric"`` of weights and ``"abs_sample"`` of
            units (the paper's). Where the order is signed it is ``"signed"``.
        target: what is explained, see :func:`lrp_prune.attribute`.
        include, exclude: patterns of parameter names, likewise.
        shares: of the three parts, where one set is given.
        sampler: ``"tpe"``, ``"random"``, or a function from a seed to a sampler of Optuna's.
        pruner: of trials that are behind at the first rates already: ``"median"``, ``"none"``, or one of Optuna's.
        storage: path of a file in which trials are kept, or a storage of Optuna's; None for memory. One search at a time.
        workers: trials that run at once, each in a process with a copy of the model; model, data and functions must be picklable.
            Trials of a round do not know of each other, so that their number changes what is tried; timing does not.
        seed: of the parting and of what is tried.
        progress: show a progress bar.

    Returns:
        The winner, how it does on the test part, and all trials.

    Raises:
        ImportError: without Optuna: ``pip install 'lrp-prune[search]'``.
        FileNotFoundError: there is no folder for the storage.
        ValueError: for an argument that is not possible, parts that are not apart, a storage with the trials of another search,
            a metric that is nan of the plain base, or if no trial has a result.

    Example:
        >>> import torch, lrp_prune
        >>> model = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 2))
        >>> inputs, labels = torch.randn(10, 16, 4), torch.randint(2, (10, 16))
        >>> def accuracy(model, batches):
        ...     return sum(float((model(x).argmax(1) == y).float().mean()) for x, y in batches) / len(batches)
        >>> data = list(zip(inputs, labels))
        >>> found = lrp_prune.search_composite(model, data, accuracy, trials=4, rates=(0.0, 0.3, 0.6), progress=False)
        >>> len(found.tried), found.composite.name, found.searched.selection >= found.plain.selection
        (4, 'searched', True)
    """
    sampling.check_sampling(sampler, pruner)
    check_integer("trials", trials, 1)
    check_integer("workers", workers, 1)
    check_integer("seed", seed, 0)
    setting = Setting(
        evaluate=evaluate,
        rates=tuple(sorted({0.0, *rates_of(rates, "rates")})),
        granularity=granularity,
        statistic=statistic or ("geometric" if granularities_of(granularity) == ("weight",) else "abs_sample"),
        scope=scope_of(scope),
        metric=_checked(metric),
        higher_is_better=check_flag("higher_is_better", higher_is_better),
        options={"target": target, "include": include, "exclude": exclude},
    )
    if len(setting.rates) < 2:
        raise ValueError(f"rates must have one above 0, got {tuple(rates)}")
    parts = parted(batches, seed, shares)
    settled = (space or SearchSpace()).settled(model, parts.reference)
    judge = Judge(model, parts, settled, setting)
    kept = sampling.opened(storage)
    plain = judge.judged(composite_of(settled.base), "absolute")
    if math.isnan(setting.value(plain)):
        raise ValueError(
            f"{setting.metric_name} of plain {composite_of(settled.base).name} is nan, of {plain} on the selection part: "
            "evaluate must give numbers there, so choose another precision, lower rates, or a metric that does without"
        )
    common = _common(judge, plain[0.0], sampler, pruner, workers, seed)
    with sampling.quiet():
        study = sampling.kept_in(kept, setting.maximized, common)
        _search(study, judge, sampler, pruner, workers, seed, trials, progress)
        tried = tried_of(study.get_trials(), setting.rates, WHY, CURVE)
        importance = _importance(study)
    return _result(judge, tried, plain, importance)


def _checked(metric: Metric) -> Metric:
    if metric not in METRICS and not callable(metric):
        raise ValueError(f"metric must be one of {METRICS}, or a function of {{rate: value}}, got {metric!r}")
    return metric


def _search(
    study: "Study",
    judge: Judge,
    sampler: Any,
    pruner: Any,
    workers: int,
    seed: int,
    trials: int,
    progress: bool,
) -> None:
    """Add trials to the study until there are as many as were asked for, or nothing else is left."""
    maximized, axes = judge.setting.maximized, judge.space.axes
    starts = list(judge.space.starts())
    done = study.get_trials()
    with running(judge, pruner, workers) as run, stepping(max(trials - len(done), 0), progress) as step:
        try:
            while len(done) < trials:
                # A round is told from what was known when it began, also where some of its trials are there already.
                begun = len(done) // workers * workers
                number = min(workers, trials - begun)
                chosen = sampling.suggested(done[:begun], axes, starts, sampler, seed, maximized, number)[
                    len(done) - begun :
                ]
                if not chosen:
                    break
                known = any(trial.state.name == "COMPLETE" for trial in done)
                step(f"best {study.best_value:.4f}" if known else "searching", len(chosen))
                for trial in run(done[:begun], chosen):
                    study.add_trial(trial)
                done = study.get_trials()
        except BaseException:
            _logger.warning(
                "the search stopped after %s; if they are kept in a storage, the same call goes on from there",
                _told(study, len(study.get_trials())),
            )
            raise


def _told(study: "Study", number: int) -> str:
    known = [trial for trial in study.get_trials() if trial.state.name == "COMPLETE"]
    if not known:
        return f"{number} trials"
    return f"{number} trials, best so far {study.best_value:.4f} ({json.dumps(study.best_params)})"


def _importance(study: "Study") -> dict[str, float]:
    """Of each axis, as Optuna measures it (PED-ANOVA, arXiv 2304.10255); zeros where all values are equal."""
    optuna = sampling.imported()
    known = [trial for trial in study.get_trials() if trial.state.name == "COMPLETE"]
    axes = {axis: 0.0 for trial in known for axis in trial.params}
    if len({trial.value for trial in known}) < 2 or not axes:
        return axes
    found = optuna.importance.get_param_importances(study, evaluator=optuna.importance.PedAnovaImportanceEvaluator())
    return {axis: float(found.get(axis, 0.0)) for axis in axes}


def _result(
    judge: Judge, tried: tuple[Tried, ...], plain: dict[float, float], importance: dict[str, float]
) -> CompositeSearch:
    setting, space = judge.setting, judge.space
    base = composite_of(space.base)
    known = [(trial.value, trial) for trial in tried if trial.value is not None]
    if not known:
        raise ValueError(f"no trial has a result: {tried[0].why if tried else 'there is nothing to choose from'}")
    _, best = (max if setting.maximized else min)(known, key=lambda pair: pair[0])
    composite, order = space.composite(best.chosen), space.order(best.chosen)

    def judged(selection: dict[float, float], test: dict[float, float]) -> Judged:
        return Judged(setting.value(selection), setting.value(test), selection, test)

    return CompositeSearch(
        composite=composite,
        scope=replace(setting.scope, order=order),
        statistic="signed" if order == "signed" else setting.statistic,
        granularity=setting.granularity,
        chosen=dict(best.chosen),
        searched=judged(best.curve, judge.judged(composite, order, "test")),
        plain=judged(plain, judge.judged(base, "absolute", "test")),
        base=base.name,
        tried=tried,
        importance=importance,
        metric=setting.metric_name,
        maximized=setting.maximized,
        exhausted=len(tried) >= space.size,
    )


def _common(judge: Judge, dense: float, sampler: Any, pruner: Any, workers: int, seed: int) -> dict[str, str]:
    """What all trials of a search have in common, by name."""
    setting = judge.setting

    def named(value: Any) -> str:
        return value if isinstance(value, str) else getattr(value, "__qualname__", None) or repr(value)

    return {
        "model": _digest(judge.model),
        "data": judge.parts.digest(),
        "space": json.dumps(judge.space.described()),
        "evaluate (it gives another value of the dense model)": repr(dense),
        "rates": json.dumps(setting.rates),
        "granularity": ",".join(granularities_of(setting.granularity)),
        "statistic": repr(setting.statistic),
        "scope": repr(setting.scope),
        "metric": named(setting.metric),
        "higher_is_better": str(setting.higher_is_better),
        "options": repr({name: named(value) for name, value in setting.options.items()}),
        "sampler": named(sampler),
        "pruner": pruner if isinstance(pruner, str) else type(pruner).__name__,
        "workers": str(workers),
        "seed": str(seed),
    }


def _digest(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, parameter in named_parameters(model).items():
        digest.update(
            name.encode() + parameter.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        )
    return digest.hexdigest()
