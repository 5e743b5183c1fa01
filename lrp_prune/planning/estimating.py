"""What collecting and pruning take in each process, part by part."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lrp_prune.arguments import check_flag, check_integer, check_number, check_patterns
from lrp_prune.attribution.candidates import candidates
from lrp_prune.models.batches import tensors
from lrp_prune.models.subject import subject_of
from lrp_prune.names import named_parameters
from lrp_prune.planning.compensation import CompensationPlan, planned
from lrp_prune.planning.dry_run import Collecting, Comparing, held_by_a_forward, is_shape, kept_by_a_forward
from lrp_prune.pruning.compensation import Compensation, compensation_of
from lrp_prune.pruning.fitting import ENTRIES
from lrp_prune.pruning.methods import Method, collected_by, method_of
from lrp_prune.pruning.prune import gains_by_a_second_round
from lrp_prune.pruning.recalibration import LOOKED_AT, STRENGTHS, parts_of_reference
from lrp_prune.pruning.scope import settled
from lrp_prune.relevance import granularities_of
from lrp_prune.relevance.statistics import statistic_of
from lrp_prune.selection.scopes import check_sparsity

OPTIMIZERS: dict[str, float] = {"adamw": 2, "adam": 2, "momentum": 1, "sgd": 0, "none": 0}
"""Tensors of a parameter's size that an optimizer keeps for it."""

Strategy = Literal["ddp", "fsdp"]
_LOGIT_BLOCK = 4 * 2**20  # bytes of logits that are worked on at a time
_SUM = 4  # bytes of a sum: relevance is accumulated in float32
_MOMENT = 8  # bytes of an entry that moments are made of: float64
_CHECKED, _COMPARED = 3.25, 7  # times the logits, for what is made of them


@dataclass(frozen=True)
class Estimate:
    """Bytes in one process; see :func:`estimate`."""

    weights: int
    """Parameters and buffers."""
    gradients: int
    """Of the trainable parameters."""
    optimizer: int
    """Moments of the trainable parameters."""
    relevance: int
    """Sums of relevance, from the first batch of a collection until masks are selected."""
    masks: int
    """Masks that keep zeros through the training: a byte for each entry of the pruned tensors."""
    activations: int
    """What the forward keeps for the backward pass, logits included; 0 if no batch was given."""
    temporary: int
    """The largest temporary of a collection: one module's whole weights and sums where they are sharded, the operands
    and the result of the largest contraction, or the gradient of the logits."""
    host: int
    """On the host: packed masks, relevance that is accumulated there, and what :func:`~lrp_prune.prune` keeps of a model that it
    recalibrates until it returns, to put it back: all of it where there are two rounds by default, else what is scaled."""
    recalibration: int
    """What recalibration keeps: the values that the masks zero, outputs of the dense model, and what a forward holds over as
    many batches as are run as one; where weights are sharded, one module's whole ones. Without a batch, the rest."""
    recalibration_passes: int
    """Forward passes over a batch that recalibration takes (and no backward pass); a collection takes one of each a batch."""
    compensation: int = 0
    """What compensation takes in place of recalibration, if it was asked for: a stage's dense weights, one group's Gram matrices,
    and what a forward holds or a solution takes; where weights are sharded, one module's whole ones, and a layer's; what stages
    gave to reference batches is on the :attr:`host`."""

    @property
    def collecting(self) -> int:
        """The peak while relevance is collected from a model that is not being trained."""
        return self.weights + self.relevance + self.activations + self.temporary

    @property
    def recalibrating(self) -> int:
        """The peak while a model is recalibrated that is not being trained."""
        return self.weights + self.recalibration

    @property
    def compensating(self) -> int:
        """The peak while a model is compensated that is not being trained."""
        return self.weights + self.compensation

    @property
    def training(self) -> int:
        """The peak of a training with kept zeros and with collections between its steps."""
        training = self.weights + self.gradients + self.optimizer + self.masks
        return training + self.activations + self.relevance + self.temporary

    def __str__(self) -> str:
        names = ("weights", "gradients", "optimizer", "relevance", "masks", "activations", "temporary")
        kept = ("compensation", "compensating") if self.compensation else ("recalibration", "recalibrating")
        shown = (*names, kept[0], "collecting", kept[1], "training", "host")
        rows = [f"{name:13} {_readable(getattr(self, name)):>10}" for name in shown]
        passes = f"recalibration takes {self.recalibration_passes} forward passes"
        return "\n".join(rows if self.compensation else [*rows, passes])


def estimate(
    model: Any,
    world_size: int = 1,
    *,
    strategy: Strategy = "fsdp",
    batch: Any = None,
    optimizer: str | float = "adamw",
    dtype: torch.dtype | None = None,
    method: str | Method = "lrp",
    granularity: str = "weight",
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
    trainable_only: bool = False,
    accumulate_on: str | None = None,
    sparsity: float = 0.5,
    batches: int = LOOKED_AT,
    compensation: str | Compensation | None = None,
) -> Estimate:
    r"""Bytes that collecting relevance and pruning take in each of ``world_size`` processes.

    Nothing is loaded or computed: sizes are taken from the shapes of the parameters, activations from a forward without
    data. With :math:`n` weights of :math:`b` bytes, :math:`s` of them scored, on :math:`p` processes, relevance takes
    :math:`4 s / p` bytes, masks :math:`s / p`, weights :math:`b n / p` (``fsdp``; with ``ddp`` nothing is divided).

    Args:
        model: a module, on any device (``meta`` as well), or a Hugging Face configuration, of which the causal language
            model (or the class that it names) is taken.
        world_size: number of processes.
        strategy: ``"fsdp"`` divides weights, gradients, optimizer, relevance and masks; ``"ddp"`` nothing.
        batch: one process's batch, as the model takes it, or ``(samples, tokens)`` of token ids; None leaves
            activations out.
        optimizer: ``"adamw"``, ``"adam"``, ``"momentum"``, ``"sgd"``, ``"none"``, or the number of tensors of a
            parameter's size that it keeps.
        dtype: of the weights; None for the model's (a configuration's) own.
        method: by which, see :func:`lrp_prune.prune`; one that collects nothing holds its scores alone.
        granularity: what is scored; the sums of units are negligible.
        include, exclude, trainable_only, accumulate_on: as for :func:`lrp_prune.prune`.
        sparsity: to which is pruned; only what recalibration keeps depends on it.
        batches: how many reference batches a process has, of which recalibration looks at no more than the first 16 (of as many
            samples, at 256 of them), and compensation at all.
        compensation: as for :func:`lrp_prune.prune`, in place of recalibration; it takes a batch.

    Raises:
        ValueError: for an argument that is not possible, or a model that cannot be run without data; for a compensation without a
            batch.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(1024, 1024), torch.nn.ReLU(), torch.nn.Linear(1024, 10))
        >>> plan = estimate(model, world_size=4)
        >>> plan.weights, plan.relevance, plan.masks
        (1061900, 1077248, 265216)
    """
    states = _checked(world_size, strategy, optimizer, dtype, accumulate_on, batches)
    way = _checked_compensation(compensation, batch)
    method, kinds = method_of(method), granularities_of(granularity)
    collected = collected_by(method, kinds)
    check_sparsity(sparsity)
    check_patterns("include", include)
    check_patterns("exclude", exclude)
    check_flag("trainable_only", trainable_only)
    module = subject_of(model).module if isinstance(model, nn.Module) else _from_configuration(model, dtype)
    parts = world_size if strategy == "fsdp" else 1
    parameters = named_parameters(module)
    scored = candidates(module, include, exclude, trainable_only, granularity == "embedding")
    whole = granularity == "weight"

    def part(parameter: Tensor) -> int:
        """Entries here: a slice along the first dimension."""
        if parameter.dim() == 0:
            return 1
        return -(-parameter.shape[0] // parts) * math.prod(parameter.shape[1:])

    def size(parameter: Tensor) -> int:
        kept = dtype if dtype is not None and parameter.is_floating_point() else parameter.dtype
        return kept.itemsize

    weights = sum(part(entry) * size(entry) for entry in parameters.values())
    weights += sum(buffer.numel() * size(buffer) for buffer in module.buffers())
    scaled = sum(part(entry) * size(entry) for entry in {*scored.values(), *_vectors(module)})
    trainable = sum(part(entry) * size(entry) for entry in parameters.values() if entry.requires_grad)
    inputs = 2 if collected is not None and statistic_of(collected.statistic).contributing else 0
    sums = sum(_SUM * (part(entry) + inputs * _inputs(entry)) for entry in scored.values()) if whole else 0
    masks = sum(part(entry) for entry in scored.values())
    options = {"granularity": granularity, "include": include, "exclude": exclude, "trainable_only": trainable_only}
    activations = temporary = 0
    if collected is not None:
        forward = Collecting(module, collected, options)
        activations, temporary = _collected(forward, scored if whole else {}, batch, dtype, size)
    passes, fitted = _passes(min(batches, LOOKED_AT))
    zeroed = round(sparsity * sum(part(entry) * size(entry) for entry in scored.values()))
    compares = batch is not None and way is None
    compared = _compared(Comparing(module, set(scored)), batch, dtype, fitted) if compares else 0
    if parts > 1:
        compared += _one_module(module, {}, size)
        temporary += _one_module(module, scored if whole else {}, size)
    plan = CompensationPlan(0, 0) if way is None else planned(module, scored, batch, dtype, way, batches)
    again = gains_by_a_second_round(kinds, settled(None, method, kinds), sparsity)
    on_host = accumulate_on is not None and torch.device(accumulate_on).type == "cpu"
    return Estimate(
        weights=weights,
        gradients=trainable,
        optimizer=round(states * trainable),
        relevance=0 if on_host else sums,
        masks=masks,
        activations=activations,
        temporary=temporary,
        host=-(-masks // 8) + (sums if on_host else 0) + (weights if again else scaled) + plan.host,
        recalibration=zeroed + compared if way is None else 0,
        recalibration_passes=passes if way is None else 0,
        compensation=plan.device + (_gathered(module, scored, size) if way is not None and parts > 1 else 0),
    )


def _vectors(module: nn.Module) -> list[Tensor]:
    """Biases, and statistics of normalizations, which are scaled beside the weights."""
    return [entry for entry in (*named_parameters(module).values(), *module.buffers()) if entry.dim() == 1]


def _checked_compensation(compensation: Any, batch: Any) -> Compensation | None:
    way = compensation_of(compensation)
    if way is not None and batch is None:
        raise ValueError("what compensation takes depends on the reference batches: pass batch=, or compensation=None")
    return way


def _checked(world_size: Any, strategy: Any, optimizer: Any, dtype: Any, accumulate_on: Any, batches: Any) -> float:
    """Refuse arguments that are not possible; how many tensors of a parameter's size the optimizer keeps."""
    check_integer("world_size", world_size, 1)
    check_integer("batches", batches, 1)
    if strategy not in ("ddp", "fsdp"):
        raise ValueError(f"strategy must be 'ddp' or 'fsdp', got {strategy!r}")
    if dtype is not None and not isinstance(dtype, torch.dtype):
        raise ValueError(f"dtype must be None or a torch.dtype such as torch.bfloat16, got {dtype!r}")
    if accumulate_on is not None:
        try:
            torch.device(accumulate_on)
        except (RuntimeError, TypeError) as error:
            raise ValueError(f"accumulate_on must be None or name a device, got {accumulate_on!r}") from error
    if isinstance(optimizer, str) and optimizer in OPTIMIZERS:
        return OPTIMIZERS[optimizer]
    if isinstance(optimizer, str):
        raise ValueError(f"optimizer must be one of {tuple(OPTIMIZERS)} or a number of tensors, got {optimizer!r}")
    return check_number("optimizer (tensors that it keeps)", optimizer, "[0, inf)")


def _passes(batches: int) -> tuple[int, int]:
    """How many forward passes recalibration takes, and how many batches it fits scales to."""
    fitted, judged = (len(part) for part in parts_of_reference(list(range(batches))))
    one_to_measure = 1
    whether_together = 4 if fitted > 1 else 0  # two batches alone, and as one
    return one_to_measure + whether_together + fitted * (1 + len(STRENGTHS)) + judged * (2 + len(STRENGTHS)), fitted


def _collected(
    runner: Collecting,
    scored: Mapping[str, Tensor],
    batch: Any,
    dtype: torch.dtype | None,
    size: Callable[[Tensor], int],
) -> tuple[int, int]:
    """Bytes that a forward holds for a backward pass, and that this takes at a time; of what looks at forwards alone at most."""
    propagates = statistic_of(runner.collected.statistic).backward_needed
    activations = logits = 0
    if batch is not None:
        activations, logits = (kept_by_a_forward if propagates else held_by_a_forward)(runner, batch, dtype)
        if not propagates:
            return activations, 0
    gradient = logits + min(2 * logits, _LOGIT_BLOCK) if logits else 0
    return activations, max(gradient, _contraction(scored, batch, size))


def _compared(runner: "Comparing", batch: Any, dtype: torch.dtype | None, fitted: int) -> int:
    """Bytes that are kept of the dense model's outputs, and held by a forward, over so many batches as are run as one."""
    held, logits = held_by_a_forward(runner, batch, dtype)
    together = max(1, min(fitted, ENTRIES // max(runner.entries, 1)))
    # Beside its own a forward has the dense logits, and outputs of a layer and of the dense one in float64; logits are checked
    # before that, and those of one batch are compared as distributions.
    fitting = max(held + 2 * _MOMENT * runner.largest + logits, math.ceil(_CHECKED * logits))
    return max(together * (runner.bytes + fitting), runner.bytes + _COMPARED * logits)


def _from_configuration(configuration: Any, dtype: torch.dtype | None) -> nn.Module:
    if not hasattr(configuration, "model_type"):
        raise ValueError(f"model must be a module or a Hugging Face configuration, got {type(configuration).__name__}")
    import transformers

    named = [getattr(transformers, name, None) for name in getattr(configuration, "architectures", None) or ()]
    kind = next((found for found in named if found is not None), None)
    with torch.device("meta"):
        if kind is not None:
            made: nn.Module = kind._from_config(configuration, dtype=dtype)
        else:
            made = transformers.AutoModelForCausalLM.from_config(configuration, dtype=dtype)
    return made


def _inputs(parameter: Tensor) -> int:
    """Entries of what is kept of a weight's inputs: their energy, and the mean weight for each."""
    return int(parameter.shape[-1])


def _tokens(batch: Any) -> int:
    if batch is None:
        return 0
    if is_shape(batch):
        return math.prod(batch)
    ids = batch.get("input_ids") if isinstance(batch, Mapping) else None
    first = ids if isinstance(ids, Tensor) else next(iter(tensors(batch)), None)
    return 0 if first is None else first.numel() if ids is not None else int(first.shape[0])


def _contraction(scored: Mapping[str, Tensor], batch: Any, size: Callable[[Tensor], int]) -> int:
    """The largest product of activations and gradients: its operands in half precision, and its result in both."""
    tokens = _tokens(batch)
    return max(
        (
            (2 + _SUM) * entry.numel() + 2 * tokens * sum(entry.shape[-2:]) + size(entry) * tokens * max(entry.shape)
            for entry in scored.values()
        ),
        default=0,
    )


def _gathered(module: nn.Module, scored: Mapping[str, Tensor], size: Callable[[Tensor], int]) -> int:
    """What compensation holds of divided weights: a module in a forward; and a layer as it is, as it was, and what is kept."""
    return _one_module(module, {}, size) + max(
        ((2 * size(entry) + 1) * entry.numel() for entry in scored.values()), default=0
    )


def _one_module(module: nn.Module, scored: Mapping[str, Tensor], size: Callable[[Tensor], int]) -> int:
    """What one module holds while it is whole: its weights, those of the next that are fetched meanwhile, and its sums."""
    layers = [
        child for entry in module.modules() if isinstance(entry, nn.ModuleList | nn.Sequential) for child in entry
    ]
    chosen = {id(parameter) for parameter in scored.values()}

    def held(layer: nn.Module) -> int:
        entries = list(layer.parameters())
        sums = sum(_SUM * entry.numel() for entry in entries if id(entry) in chosen)
        return sum(2 * size(entry) * entry.numel() for entry in entries) + 2 * sums  # sums are copied to be divided

    return max(map(held, layers), default=0)


def _readable(size: int) -> str:
    for unit, factor in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if size >= factor:
            return f"{size / factor:.1f} {unit}"
    return f"{size} B"
