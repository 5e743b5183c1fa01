"""A metric by pruning rate, for relevance that is there."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from lrp_prune.metrics.pruning import RATES
from lrp_prune.models.batches import check_batches
from lrp_prune.pruning.comparing import evaluated, rates_of, reached_by, stepping
from lrp_prune.pruning.comparison import Comparison
from lrp_prune.pruning.coverage import groups_of
from lrp_prune.pruning.masking import masked_parameters
from lrp_prune.pruning.methods import Method, method_of
from lrp_prune.pruning.restoring import restored
from lrp_prune.pruning.scope import Scope, scope_of
from lrp_prune.pruning.scorers import scorer
from lrp_prune.pruning.select import check_selection, select
from lrp_prune.relevance import Relevance
from lrp_prune.selection.scopes import parse_scope
from lrp_prune.targets import Inferred


def pruning_curve(
    model: nn.Module,
    relevance: Relevance | Mapping[str, Relevance | str | Method],
    evaluate: Callable[[nn.Module], float],
    rates: Sequence[float] = RATES,
    scope: str | Scope = "global",
    *,
    batches: Iterable[Any] = (),
    granularity: str | Sequence[str] | None = None,
    higher_is_better: bool = True,
    progress: bool = True,
) -> Comparison:
    r"""Evaluate a model with its least relevant weights or units removed, rate by rate, and put it back as it was.

    What Pruning by eXplaining judges relevance by (arXiv 2408.12568): the area under the curve is
    ``curve.area("relevance")``, :math:`A_{PR}`, and ``curve.top_rate("relevance")`` the highest rate that keeps 95 %. Nothing is
    scaled or trained. The same of whole methods, with what they scale: :func:`lrp_prune.compare`, which also says what happens in
    several processes.

    Args:
        model: the one that the relevance is of; it comes out bit for bit as it went in.
        relevance: of weights or units; or several by name, which are compared. In place of a relevance there may be a pruning
            method, by name or as an object (``"random"``, ``Magnitude()``), which is scored on ``batches`` first.
        evaluate: from the model to a number, on held-out data.
        rates: shares that are pruned, each from the dense model; 0 is the dense model itself.
        scope: what is compared with each other, see :func:`~lrp_prune.select`.
        batches: reference samples of the methods among them, see :func:`~lrp_prune.prune`.
        granularity: what methods score; None: what the relevances are about, or weights where there is none.
        higher_is_better: False for a loss or a perplexity.
        progress: show a progress bar.

    Returns:
        The values by rate, under the names of the relevances (``"relevance"`` if it has none).

    Raises:
        ValueError: for no relevance or wrong rates, and what :func:`~lrp_prune.select` refuses, before anything is evaluated; if
            ``evaluate`` gives no number.
        KeyError: if the relevance is of another model.

    Example:
        >>> import torch, lrp_prune
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> inputs, labels = torch.randn(64, 4), torch.randint(2, (64,))
        >>> found = lrp_prune.attribute(model, [(inputs, labels)], granularity="neuron", target="class")
        >>> def accuracy(model):
        ...     return float((model(inputs).argmax(1) == labels).float().mean())
        >>> curve = lrp_prune.pruning_curve(model, found, accuracy, rates=(0.0, 0.25, 0.5), progress=False)
        >>> curve.scores["relevance"][0.0] == curve.dense, 0 <= curve.area("relevance") <= 1
        (True, True)
    """
    asked = {"relevance": relevance} if isinstance(relevance, Relevance) else relevance
    if (
        not isinstance(asked, Mapping)
        or not asked
        or not all(isinstance(each, Relevance | str | Method) for each in asked.values())
    ):
        raise ValueError(f"relevance must be a Relevance, or several by name (or pruning methods), got {relevance!r}")
    rates = rates_of(rates, "rates")
    given = _scored(model, asked, batches, granularity)
    pruned = [rate for rate in rates if rate > 0]
    for entry in given.values():
        _check(model, entry, pruned, scope)
    scores: dict[str, dict[float, float]] = {label: {} for label in given}
    reached: dict[str, dict[float, float]] = {label: {} for label in given}
    with stepping(1 + len(given) * len(pruned), progress) as step, restored(model) as restore:
        step("dense")
        dense = evaluated(model, evaluate)
        restore()
        for label, entry in given.items():
            for rate in rates:
                if rate == 0:
                    scores[label][rate], reached[label][rate] = dense, 0.0
                    continue
                step(f"{label} at {100 * rate:g} %")
                masks = select(entry, rate, scope)
                masks.apply_(model)
                scores[label][rate], reached[label][rate] = evaluated(model, evaluate), reached_by(masks, rate)
                restore()
    return Comparison(scores, dense, reached, higher_is_better)


def _scored(
    model: nn.Module,
    asked: Mapping[str, Relevance | str | Method],
    batches: Iterable[Any],
    granularity: str | Sequence[str] | None,
) -> dict[str, Relevance]:
    """The relevances, with the scores of methods among them."""
    if granularity is None:
        found = dict.fromkeys(each.granularity for each in asked.values() if isinstance(each, Relevance))
        if len(found) > 1 and any(not isinstance(each, Relevance) for each in asked.values()):
            kinds = " and ".join(f"{kind}s" for kind in found)
            raise ValueError(f"the relevances are about {kinds}: say by granularity= what methods score")
        granularity = next(iter(found), "weight").split(",")
    methods = {label: method_of(each) for label, each in asked.items() if not isinstance(each, Relevance)}
    target = Inferred()  # once for all methods
    check_batches(batches)
    reference = list(batches) if methods else []
    scored = {}
    for label, method in methods.items():
        scores = scorer(method.with_target(target) if method.target is None else method, model, granularity=granularity)
        if scores.needs_data:
            if not reference:
                raise ValueError(f"method {label!r} needs reference samples: pass batches=")
            scores.collect(reference)
        scored[label] = scores.compute()
    return {label: each if isinstance(each, Relevance) else scored[label] for label, each in asked.items()}


def _check(model: nn.Module, relevance: Relevance, rates: Sequence[float], scope: str | Scope) -> None:
    """Raise now what would be raised after other rates had been evaluated."""
    masked_parameters(model, relevance.parameter_shapes)
    for rate in rates:
        check_selection(relevance, rate, scope)
        groups_of(relevance, rate, parse_scope(scope_of(scope).compared or "global"))
