"""Evaluation: what is left of a model's behaviour when all but a circuit is ablated."""

import random
import warnings
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from lrp_prune.attribution.observers import fingerprint
from lrp_prune.circuits.ablation import Reference, gating, weights_zeroed
from lrp_prune.circuits.circuit import Circuit, Node
from lrp_prune.circuits.ranking import Ranking
from lrp_prune.circuits.references import reference_for
from lrp_prune.circuits.result import EvaluationResult
from lrp_prune.circuits.sites import passing
from lrp_prune.models.subject import forwarded
from lrp_prune.names import named_parameters
from lrp_prune.tasks.metrics import METRICS, batch_metric
from lrp_prune.tasks.task import Batch, Task, answer_logits

MIB_SIZES: tuple[float, ...] = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
"""The fractions at which the MIB benchmark evaluates (arXiv 2504.13151)."""
Scores = dict[str, Tensor]
_SAME = 1e-12
_UNDEFINED = (
    "the full model and the empty circuit have the same {metric}: faithfulness is not defined, take another ablation, metric "
    "or granularity"
)


def evaluate(
    model: nn.Module,
    circuit: Ranking | Circuit | Sequence[Circuit],
    task: Task,
    sizes: Sequence[int | float] = MIB_SIZES,
    ablation: str = "counterfactual",
    *,
    metric: str | None = None,
    batch_size: int = 16,
    seeds: Sequence[int] | None = None,
    complements: bool = True,
    minimality_nodes: int = 0,
) -> EvaluationResult:
    r"""Faithfulness, completeness, minimality, and the areas CPR and CMD.

    All metrics are evaluated at once; faithfulness is normalised by the full model and the empty circuit under the same
    ablation (:class:`EvaluationResult`). Nodes that were not ranked are never ablated.

    Args:
        model: the model that the nodes belong to; unchanged afterwards.
        circuit: a ranking, one circuit, or several of the same nodes.
        task: prompts, which should be others than the discovery's: a warning is given if they are the same.
        sizes: for a ranking: numbers of nodes (integers) or fractions (floats, rounded down as MIB does).
        ablation: ``"counterfactual"``, ``"mean"`` or ``"zero"``; circuits of weights know ``"zero"`` only.
        metric: of faithfulness; None for the task's.
        batch_size: prompts in a batch.
        seeds: evaluate on ``task.resampled(seed)`` for each, for intervals; None: once, on the task itself.
        complements: evaluate the model without each circuit as well, for completeness.
        minimality_nodes: how many nodes of each circuit are left out in turn, see :func:`minimality`; the smallest effect is
            reported. 0: none.

    Raises:
        ValueError: for wrong arguments, circuits of another model, or where the full model and the empty circuit score the
            same.

    Example:
        >>> from lrp_prune.circuits import discover
        >>> from lrp_prune.tasks import TableTask
        >>> class Tiny(nn.Sequential):
        ...     def forward(self, input_ids):
        ...         return super().forward(input_ids)
        >>> _ = torch.manual_seed(0)
        >>> model = Tiny(nn.Embedding(4, 8), nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
        >>> row = {"clean": "0", "counterfactual": "1", "answers": " 2", "distractors": " 3"}
        >>> task = TableTask(lambda text, **_: {"input_ids": [int(word) for word in text.split()]}, [row])
        >>> ranking = discover(model, task, "neuron", "attribution_patching")
        >>> result = evaluate(model, ranking, task, sizes=[0.0, 0.25, 1.0], seeds=[0])
        >>> result.sizes, round(float(result.faithfulness[0]), 3), round(float(result.faithfulness[2]), 3)
        ((0, 4, 16), 0.0, 1.0)
    """
    (result,) = compare(
        model, {"": circuit}, task, sizes, ablation, metric=metric, batch_size=batch_size, seeds=seeds,
        complements=complements, minimality_nodes=minimality_nodes,
    ).values()  # fmt: skip
    return result


def compare(
    model: nn.Module,
    found: Mapping[str, Ranking | Circuit | Sequence[Circuit]],
    task: Task,
    sizes: Sequence[int | float] = MIB_SIZES,
    ablation: str = "counterfactual",
    *,
    metric: str | None = None,
    batch_size: int = 16,
    seeds: Sequence[int] | None = None,
    complements: bool = True,
    minimality_nodes: int = 0,
) -> dict[str, EvaluationResult]:
    """:func:`evaluate` of several rankings or circuits of the same nodes, on the same prompts, at less cost.

    The passes that do not depend on a circuit (counterfactual, full, empty) are made once for all.

    Args:
        model: the model that the nodes belong to; unchanged afterwards.
        found: name -> ranking, circuit, or circuits.
        task, sizes, ablation, metric, batch_size, seeds, complements, minimality_nodes: see :func:`evaluate`.

    Returns:
        name -> result.

    Raises:
        ValueError: for wrong arguments, circuits of different nodes or of another model, or where the full model and the empty
            circuit score the same.
    """
    chosen = task.metric if metric is None else metric
    if chosen not in METRICS:
        raise ValueError(f"metric must be one of {METRICS}, got {chosen!r}")
    if not found:
        raise ValueError("there is no circuit to evaluate")
    named = {name: _circuits(one, sizes) for name, one in found.items()}
    rows = [one for circuits, _ in named.values() for one in circuits]
    if any(other.kept.keys() != rows[0].kept.keys() for other in rows):
        raise ValueError("the circuits are of different nodes: evaluate them one after the other")
    module = forwarded(model)
    _check_model(module, rows)
    if seeds is None and any(one.description.get("prompts") == task.fingerprint for one in rows):
        warnings.warn(
            "the circuit is evaluated on the prompts it was found on: split the task (task.split()) and hold one part out",
            stacklevel=2,
        )
    number = len(rows)
    if complements:
        rows += [~one for one in rows]
    by_seed = [
        _scores(module, rows, part, ablation, batch_size)
        for part in ([task] if seeds is None else [task.resampled(seed) for seed in seeds])
    ]
    table = {name: torch.stack([scores[name] for scores in by_seed]) for name in METRICS}
    full, empty = ({name: values[:, row] for name, values in table.items()} for row in (0, 1))
    if bool(((full[chosen] - empty[chosen]).abs() < _SAME).any()):
        raise ValueError(_UNDEFINED.format(metric=chosen))
    results, start = {}, 2
    for name, (circuits, order) in named.items():
        stop = start + len(circuits)
        result = EvaluationResult(
            tuple(one.size for one in circuits),
            circuits[0].total,
            ablation,
            chosen,
            order,
            full,
            empty,
            {metric: values[:, start:stop] for metric, values in table.items()},
            {metric: values[:, start + number : stop + number] for metric, values in table.items()}
            if complements
            else {},
            torch.full((len(circuits),), torch.nan, device="cpu"),
            dict(circuits[0].description),
        )
        for index, one in enumerate(circuits if minimality_nodes else ()):
            if one.size:
                effects = minimality(
                    module, one, task, ablation, metric=chosen, batch_size=batch_size, nodes=minimality_nodes
                )
                result.minimality[index] = min(effects.values())
        results[name], start = result, stop
    return results


def minimality(
    model: nn.Module,
    circuit: Circuit,
    task: Task,
    ablation: str = "counterfactual",
    *,
    metric: str | None = None,
    batch_size: int = 16,
    nodes: int | None = None,
    seed: int = 0,
) -> dict[Node, float]:
    r"""What each node of a circuit is needed for: :math:`|f(C) - f(C \setminus \{v\})|`, of some or all of its nodes.

    It is the minimality of Wang et al. (arXiv 2211.00593) with an empty set :math:`K`, in units of faithfulness; a node near 0
    need not be there.

    Args:
        model: the model that the nodes belong to.
        circuit: the circuit.
        task: prompts.
        ablation: see :func:`evaluate`.
        metric: None for the task's.
        batch_size: prompts in a batch.
        nodes: how many, drawn by the seed; None for all.
        seed: of the draw.

    Raises:
        ValueError: for a circuit of another model, or where the full model and the empty circuit score the same.
    """
    chosen = task.metric if metric is None else metric
    tested = circuit.nodes()
    if nodes is not None and nodes < len(tested):
        tested = random.Random(seed).sample(tested, nodes)
    rows = [circuit, *(circuit.without(node) for node in tested)]
    module = forwarded(model)
    _check_model(module, rows)
    scores = _scores(module, rows, task, ablation, batch_size)[chosen]
    if abs(float(scores[0] - scores[1])) < _SAME:
        raise ValueError(_UNDEFINED.format(metric=chosen))
    faithfulness = (scores[2:] - scores[1]) / (scores[0] - scores[1])
    return {node: float((faithfulness[0] - value).abs()) for node, value in zip(tested, faithfulness[1:], strict=True)}


def _check_model(model: nn.Module, circuits: Sequence[Circuit]) -> None:
    """Refuse circuits whose parameters the model does not have."""
    parameters, own = named_parameters(model), fingerprint(model)
    for circuit in circuits:
        shapes = dict(shape for site in circuit.sites for shape in site.shapes)
        if circuit.granularity == "weight":
            shapes = {name: tuple(mask.shape) for name, mask in circuit.kept.items()}
        for name, shape in shapes.items():
            if name not in parameters or tuple(parameters[name].shape) != shape:
                has = f"one of {tuple(parameters[name].shape)}" if name in parameters else "none of that name"
                raise ValueError(
                    f"the circuit is of another model: its {name} has shape {shape}, and {type(model).__name__} has {has}"
                )
    foreign = next((circuit.model for circuit in circuits if circuit.model not in ("", own)), None)
    if foreign is not None:
        warnings.warn(
            f"the circuit was found in {foreign} and is evaluated in {own}: what it does not name is never ablated",
            stacklevel=4,
        )


def _circuits(
    circuit: Ranking | Circuit | Sequence[Circuit], sizes: Sequence[int | float]
) -> tuple[list[Circuit], str]:
    if isinstance(circuit, Ranking):
        if not sizes:
            raise ValueError("sizes is empty: give at least one size of circuits")
        return [circuit.at(size) for size in sizes], circuit.order
    circuits = [circuit] if isinstance(circuit, Circuit) else list(circuit)
    if not circuits:
        raise ValueError("there is no circuit to evaluate")
    return circuits, "given"


def _scores(model: nn.Module, circuits: Sequence[Circuit], task: Task, ablation: str, batch_size: int) -> Scores:
    """Metric -> mean over samples ``[2 + circuits]`` of the full model, the empty circuit and each circuit."""
    first = circuits[0]
    if first.granularity == "weight" and ablation != "zero":
        raise ValueError(f"weights have no activations to replace: ablation must be 'zero', got {ablation!r}")
    batches = task.batches(batch_size)
    reference = reference_for(model, first.sites, batches, ablation)
    empty = {group: torch.zeros_like(mask) for group, mask in first.kept.items()}
    sums = {name: torch.zeros(2 + len(circuits), dtype=torch.float64, device="cpu") for name in METRICS}
    for batch in batches:
        replacement = reference(batch)
        full = _logits(model, batch)
        nothing = _logits(model, batch, first, empty, replacement)
        rows = [full, nothing]
        for circuit in circuits:
            known = {circuit.total: full, 0: nothing}.get(circuit.size)
            rows.append(_logits(model, batch, circuit, circuit.kept, replacement) if known is None else known)
        for name in METRICS:
            for index, logits in enumerate(rows):
                sums[name][index] += float(batch_metric(name, logits, batch, full).double().sum())
    return {name: values / len(task) for name, values in sums.items()}


def _logits(
    model: nn.Module,
    batch: Batch,
    circuit: Circuit | None = None,
    kept: Mapping[str, Tensor] | None = None,
    replacement: Reference | None = None,
) -> Tensor:
    """The model's logits ``[samples, vocabulary]`` with all ablated that is not kept."""
    with passing(model):
        if circuit is None or kept is None:
            return answer_logits(model, batch)
        ablated: AbstractContextManager[None]
        if circuit.granularity == "weight":
            ablated = weights_zeroed(model, kept)
        else:
            ablated = gating(model, circuit.sites, kept, replacement)
        with ablated:
            return answer_logits(model, batch)
