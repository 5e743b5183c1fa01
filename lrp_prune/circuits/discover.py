"""Discovery: a model and a task in, ranked nodes out; in one shot, or by dropping some and scoring what is left."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lrp_prune.attribution.candidates import candidates
from lrp_prune.attribution.collect import attribute
from lrp_prune.attribution.observers import fingerprint
from lrp_prune.circuits.ablation import check_ablation, weights_zeroed
from lrp_prune.circuits.explaining import COMPOSITES, DEPENDS_ON_ABLATION, STEPS
from lrp_prune.circuits.ranking import RANKINGS, Ranking
from lrp_prune.circuits.scores import unit_scores
from lrp_prune.circuits.sites import find_sites, kinds_of, passing
from lrp_prune.models.batches import to_device
from lrp_prune.models.subject import forwarded
from lrp_prune.pruning import scorer
from lrp_prune.relevance import NORMALIZATIONS, Relevance
from lrp_prune.statistics import OF_RELEVANCE
from lrp_prune.tasks.task import Task

METHODS: tuple[str, ...] = (*COMPOSITES, "activation", "wanda", "random")
_OF_WEIGHTS = ("attnlrp", "cp_lrp", "gradient", "wanda", "random")


def discover(
    model: nn.Module,
    task: Task,
    granularity: str | Sequence[str] = "neuron",
    method: str | None = None,
    *,
    statistic: str | None = None,
    ranking: str = "absolute",
    metric: str | None = None,
    batch_size: int = 16,
    rounds: int = 1,
    floor: float = 0.01,
    ablation: str = "counterfactual",
    steps: int | None = None,
    normalize: str | None = None,
    skip_first: int = 0,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
    seed: int = 0,
    unruled: str = "warn",
) -> Ranking:
    r"""Rank a model's nodes by what they contribute to a task.

    Iterative discovery keeps :math:`n_r = n f^{r/R}` nodes after round :math:`r` of :math:`R`, down to the share :math:`f`
    (``floor``); what was dropped is ablated when the rest is scored again. The ranking has all nodes: those dropped later
    are more important, and within a round the score decides.

    Args:
        model: a Hugging Face model, any ``nn.Module``, or a ``LightningModule``. It is unchanged afterwards.
        task: prompts and metric; keep prompts for :func:`~lrp_prune.circuits.evaluate` apart (:meth:`Task.split`).
        granularity: ``"weight"``; ``"neuron"`` (hidden units of MLPs), ``"head"``, ``"block"``, ``"attention_neuron"``
            (channels before the output projection), or several kinds, which are ranked together.
        method: ``"attnlrp"``, ``"cp_lrp"``, ``"gradient"``, ``"attribution_patching"``, ``"attribution_patching_ig"``,
            ``"gate_ig"``, ``"relp"``, ``"activation"``, ``"wanda"`` or ``"random"``, see
            :mod:`lrp_prune.circuits.scores`. Weights have no counterfactual: they are scored by the relevances, ``wanda``
            and ``random``; those that no relevance reaches (queries, keys and gates under ``cp_lrp``) are not ranked, and
            never ablated. None: ``attnlrp`` for weights and ``gate_ig`` for all else.
        statistic: how tokens and samples are reduced: ``"signed"`` (mean), ``"abs_sample"``, ``"abs_token"`` or
            ``"squared_token"``; None: ``signed`` for heads and blocks, which then cancel over tokens, else ``abs_token``.
        ranking: ``"absolute"``, or ``"signed"`` (the most positive first; only of ``statistic="signed"``).
        metric: what is explained: ``"logit_difference"`` or ``"probability_difference"``; None for the task's.
        batch_size: prompts in a batch.
        rounds: how often nodes are dropped and the rest scored again; 1 is one shot.
        floor: the share of nodes that is left after the last round.
        ablation: how nodes are ablated between rounds and on the way of ``gate_ig``: ``"counterfactual"``, ``"mean"`` or
            ``"zero"``; weights are always zeroed.
        steps: of integrated gradients; None: 5 for ``attribution_patching_ig``, and for ``gate_ig`` 1, the middle of the
            way, which costs one pass.
        normalize: divide each group's scores by their ``"mean"``, ``"sum"`` or ``"max"`` of absolute values.
        skip_first: tokens at the beginning of a prompt that do not count.
        include: patterns of module (or weight) names to rank instead of all.
        exclude: patterns of names to leave out; what is not ranked is never ablated.
        seed: of ``random``.
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
    method = method_for(granularity, method)
    check_options(statistic, ranking, rounds, floor, steps, normalize, skip_first)
    check_ablation(ablation)
    steps = STEPS.get(method, 1) if steps is None else steps
    module = forwarded(model)
    kinds = () if weights else kinds_of(granularity)
    if statistic is None:
        coarse = kinds and not any(kind.endswith("neuron") for kind in kinds)
        statistic = "signed" if ranking == "signed" or coarse else "abs_token"
    if ranking == "signed" and statistic != "signed":
        raise ValueError(f"ranking 'signed' needs statistic 'signed', got {statistic!r}, whose scores have no sign")
    target = task.target(metric)
    sites = () if weights else find_sites(module, task.batches(1)[0], kinds, target, include, exclude)

    def scored(kept: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
        if weights:
            with weights_zeroed(module, kept or {}):
                found = _weight_scores(
                    module, task, method, statistic, metric, batch_size, include, exclude, seed, skip_first, unruled
                )
        else:
            found = unit_scores(
                module, sites, task, method, statistic, metric=metric, batch_size=batch_size, steps=steps,
                skip_first=skip_first, unruled=unruled, seed=seed, gates=kept, ablation=ablation,
            )  # fmt: skip
        return _normalized(found, normalize, kept)

    scores, dropped = scored(None), None
    name = ",".join(kinds) or "weight"
    if rounds > 1:
        scores, dropped = _iterate(scores, scored, name, sites, ranking, rounds, floor)
    description = {
        "method": method,
        "statistic": statistic,
        "metric": metric or task.metric,
        "rounds": rounds,
        "task": type(task).__name__,
        "prompts": task.fingerprint,
        "seed": seed,
    }
    if method in STEPS:
        description["steps"] = steps
    if rounds > 1 or method in DEPENDS_ON_ABLATION:
        description["ablation"] = "zero" if weights else ablation
    if rounds > 1:
        description["floor"] = floor
    return Ranking(scores, sites, name, ranking, dropped, fingerprint(module), description)


def _iterate(
    scores: dict[str, Tensor], scored: Any, name: str, sites: Any, ranking: str, rounds: int, floor: float
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The scores that each node had when it was dropped, and the rounds."""
    dropped = {group: torch.zeros(values.shape, dtype=torch.int16) for group, values in scores.items()}
    total = sum(values.numel() for values in scores.values())
    final = {group: values.clone() for group, values in scores.items()}
    for number in range(1, rounds + 1):
        left = max(round(total * floor ** (number / rounds)), 1)
        # All that is left is in this round for now; what its circuit keeps goes on to the next.
        kept = Ranking(final, sites, name, ranking, dropped).at(left).kept
        for group, mask in kept.items():
            dropped[group][mask] = number
        fresh = scored(kept)
        for group, mask in kept.items():
            final[group] = torch.where(mask, fresh[group].to(final[group]), final[group])
    return final, dropped


def _weight_scores(
    model: nn.Module,
    task: Task,
    method: str,
    statistic: str | None,
    metric: str | None,
    batch_size: int,
    include: Sequence[str] | None,
    exclude: Sequence[str] | None,
    seed: int,
    skip_first: int,
    unruled: str,
) -> dict[str, Tensor]:
    batches = task.batches(batch_size)
    if method in ("wanda", "random"):
        collected = scorer(method, model, include=include, exclude=exclude, seed=seed, skip_first=skip_first)
        for batch in batches:
            collected.update({"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]})
        relevance = collected.compute()
    else:
        relevance = attribute(
            model,
            batches,
            task.target(metric),
            COMPOSITES[method],
            statistic or "abs_token",
            "weight",
            include,
            exclude,
            skip_first=skip_first,
            unruled=unruled,
        )
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


def method_for(granularity: str | Sequence[str], method: str | None) -> str:
    """The method of :func:`discover`: the one that is given, or the default.

    Raises:
        ValueError: for an unknown method, or one that has no scores of such nodes.
    """
    weights = granularity == "weight"
    if method is None:
        return "attnlrp" if weights else "gate_ig"
    if method not in METHODS:
        raise ValueError(f"method must be one of {METHODS}, got {method!r}")
    if weights and method not in _OF_WEIGHTS:
        raise ValueError(f"method {method!r} scores units, not weights: use one of {_OF_WEIGHTS}")
    return method


def check_nodes(
    model: nn.Module,
    task: Task,
    granularity: str | Sequence[str],
    method: str | None = None,
    *,
    metric: str | None = None,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
    **_: Any,
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
    method_for(granularity, method)
    with passing(module):
        target(module, to_device(batch, next(module.parameters()).device))


def check_options(
    statistic: str | None = None,
    ranking: str = "absolute",
    rounds: int = 1,
    floor: float = 0.01,
    steps: int | None = None,
    normalize: str | None = None,
    skip_first: int = 0,
    **_: Any,
) -> None:
    """Refuse values of :func:`discover`'s options that can be known to be wrong without a model."""
    for what, value, choices in (
        ("statistic", statistic, (*OF_RELEVANCE, None)),
        ("ranking", ranking, RANKINGS),
        ("normalize", normalize, (*NORMALIZATIONS, None)),
    ):
        if value not in choices:
            raise ValueError(f"{what} must be one of {choices}, got {value!r}")
    for what, number in (("rounds", rounds), ("steps", steps)):
        if number is not None and number < 1:
            raise ValueError(f"{what} must be at least 1, got {number}")
    if not 0 < floor < 1:
        raise ValueError(f"floor must be in (0, 1), got {floor}")
    if skip_first < 0:
        raise ValueError(f"skip_first must not be negative, got {skip_first}")
