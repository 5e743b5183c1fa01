"""Methods side by side on one model: what each costs in the number that the user cares for."""

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn
from tqdm import tqdm

from lrp_prune.attribution.chunks import check_chunks
from lrp_prune.models.batches import check_batches
from lrp_prune.models.states import unchanged_state, undisturbed
from lrp_prune.progress import is_first
from lrp_prune.pruning.adjusting import Adjusting
from lrp_prune.pruning.comparison import Comparison
from lrp_prune.pruning.masks import Masks
from lrp_prune.pruning.methods import METHODS, Method, method_of
from lrp_prune.pruning.prune import prune
from lrp_prune.pruning.restoring import restored
from lrp_prune.pruning.schedules import rounds_of, sparsity_schedule
from lrp_prune.pruning.scope import settled
from lrp_prune.pruning.scorers import Scorer, scorer
from lrp_prune.relevance import Relevance, granularities_of
from lrp_prune.selection.scopes import check_reachable, check_sparsity, check_units_scope, parse_scope
from lrp_prune.targets import Inferred

Given = str | Method | Mapping[str, Any]
Methods = Sequence[str | Method | Mapping[str, Given]] | Mapping[str, Given]

_OWN = ("model", "batches", "sparsity", "relevance", "progress")
_OF_PRUNE = frozenset(inspect.signature(prune).parameters)
_OF_SCORER = (_OF_PRUNE & frozenset(inspect.signature(scorer).parameters)) - {"model"}


def compare(
    model: nn.Module,
    batches: Iterable[Any],
    evaluate: Callable[[nn.Module], float],
    methods: Methods = ("lrp", "wanda", "magnitude", "random"),
    sparsities: Sequence[float] = (0.5, 0.7, 0.8),
    *,
    higher_is_better: bool = True,
    progress: bool = True,
    **options: Any,
) -> Comparison:
    """Prune a model by each method to each sparsity, evaluate it, and put it back as it was.

    Each cell of the result is what ``evaluate(model)`` gives after :func:`~lrp_prune.prune` with the same arguments; the scores
    of a method are collected once for all sparsities. The model comes out bit for bit as it went in, also if something fails:
    one copy of its weights is kept meanwhile, in the memory of the CPU. ``evaluate`` is called with the model in evaluation mode
    and with the same state of the random generators each time; modes, generators and buffers are as before afterwards.

    A model that ``fully_shard`` has divided is compared by all its processes together: each gives its own batches, and calls
    ``evaluate``; what that returns in a process is what this one's result has. Of copies of a model (``DistributedDataParallel``)
    each is compared by itself, by its own batches.

    Args:
        model: see :func:`~lrp_prune.prune`.
        batches: reference samples, from which relevance is collected; gone through once, and kept in a list.
        evaluate: from the model to a number, on held-out data. Called first on the dense model, then once for each method and
            sparsity.
        methods: methods, by name or as objects; or mappings from a label to a method, or to ``{"method": ..., ...}`` with further
            arguments of :func:`~lrp_prune.prune` for this one.
        sparsities: to prune to, each from the dense model.
        higher_is_better: False for a loss or a perplexity.
        progress: show a progress bar.
        **options: of :func:`~lrp_prune.prune`, for all methods.

    Returns:
        The scores, to be printed, plotted or taken as they are.

    Raises:
        ValueError: for arguments that are wrong for one of the methods, before anything is scored; if ``evaluate`` gives no
            number; and what :func:`~lrp_prune.prune` raises.

    Example:
        >>> import torch, lrp_prune
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> inputs, labels = torch.randn(64, 4), torch.randint(2, (64,))
        >>> def accuracy(model):
        ...     return float((model(inputs).argmax(1) == labels).float().mean())
        >>> found = lrp_prune.compare(model, [(inputs, labels)], accuracy, ("lrp", "random"), (0.5,), progress=False)
        >>> list(found.scores), list(found.scores["lrp"])
        (['lrp', 'random'], [0.5])
        >>> found.dense == accuracy(model)
        True
    """
    entries = _entries(methods, options)
    rates = rates_of(sparsities)
    check_batches(batches)
    scores: dict[str, dict[float, float]] = {label: {} for label in entries}
    reached: dict[str, dict[float, float]] = {label: {} for label in entries}
    with undisturbed(model):  # a loader draws from the global random generator whenever it is gone through
        reference = list(batches)
        for label, entry in entries.items():
            _check(label, entry, rates, model, reference)
        with stepping(1 + len(entries) * len(rates), progress) as step, restored(model) as restore:
            step("dense")
            dense = evaluated(model, evaluate)
            restore()  # statistics of batch normalizations, which an evaluation may have moved
            for label, entry in entries.items():
                step(f"{label}: scoring", 0)
                relevance = _scored(model, reference, entry)
                for rate in rates:
                    step(f"{label} at {100 * rate:g} %")
                    masks = prune(model, reference, rate, relevance=relevance, progress=False, **entry)
                    reached[label][rate] = reached_by(masks, rate)
                    scores[label][rate] = evaluated(model, evaluate)
                    restore()
    return Comparison(scores, dense, reached, higher_is_better)


def _entries(methods: Methods, options: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Arguments of :func:`prune` by label."""
    if isinstance(methods, str | Method):
        raise ValueError(f"methods must be several, got {methods!r}: pass [{methods!r}]")
    target = Inferred()  # once for all methods
    found: dict[str, dict[str, Any]] = {}
    for each in [methods] if isinstance(methods, Mapping) else methods:
        for label, own in (each if isinstance(each, Mapping) else {str(each): each}).items():
            entry = {**options, **({"method": own} if isinstance(own, str | Method) else _checked(label, own))}
            if label in found:
                raise ValueError(f"methods has {label!r} twice: give each a label, {{'label': {{'method': ..., ...}}}}")
            for name in entry:
                if name in _OWN:
                    way_out = "give sparsities=, numbers in [0, 1)" if name == "sparsity" else "compare has its own"
                    raise ValueError(f"{name!r} is no option of {label!r}: {way_out}")
                if name not in _OF_PRUNE:
                    raise ValueError(
                        f"method {label!r}: {name!r} is no argument of prune, which takes {sorted(_OF_PRUNE)}"
                    )
            try:
                method = method_of(entry["method"])
            except ValueError as error:
                raise ValueError(f"method {label!r}: {error}") from error
            found[label] = {**entry, "method": method.with_target(target) if method.target is None else method}
    if not found:
        raise ValueError(f"methods is empty: choose some of {tuple(METHODS)}")
    return found


def _checked(label: str, own: Any) -> Mapping[str, Any]:
    if not isinstance(own, Mapping) or "method" not in own:
        raise ValueError(f"methods[{label!r}] must be a method, or a mapping with a 'method', got {own!r}")
    return own


def reached_by(masks: Masks, rate: float) -> float:
    """The share that was pruned: of weights, or of units, of which as many go as were asked for."""
    return masks.sparsity if masks.granularity == "weight" else rate


def rates_of(sparsities: Sequence[float], name: str = "sparsities") -> list[float]:
    """Different numbers in [0, 1), checked; ``name`` is the argument's."""
    if isinstance(sparsities, int | float | Mapping):
        raise ValueError(f"{name} must be several numbers in [0, 1), got {sparsities!r}")
    rates = [check_sparsity(rate, f"each of {name}") for rate in sparsities]
    if not rates or len(set(rates)) < len(rates):
        raise ValueError(f"{name} must be different numbers in [0, 1), at least one, got {list(sparsities)!r}")
    return rates


def _check(
    label: str, entry: Mapping[str, Any], rates: Sequence[float], model: nn.Module, reference: list[Any]
) -> None:
    """Raise now what would be raised after other methods had been scored."""
    try:
        kinds = granularities_of(entry.get("granularity", "weight"))
        compared = settled(entry.get("scope"), entry["method"], kinds).compared or "global"
        check_units_scope(",".join(kinds), compared)
        for rate in rates:
            check_reachable(parse_scope(compared), rate)
            schedule = entry.get("schedule", "cubic")
            rounds = rounds_of(schedule, entry.get("rounds"))
            sparsity_schedule(schedule, rate, 1 if rounds is None else rounds)
        Adjusting(entry.get("recalibrate"), entry.get("compensation"), reference)
        check_chunks(entry.get("chunks", 1), reference, ",".join(kinds))
        needs_data = _scorer(model, entry).needs_data
    except (ValueError, TypeError) as error:
        raise ValueError(f"method {label!r}: {error}") from error
    if needs_data and not reference:
        raise ValueError(f"method {label!r} needs reference samples, and there is no batch")


def _scorer(model: nn.Module, entry: Mapping[str, Any]) -> Scorer:
    return scorer(model=model, **{name: value for name, value in entry.items() if name in _OF_SCORER})


def _scored(model: nn.Module, reference: list[Any], entry: Mapping[str, Any]) -> Relevance:
    scores = _scorer(model, entry)
    scores.collect(reference, entry.get("chunks", 1))
    return scores.compute()


def evaluated(model: nn.Module, evaluate: Callable[[nn.Module], float]) -> float:
    """What a function says of a model, which is as it was afterwards."""
    with undisturbed(model), unchanged_state(model):
        value = evaluate(model)
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"evaluate must give a number, got a {type(value).__name__}: return one metric, such as the accuracy"
        ) from error


@contextmanager
def stepping(total: int, shown: bool) -> Iterator[Callable[..., None]]:
    """A progress bar of one process; yields what says what comes next, and how many steps that is."""
    with tqdm(total=total, disable=not (shown and is_first()), leave=False) as bar:
        pending = 0

        def step(what: str, steps: int = 1) -> None:
            nonlocal pending
            bar.update(pending)
            bar.set_description(what)
            pending = steps

        yield step
        bar.update(pending)
