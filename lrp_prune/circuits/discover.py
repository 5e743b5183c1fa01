"""Discovery: a model and a task in, ranked nodes out; in one shot, or by dropping some and scoring what is left."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lrp_prune.arguments import check_integer, check_number, check_patterns
from lrp_prune.attribution.candidates import candidates
from lrp_prune.attribution.observers import fingerprint
from lrp_prune.circuits.ablation import check_ablation, weights_zeroed
from lrp_prune.circuits.methods import method_for, way_of, with_statistic
from lrp_prune.circuits.ranking import Ranking
from lrp_prune.circuits.scores import unit_scores
from lrp_prune.circuits.sites import find_sites, kinds_of, passing
from lrp_prune.models.batches import to_device
from lrp_prune.models.subject import forwarded
from lrp_prune.pruning import Method, scorer
from lrp_prune.relevance import NORMALIZATIONS, Relevance
from lrp_prune.relevance.unscored import check_included
from lrp_prune.selection.keys import ORDERS
from lrp_prune.tasks.task import Batch, Task


def discover(
    model: nn.Module,
    task: Task,
    granularity: str | Sequence[str] = "neuron",
    method: str | Method | None = None,
    *,
    order: str = "absolute",
    metric: str | None = None,
    batch_size: int = 16,
    rounds: int = 1,
    density: float = 0.01,
    ablation: str = "counterfactual",
    normalize: str | None = None,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
    unruled: str = "warn",
) -> Ranking:
    r"""Rank a model's nodes by what they contribute to a task.

    Iterative discovery keeps :math:`n_r = n f^{r/R}` nodes after round :math:`r` of :math:`R`, down to the share :math:`f`
    (``density``); what was dropped is ablated when the rest is scored again. The ranking has all nodes: those dropped later
    are more important, and within a round the score decides.

    Args:
        model: a Hugging Face model, any ``nn.Module``, or a ``LightningModule``. It is unchanged afterwards.
        task: prompts and metric; keep prompts for :func:`~lrp_prune.circuits.evaluate` apart (:meth:`Task.split`).
        granularity: ``"weight"``; ``"neuron"`` (hidden units of MLPs), ``"head"``, ``"block"``, ``"attention_neuron"``
            (channels before the output projection), or several kinds, which are ranked together.
        method: ``"attnlrp"``, ``"cp_lrp"``, ``"gradient"``, ``"attribution_patching"``, ``"attribution_patching_ig"``,
            ``"gate_ig"``, ``"relp"``, ``"activation"``, ``"wanda"`` or ``"random"``, see
            :mod:`lrp_prune.circuits.scores`; or an object that says more, such as ``GateIG(steps=5)`` or
            ``LRP(composite="cp_lrp", statistic="signed")``, see :mod:`lrp_prune.circuits.methods`. Weights have no
            counterfactual: they are scored by methods of pruning; those that no relevance reaches (queries, keys and gates under
            ``cp_lrp``) are not ranked, and never ablated. None: ``attnlrp`` for weights and ``gate_ig`` for all else.
            A method that leaves its statistic open takes ``"signed"`` (mean) for heads and blocks, which then cancel over
            tokens, else ``"abs_token"``; ``LRP()`` takes ``attnlrp``.
        order: ``"absolute"``, or ``"signed"`` (the most positive first; only of a statistic ``"signed"``).
        metric: what is explained: ``"logit_difference"`` or ``"probability_difference"``; None for the task's.
        batch_size: prompts in a batch.
        rounds: how often nodes are dropped and the rest scored again; 1 is one shot.
        density: the share of nodes that is left after the last round.
        ablation: how nodes are ablated between rounds and on the way of ``gate_ig``: ``"counterfactual"``, ``"mean"`` or
            ``"zero"``; weights are always zeroed.
        normalize: divide each group's scores by their ``"mean"``, ``"sum"`` or ``"max"`` of absolute values.
        include: patterns of module (or weight) names to rank instead of all.
        exclude: patterns of names to leave out; what is not ranked is never ablated.
        unruled: see :func:`lrp_prune.attributing`.

    Returns:
        The :class:`~lrp_prune.circuits.Ranking`; ``.at(size)`` is a circuit.

    Raises:
        ValueError: for wrong arguments, or a model without such nodes.

    Example:
        >>> from lrp_prune.tasks import TableTask
        >>> class Tiny(nn.Sequential):
        ...     def forward(self, input_ids):
        ...         return super().forward(input_ids)
        >>> _ = torch.manual_seed(0)
        >>> model = Tiny(nn.Embedding(4, 8), nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
        >>> row = {"clean": "0", "counterfactual": "1", "answers": " 2", "distractors": " 3"}
        >>> task = TableTask(lambda text, **_: {"input_ids": [int(word) for word in text.split()]}, [row])
        >>> ranking = discover(model, task, "neuron", "attribution_patching")
        >>> ranking.at(0.25)
        Circuit(4 of 16 mlp_neurons)
    """
    weights = granularity == "weight"
    method = method_for(weights, method)
    check_options(order, rounds, density, normalize, batch_size, include, exclude)
    check_ablation(ablation)
    module = forwarded(model)
    kinds = () if weights else kinds_of(granularity)
    statistic = _statistic(method, kinds, order)
    method = with_statistic(method, statistic)
    way = way_of(method, statistic)
    target = task.target(metric)
    sites = () if weights else find_sites(module, task.batches(1)[0], kinds, target, include, exclude)

    def scored(kept: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
        if weights:
            with weights_zeroed(module, kept or {}):
                found = _weight_scores(module, task.batches(batch_size), method, target, include, exclude, unruled)
        else:
            found = unit_scores(
                module,
                sites,
                task,
                way,
                metric=metric,
                batch_size=batch_size,
                unruled=unruled,
                gates=kept,
                ablation=ablation,
            )
        return _normalized(found, normalize, kept)

    scores, dropped = scored(None), None
    name = ",".join(kinds) or "weight"
    if rounds > 1:
        scores, dropped = _iterate(scores, scored, name, sites, order, rounds, density)
    description = {
        "method": way.name,
        "statistic": statistic,
        "metric": metric or task.metric,
        "rounds": rounds,
        "task": type(task).__name__,
        "prompts": task.fingerprint,
        "seed": way.seed,
    }
    if way.steps:
        description["steps"] = way.steps
    if rounds > 1 or way.over_gates:
        description["ablation"] = "zero" if weights else ablation
    if rounds > 1:
        description["density"] = density
    return Ranking(scores, sites, name, order, dropped, fingerprint(module), description)


def _statistic(method: Method, kinds: tuple[str, ...], order: str) -> str:
    """The statistic that is meant: the method's, or what serves such nodes and this order."""
    statistic = getattr(method, "statistic", None)
    if statistic is None:
        coarse = kinds and not any(kind.endswith("neuron") for kind in kinds)
        statistic = "signed" if order == "signed" or coarse else "abs_token"
    if order == "signed" and statistic != "signed":
        raise ValueError(f"order 'signed' needs statistic 'signed', got {statistic!r}, whose scores have no sign")
    return str(statistic)


def _iterate(
    scores: dict[str, Tensor], scored: Any, name: str, sites: Any, order: str, rounds: int, density: float
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The scores that each node had when it was dropped, and the rounds."""
    dropped = {group: torch.zeros(values.shape, dtype=torch.int16, device="cpu") for group, values in scores.items()}
    total = sum(values.numel() for values in scores.values())
    final = {group: values.clone() for group, values in scores.items()}
    for number in range(1, rounds + 1):
        left = max(round(total * density ** (number / rounds)), 1)
        # All that is left is in this round for now; what its circuit keeps goes on to the next.
        kept = Ranking(final, sites, name, order, dropped).at(left).kept
        for group, mask in kept.items():
            dropped[group][mask] = number
        fresh = scored(kept)
        for group, mask in kept.items():
            final[group] = torch.where(mask, fresh[group].to(final[group]), final[group])
    return final, dropped


def _weight_scores(
    model: nn.Module,
    batches: Sequence[Batch],
    method: Method,
    target: Callable[[nn.Module, Any], Tensor],
    include: Sequence[str] | None,
    exclude: Sequence[str] | None,
    unruled: str,
) -> dict[str, Tensor]:
    explains = method.explains(("weight",))
    asked = method.with_target(target) if explains else method
    scores = scorer(asked, model, include=include, exclude=exclude, unruled=unruled)
    for batch in batches:
        inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
        scores.update(batch if explains else inputs)
    relevance = scores.compute()
    check_included(include, relevance, relevance.unscored)
    return {name: relevance[name].cpu() for name in relevance}


def _normalized(scores: dict[str, Tensor], by: str | None, kept: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    """Each group divided by its size, of which only what is kept counts."""
    if by is None:
        return scores
    counted = {name: values * kept[name] if kept else values for name, values in scores.items()}
    divided = Relevance(counted, granularity="weight", statistic="signed").normalized(by)
    if by != "mean" or not kept:
        return {name: divided[name] for name in scores}
    return {name: divided[name] * kept[name].float().mean() for name in scores}  # the mean of what is kept only


def check_nodes(
    model: nn.Module,
    task: Task,
    granularity: str | Sequence[str],
    method: str | Method | None = None,
    *,
    metric: str | None = None,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
) -> None:
    """Refuse what :func:`discover` would refuse of a model, by one prompt: it has no such nodes, or the task does not suit it.

    Raises:
        ValueError: likewise.
    """
    module, target, batch = forwarded(model), task.target(metric), task.batches(1)[0]
    if granularity != "weight":
        find_sites(module, batch, kinds_of(granularity), target, include, exclude)
        return
    candidates(module, include, exclude)
    method_for(True, method)
    with passing(module):
        target(module, to_device(batch, next(module.parameters()).device))


def check_options(
    order: str = "absolute",
    rounds: int = 1,
    density: float = 0.01,
    normalize: str | None = None,
    batch_size: int = 16,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
) -> None:
    """Refuse values of :func:`discover`'s options that can be known to be wrong without a model."""
    for what, value, choices in (("order", order, ORDERS), ("normalize", normalize, (*NORMALIZATIONS, None))):
        if value not in choices:
            raise ValueError(f"{what} must be one of {choices}, got {value!r}")
    check_integer("rounds", rounds, 1)
    check_number("density", density, "(0, 1)")
    check_integer("batch_size", batch_size, 1)
    check_patterns("include", include)
    check_patterns("exclude", exclude)
