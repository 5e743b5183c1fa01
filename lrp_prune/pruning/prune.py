"""One shot or several rounds without training: batches in, pruned model out."""

import logging
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import chain, islice
from typing import Any

from torch import nn

from lrp_prune.attribution.chunks import check_chunks
from lrp_prune.models.batches import check_batches
from lrp_prune.models.loaded import check_loaded
from lrp_prune.models.subject import subject_of
from lrp_prune.names import named_parameters
from lrp_prune.progress import Counted, bar, no_bar, number_of
from lrp_prune.pruning.adjusting import Adjusting
from lrp_prune.pruning.checking import check_prunable, tell_replicas
from lrp_prune.pruning.compared import asked_of
from lrp_prune.pruning.compensation import Compensation
from lrp_prune.pruning.coverage import groups_of
from lrp_prune.pruning.masks import Masks
from lrp_prune.pruning.methods import Method, method_of
from lrp_prune.pruning.restoring import remembered, undone_on_error
from lrp_prune.pruning.schedules import Schedule, rounds_of, sparsity_schedule
from lrp_prune.pruning.scope import Scope, settled
from lrp_prune.pruning.scorers import scorer
from lrp_prune.pruning.select import select
from lrp_prune.relevance import Relevance, granularities_of
from lrp_prune.relevance.unscored import UnscoredWeightsWarning, check_included
from lrp_prune.selection.scopes import Structure, parse_scope
from lrp_prune.targets import Inferred

_logger = logging.getLogger("lrp_prune")
_ONE_ROUND = 0.6
"""Up to here a second scoring gains nothing, on any model of the panel (tests/benchmarks/panel.py)."""


def prune(
    model: nn.Module,
    batches: Iterable[Any] = (),
    sparsity: float | Mapping[str, float] = 0.5,
    method: str | Method = "lrp",
    scope: str | Scope | None = None,
    *,
    granularity: str | Sequence[str] = "weight",
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
    trainable_only: bool = False,
    rounds: int | None = None,
    schedule: Schedule = "cubic",
    recalibrate: bool | None = None,
    compensation: str | Compensation | None = None,
    existing: Masks | None = None,
    relevance: Relevance | None = None,
    progress: bool = True,
    chunks: int = 1,
    accumulate_on: str | None = None,
    matmul_dtype: str | None = "auto",
    unruled: str = "warn",
) -> Masks:
    """Prune a model in place, without training.

    What is pruned is zero in what the model uses: weights are scored and set to zero as they are used, and refused by name where
    zeros would be none there (see :func:`~lrp_prune.pruning.check_uses`). With adapters (PEFT) the weights inside are pruned, as
    they would be after merging; :func:`merge_adapters` merges them under the masks.

    A model that ``fully_shard`` has divided is pruned by all its processes together: each gives its own batches, as many
    as the others. Of copies of a model (``DistributedDataParallel``) each is pruned by itself, with a warning: they stay the same
    if all are given the same batches.

    Args:
        model: a Hugging Face model, any ``nn.Module``, or a ``LightningModule``.
        batches: reference samples, see :func:`lrp_prune.attribute`, gone through once a round, and the first of them once more to
            recalibrate. ``magnitude`` and ``random`` need none; if there is one, the first shows whether the model computes with
            weights before it uses them.
        sparsity: the fraction to prune, of all that ``include`` and ``exclude`` ask for (see :func:`select`), in all or by
            pattern of parameter names.
        method: ``"lrp"``, ``"wanda"``, ``"gradient"``, ``"magnitude"`` or ``"random"``, or an object that says more, such as
            ``LRP(composite="attnlrp", target="class")`` or ``Random(seed=3)``; see :mod:`lrp_prune.pruning.methods`.
        scope: what is compared: ``"global"``, ``"layer"``, ``"row"``, ``"column"`` or ``"N:M"``, or a :class:`Scope`, which also
            has the floor, the order and the normalization; None for the method's best.
        granularity: what is scored and pruned: weights, or kinds of units, see :func:`lrp_prune.attribute`.
        include: patterns of parameters to prune, see :func:`lrp_prune.attribute`.
        exclude: patterns of parameters to leave alone.
        trainable_only: leave frozen weights alone, unless ``include`` names them.
        rounds: in how many rounds. Each scores the model as it is pruned by then, so that weights which stand in for
            pruned ones are seen to matter; what is pruned stays pruned. None: one for each entry of ``schedule`` if that is a
            list, else one, and two beyond 60 % where the model is recalibrated between them.
        schedule: total sparsity by round, see :func:`~lrp_prune.pruning.sparsity_schedule`; a list ends at ``sparsity``.
        recalibrate: whether what is kept is scaled, channel by channel, to the outputs of the dense model on the same batches, by
            forward passes alone and only as far as it helps (see :func:`~lrp_prune.pruning.recalibrate`); biases and running
            statistics of batch normalizations follow. False: no kept weight changes. None: wherever there are batches, and
            outputs that can be compared (their shapes do not depend on values); else the log says that nothing was recalibrated.
            Of several rounds each begins with the dense model's weights, which are kept beside the model until then.
        compensation: update all kept weights, and biases, to the least squares of what each layer gave, in place of
            recalibrating: ``"exact"``, ``"obs"``, or an object such as :class:`~lrp_prune.pruning.LeastSquares`. It takes all
            batches, which should have many more tokens (or samples, or places) than a layer has inputs.
        existing: masks that the model is pruned by already, and trained under since: what they prune stays pruned and counts.
        relevance: scores of this model that were collected before, which the first round selects from instead of collecting them
            again: for several sparsities, say.
        progress: show a progress bar of what is collected, and of what is recalibrated.
        chunks: in how many passes over the batches the weights are scored, see :func:`lrp_prune.attribute`.
        accumulate_on, matmul_dtype: see :class:`~lrp_prune.attribution.RelevanceAccumulator`.
        unruled: see :func:`lrp_prune.attributing`.

    Returns:
        The masks. If an error is raised, the model is as it was.

    Raises:
        ValueError: for wrong arguments, weights that cannot be pruned, a sparsity that cannot be met with what is scored, and
            what :func:`lrp_prune.attribute` raises.

    Example:
        >>> import torch, lrp_prune
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> batches = [(torch.randn(16, 4), torch.randint(2, (16,)))]
        >>> lrp_prune.prune(model, batches, sparsity=0.5).sparsity
        0.5
        >>> lrp_prune.prune(model, batches, 0.75, lrp_prune.LRP(target="class")).sparsity
        0.75
    """
    method, kinds = method_of(method), granularities_of(granularity)
    scope = settled(scope, method, kinds)
    check_batches(batches)
    module = subject_of(model).module
    tell_replicas(model)
    batches = _peeked(batches)
    adjusting = Adjusting(recalibrate, compensation, batches)
    rounds = rounds_of(schedule, rounds)
    if rounds is None:
        again = adjusting.active and existing is None and gains_by_a_second_round(kinds, scope, sparsity)
        rounds = 2 if again else 1
    targets: Sequence[float | Mapping[str, float]] = sparsity_schedule(schedule, sparsity, rounds)
    _check_granularity(relevance, kinds)
    reference = list(batches) if rounds > 1 and isinstance(batches, Iterator) else batches
    check_chunks(chunks, reference, ",".join(kinds))
    reference = adjusting.again(reference)
    if method.target is None:
        method = method.with_target(Inferred())  # once for all rounds
    which: dict[str, Any] = {"include": include, "exclude": exclude, "trainable_only": trainable_only}
    running: dict[str, Any] = {"accumulate_on": accumulate_on, "matmul_dtype": matmul_dtype, "unruled": unruled}
    check_loaded(named_parameters(module))
    score = partial(scorer, method, model, granularity=kinds, **which, **running)
    masks = existing
    with undone_on_error() as undo:
        begin_again = remembered(model) if adjusting.active and rounds > 1 else None
        if begin_again is not None:
            undo.append(begin_again)
        for index, target in enumerate(targets):
            scores = score()
            if index == 0 and kinds == ("weight",):
                check_prunable(model, None if scores.needs_data else next(iter(reference), None), **which)
            given = relevance if index == 0 else None
            if given is None:
                with (bar if progress else no_bar)("Collecting relevance", chunks * number_of(reference)) as advance:
                    scores.collect(Counted(reference, advance), chunks)
            with _once(told=index > 0):
                scored = scores.compute() if given is None else given
                check_included(include, scored, scored.unscored)
                groups_of(scored, targets[-1], parse_scope(scope.compared or "global"), masks)  # before the first zero
                masks = select(scored, target, scope, existing=masks)
            if begin_again is not None and adjusting.active:
                begin_again()
            compared = asked_of(method.target, scored.target)
            done = adjusting.apply_(model, masks, reference, compared, undo if begin_again is None else None, progress)
            if done is not None:
                _logger.info("round %d: %s", index + 1, done)
    assert masks is not None
    return masks


def gains_by_a_second_round(kinds: tuple[str, ...], scope: Scope, sparsity: float | Mapping[str, float]) -> bool:
    """Whether scoring a second time was seen to gain: many single weights are pruned, and the scope lets a round prune fewer."""
    structured = isinstance(parse_scope(scope.compared or "global"), Structure)
    return kinds == ("weight",) and not structured and _highest(sparsity) > _ONE_ROUND


def _highest(sparsity: float | Mapping[str, float]) -> float:
    """The highest of the sparsities; 0 of what is none, which is refused later."""
    values = sparsity.values() if isinstance(sparsity, Mapping) else [sparsity]
    return max((value for value in values if isinstance(value, int | float)), default=0.0)


def _peeked(batches: Iterable[Any]) -> Iterable[Any]:
    """The same batches; of what can be gone through once, nothing at all if there is none."""
    if not isinstance(batches, Iterator):
        return batches
    first = list(islice(batches, 1))
    return chain(first, batches) if first else ()


def _check_granularity(relevance: Relevance | None, kinds: tuple[str, ...]) -> None:
    """Refuse relevance of other things than those that are to be pruned."""
    if relevance is not None and relevance.granularity != ",".join(kinds):
        raise ValueError(f"the relevance is about {relevance.granularity}s: pass granularity={relevance.granularity!r}")


@contextmanager
def _once(told: bool) -> Iterator[None]:
    """What is said of unscored weights is said in the first round."""
    with warnings.catch_warnings():
        if told:
            warnings.simplefilter("ignore", UnscoredWeightsWarning)
        yield
