"""Sites: where in a model the units of a circuit are switched, found by tracing and not by the model's class.

The engine says which layers read the outputs of attention heads and which read hidden units (``relevance.members``). There
the *contribution* of a unit can be replaced without touching the residual stream: heads, attention neurons and MLP neurons
at the reading layer's input, that is before the output projection; blocks at its output.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lrp_prune.attribution.collect import attribute
from lrp_prune.attribution.observers import NothingScoredError
from lrp_prune.models.backends import traceable_attention
from lrp_prune.models.batches import entry
from lrp_prune.models.states import eager, undisturbed
from lrp_prune.models.subject import forwarded
from lrp_prune.names import matches, named_modules, named_parameters
from lrp_prune.relevance import Relevance
from lrp_prune.relevance.members import Member

NODE_KINDS: tuple[str, ...] = ("attention_block", "mlp_block", "head", "attention_neuron", "mlp_neuron")
"""The kinds of units, from coarse to fine."""
NODE_GRANULARITIES: dict[str, tuple[str, ...]] = {
    "neuron": ("mlp_neuron",),
    "block": ("attention_block", "mlp_block"),
    **{kind: (kind,) for kind in NODE_KINDS},
}
"""What one may ask for: a kind of units, or a word for one or two kinds."""
PARENTS: dict[str, tuple[str, ...]] = {
    "head": ("attention_block",),
    "attention_neuron": ("attention_block", "head"),
    "mlp_neuron": ("mlp_block",),
}
"""The kinds that contain a unit at the same layer: a unit acts only where all that contain it do."""
NOT_ALIGNED = (
    "{name} does not run on the same positions each time, as layers of routed experts do: what its units do in one prompt "
    "cannot be compared with another. Leave it out by exclude=['{name}'], or take granularity 'weight'"
)
"""Said of modules whose units cannot be replaced or counted position by position."""


@dataclass(frozen=True)
class Site:
    """The units of one kind at one layer.

    Args:
        kind: one of :data:`NODE_KINDS`.
        module: canonical name of the layer that reads the units (of a block: that writes its output).
        units: how many there are.
        width: channels of the layer's input that each of them has; 0 for blocks.
        members: which entries of which parameters they own.
        shapes: the shapes of those parameters.
    """

    kind: str
    module: str
    units: int
    width: int
    members: tuple[Member, ...]
    shapes: tuple[tuple[str, tuple[int, ...]], ...]

    @property
    def name(self) -> str:
        """The name of the group of units: kind and module."""
        return f"{self.kind}:{self.module}"

    @property
    def at_output(self) -> bool:
        """Whether the units are switched at the layer's output."""
        return self.kind.endswith("_block")


@contextmanager
def passing(model: nn.Module) -> Iterator[None]:
    """A forward that changes nothing: evaluation mode, no random numbers used up, no gradient unless enabled inside."""
    with (
        torch.inference_mode(False),
        torch.no_grad(),
        undisturbed(model),
        traceable_attention(model),
        eager(model),
    ):
        yield


def kinds_of(granularities: str | Sequence[str]) -> tuple[str, ...]:
    """The kinds of units that one or several words stand for.

    Raises:
        ValueError: for an unknown word.

    Example:
        >>> kinds_of("block"), kinds_of(["head", "neuron"])
        (('attention_block', 'mlp_block'), ('head', 'mlp_neuron'))
    """
    words = [granularities] if isinstance(granularities, str) else list(granularities)
    for word in words:
        if word not in NODE_GRANULARITIES:
            raise ValueError(f"granularity must be 'weight' or one of {tuple(NODE_GRANULARITIES)}, got {word!r}")
    chosen = {kind for word in words for kind in NODE_GRANULARITIES[word]}
    return tuple(kind for kind in NODE_KINDS if kind in chosen)


def find_sites(
    model: nn.Module,
    batch: Any,
    granularities: str | Sequence[str],
    target: Callable[[nn.Module, Any], Tensor],
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
) -> tuple[Site, ...]:
    """The model's sites of some kinds, in the order in which they run.

    Args:
        model: any module that the engine can trace.
        batch: one batch, small is best: the model runs on it twice.
        granularities: see :func:`kinds_of`.
        target: a scalar to propagate from; layers that it does not depend on are not found.
        include: patterns of module names to take instead of all.
        exclude: patterns of module names to leave out.

    Raises:
        ValueError: if there is no such unit (experts with stacked weights have none), or a layer is not called as a module or
            has its channels not last.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> (site,) = find_sites(model, torch.ones(1, 4), "neuron", lambda model, batch: model(batch).sum())
        >>> site.name, site.units, site.width
        ('mlp_neuron:2', 8, 1)
    """
    module = forwarded(model)
    kinds = kinds_of(granularities)
    traced: dict[str, Relevance | str] = {}
    stacked = _stacked(module)
    if {"attention_block", "head", "attention_neuron"} & set(kinds):
        traced["attention"] = _traced(module, batch, target, "head")
    if {"mlp_block", "mlp_neuron"} & set(kinds):
        traced["mlp"] = _traced(module, batch, target, "neuron", stacked)
    found = [
        site
        for part, relevance in traced.items()
        for site in _sites(module, relevance, part)
        if site.kind in kinds
        and (include is None or matches(site.module, include))
        and not matches(site.module, exclude)
    ]
    missing = [kind for kind in kinds if not any(site.kind == kind for site in found)]
    _tell_of_experts(
        [name for name in stacked if (include is None or matches(name, include)) and not matches(name, exclude)],
        kinds,
        missing,
    )
    if not found or (missing and include is None and exclude is None):
        why = "".join(f": {reason}" for reason in traced.values() if isinstance(reason, str))
        raise ValueError(
            f"{type(module).__name__} has no {(missing or list(kinds))[0]} that the target depends on{why}"
        )
    order = _order_of_calls(module, batch, target, {site.module for site in found})
    return tuple(sorted(found, key=lambda site: (order.index(site.module), NODE_KINDS.index(site.kind))))


def _stacked(model: nn.Module) -> list[str]:
    """Weights of several layers, as those of experts, whose units are told of here and not by the trace."""
    filters = {id(module.weight) for module in model.modules() if isinstance(module, nn.modules.conv._ConvNd)}
    return [
        name
        for name, parameter in named_parameters(model).items()
        if parameter.dim() == 3 and id(parameter) not in filters
    ]


def _tell_of_experts(stacked: Sequence[str], kinds: Sequence[str], missing: Sequence[str]) -> None:
    """Experts whose weights are stacked have no units here: what is read by one expert is no module's whole input."""
    asked = [kind for kind in kinds if kind.startswith("mlp")]
    if not stacked or not asked:
        return
    what = f"{stacked[0]} holds the weights of several experts, whose {asked[-1].replace('_', ' ')}s are no units of circuits"
    if set(asked) & set(missing):
        raise ValueError(
            f"{what}: take granularities of attention ('head', 'attention_neuron', 'attention_block') or 'weight'"
        )
    warnings.warn(f"{what}: they are never ablated (exclude them by name to say so)", stacklevel=3)


def _traced(
    model: nn.Module,
    batch: Any,
    target: Callable[[nn.Module, Any], Tensor],
    granularity: str,
    stacked: Sequence[str] = (),
) -> Relevance | str:
    """Relevance of the units, or why none has any; raises where nothing at all has any."""
    try:
        # Under a composite with a rule for activations those of several operations are seen as one, as hidden units need.
        return attribute(
            model,
            [batch],
            target,
            "attnlrp",
            granularity=granularity,
            exclude=stacked or None,
            statistic="signed",
            unruled="ignore",
        )
    except NothingScoredError as error:
        return str(error)


def _sites(model: nn.Module, relevance: Relevance | str, part: str) -> list[Site]:
    if isinstance(relevance, str):
        return []
    sites, parameters, modules = [], named_parameters(model), named_modules(model)
    for group, values in relevance.items():
        reader, *producers = relevance.members[group]
        if group in parameters and group not in modules:
            raise ValueError(
                f"{group} is a parameter and no module of its own, so that its input cannot be replaced: hold it in a layer "
                f"(nn.Linear), or leave it out by exclude=[{group!r}]"
            )
        if reader.width is None or sum(member.parameter == reader.parameter for member in producers) or "(" in group:
            raise ValueError(
                f"the units that {group.partition('(')[0]} reads are not its input's channels in their order, or made by "
                f"several layers apart: leave it out by exclude=[{group.partition('(')[0]!r}]"
            )
        weight = parameters[reader.parameter]
        dim = weight.dim() - 1 if reader.dim is None else reader.dim
        whole = [Member(reader.parameter, torch.zeros((1,) * weight.dim(), device="cpu"))]
        bias = f"{group}.bias"
        if bias in parameters:
            whole.append(Member(bias, torch.zeros(1, device="cpu")))
        shapes = tuple(
            (name, tuple(parameters[name].shape))
            for name in dict.fromkeys(member.parameter for member in (*whole, reader, *producers))
        )
        units = values.numel()
        sites.append(Site(f"{part}_block", group, 1, 0, tuple(whole), shapes))
        if part == "mlp":
            sites.append(Site("mlp_neuron", group, units, reader.width, (reader, *producers), shapes))
        else:
            sites.append(Site("head", group, units, reader.width, (reader,), shapes))
            single = Member.of_slices(reader.parameter, weight.shape, dim, units * reader.width, reads=True)
            sites.append(Site("attention_neuron", group, units * reader.width, 1, (single,), shapes))
    return sites


def _order_of_calls(
    model: nn.Module, batch: Any, target: Callable[[nn.Module, Any], Tensor], names: set[str]
) -> list[str]:
    """The modules in the order of their first call, by one forward."""
    order: list[str] = []
    tokens = entry(batch, "input_ids")

    def noted(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            if isinstance(module, nn.modules.conv._ConvNd):
                raise ValueError(f"{name} is a convolution: circuits know units whose channels are the last dimension")
            if args and isinstance(args[0], Tensor) and tokens is not None:
                rows = args[0].shape[:-1]
                # Also flattened, or of one token of each sample.
                if len(rows) == 1 and rows[0] not in (tokens.numel(), len(tokens)):
                    raise ValueError(NOT_ALIGNED.format(name=name))
            if name not in order:
                order.append(name)

        return hook

    modules = named_modules(model)
    with passing(model):
        handles = [modules[name].register_forward_pre_hook(noted(name)) for name in names if name in modules]
        try:
            target(model, batch)
        finally:
            for handle in handles:
                handle.remove()
    absent = sorted(names - set(order))
    if absent:
        raise ValueError(
            f"{absent[0]} is used, but not called as a module, so that its input cannot be replaced: leave it out by "
            f"exclude={absent[:1]!r}"
        )
    return order
