"""Masks of units made physical: smaller matrices that compute what the masked model computes."""

from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lrp_prune.adapters import adapted_layers
from lrp_prune.arguments import check_flag, check_integer
from lrp_prune.distributed.sharding import is_sharded
from lrp_prune.models.batches import check_batches
from lrp_prune.models.calling import run as run_plainly
from lrp_prune.models.profile import profile_of
from lrp_prune.models.subject import forwarded
from lrp_prune.models.wording import listed
from lrp_prune.names import class_name, named_modules, named_parameters, resolve
from lrp_prune.pruning.masking import fitting
from lrp_prune.pruning.masks import Masks
from lrp_prune.pruning.restoring import undone_on_error
from lrp_prune.pruning.zeroed import values_under
from lrp_prune.shrinking.configuration import configured
from lrp_prune.shrinking.heads import slices_of
from lrp_prune.shrinking.measuring import measured
from lrp_prune.shrinking.proof import Proof, Run, unrecorded
from lrp_prune.shrinking.removal import removal_of
from lrp_prune.shrinking.report import Layer, Shrunk, Totals
from lrp_prune.shrinking.taking import Taking
from lrp_prune.shrinking.units import Group, groups_of


@torch.inference_mode(False)  # where parameters would be none that anything could be trained with
def shrink(
    model: nn.Module,
    masks: Masks | None,
    batches: Iterable[Any],
    *,
    uniform: bool = False,
    multiple_of: int = 1,
    strict: bool = False,
    measure: int = 0,
    forward: Callable[[nn.Module, Any], Any] | None = None,
) -> Shrunk:
    r"""Take the units that masks prune out of a model, in place: its matrices get smaller, and so do its time and its memory.

    Units are those that :func:`lrp_prune.prune` prunes by ``granularity="neuron"`` (hidden neurons of a feed-forward part,
    filters of a convolution with bias and batch normalization) and ``"head"``. A unit goes if the masks leave nothing of it.
    What goes with it is known from where it was found: the rows and columns that belong to a unit are traced through the
    operations of a forward (residual sums, products, concatenation, ``flatten``, convolutions in groups), and the rows of
    query, key and value that a head is made by from its gradient. So neither ``torch.fx``, which many models cannot be traced
    by, nor ``torch-pruning``'s graph of dependencies, which has to be told about parameters outside of layers and heads of each
    architecture, is needed, and what goes is what the masks are about.

    That nothing else changed is shown before it returns: the outputs of the smaller model for ``batches`` are those of the
    masked one to rounding (:func:`~lrp_prune.shrinking.proof.tolerance_for`). What would break that stays, as zeros, and is
    told by name; so is what has no shape without it:

    * heads that share a key (grouped-query attention) go when all that share it go, or as many of each such set;
    * of a convolution in groups whole groups go, or as many channels of each;
    * of heads that share position biases with those of other layers those go that are dead in all of these layers;
    * of each layer one unit stays.

    Numbers that modules hold about their sizes are set with them: those of torch's layers by what they mean, others where they
    equal a size that changes, if the outputs are right then. Parameters are new objects: make the optimizer afterwards.

    Args:
        model: a Hugging Face model, any ``nn.Module``, or a ``LightningModule``.
        masks: of neurons, filters or heads, which are applied first; None: what is zero in the model counts as pruned.
        batches: reference samples that the model is run on, see :func:`lrp_prune.attribute`; texts of several tokens.
        uniform: take the same number of units out of each layer of a kind: as few as of the one that loses fewest. So a
            configuration can say it, which then does, and plain ``from_pretrained`` loads what ``save_pretrained`` writes.
        multiple_of: leave a multiple of this number of neurons in each layer, some of them as zeros: a matrix whose rows are a
            multiple of 16 is faster than a slightly smaller one. Heads are not counted.
        strict: raise an error, and change nothing, if a unit that masks prune cannot go.
        measure: how often the masked and the smaller model are run, in turn, to measure time and memory; 0: not at all.
        forward: how the model is run on a batch, ``forward(model, batch)``; None: as for :func:`lrp_prune.attribute`.

    Returns:
        What went, what did not and why, sizes before and after: a :class:`Shrunk`, which also saves the model.

    Raises:
        ValueError: if nothing of what the masks prune is a whole unit, none of these can go, or ``strict`` and not all can; for
            models that are divided among processes, wrapped by ``DistributedDataParallel``, quantized, or with adapters or
            patches, or that put out something else for the same batch each time; for masks of other shapes than the
            parameters. Nothing has changed then.
        RuntimeError: if the outputs for the first batch are right, and those for others are not. Nothing has changed then.
        KeyError: if the model has not all parameters that the masks are about.

    Example:
        >>> import torch, lrp_prune
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)).eval()
        >>> batches = [(torch.randn(16, 4), torch.randint(2, (16,)))]
        >>> masks = lrp_prune.prune(model, batches, 0.5, granularity="neuron", progress=False)
        >>> print(lrp_prune.shrink(model, masks, batches))
        4 of 8 neurons taken out; 58 -> 30 parameters (1.93 times fewer), 232 B -> 120 B
          layers   units   pruned   taken out
         ─────────────────────────────────────
          2            8        4           4
        >>> model
        Sequential(
          (0): Linear(in_features=4, out_features=4, bias=True)
          (1): ReLU()
          (2): Linear(in_features=4, out_features=2, bias=True)
        )
    """
    check_flag("uniform", uniform)
    check_flag("strict", strict)
    check_integer("multiple_of", multiple_of, 1)
    check_integer("measure", measure, 0)
    check_batches(batches)
    _check_possible(model)
    reference = list(batches)
    module, run = forwarded(model), forward or run_plainly
    with undone_on_error() as undo:
        if masks is not None:
            masks = fitting(masks, module)
            undo.append(values_under(module, masks))
            masks.apply_(module)
        proof = Proof(module, reference, run)
        dense_configuration = deepcopy(profile_of(module).config)
        taking = _taking(module, masks, proof, run, uniform, multiple_of)
        before = Totals.of(module)
        taking.take()
        layers = [_layer(taking, index) for index, group in enumerate(taking.removal.groups) if bool(group.dead.any())]
        _check_taken(module, layers, strict)
        difference = taking.finish(undo)
        speed = measured(module, taking.swaps, proof, run, measure) if measure else None
        configuration = configured(module, taking.sizes(), proof)
        undo.append(configuration.back)
        if configuration.made is not None:
            taking.settle(configuration.made, undo)
            proof.check(module, "with its configuration changed")
    return Shrunk(
        model=module,
        layers=layers,
        before=before,
        after=Totals.of(module),
        difference=difference,
        tolerance=proof.tolerance,
        numbers=taking.numbers(),
        dense_configuration=dense_configuration,
        configuration=configuration.told,
        loads_plainly=configuration.says_it,
        speed=speed,
    )


def _taking(module: nn.Module, masks: Masks | None, proof: Proof, run: Run, uniform: bool, multiple_of: int) -> Taking:
    """What could go, and how it can be tried."""
    groups = groups_of(module, proof.batches[0], run, _kept(module, masks))
    if not any(bool(group.dead.any()) for group in groups):
        which = "the masks prune is" if masks is not None else "is zero is"
        named = "" if masks is None else f" (their granularity is {masks.granularity!r})"
        raise ValueError(
            f"nothing that {which} a whole neuron, filter or head of {class_name(module)}{named}: single weights leave the "
            "matrices as large as they are. Prune with granularity='neuron' or 'head'"
        )
    heads = [group for group in groups if group.kind == "head" and bool(group.dead.any())]
    slices = {}
    if heads:
        proof.with_eager_attention(module)
        # All heads, also of layers that lose none: what is shared with these has to stay.
        with unrecorded(module):
            slices = slices_of(module, proof.batches[0], run, [group for group in groups if group.kind == "head"])
    parameters = named_parameters(module)
    owners = _owners(module)
    places = {name: owners[id(parameter)] for name, parameter in parameters.items()}
    first_owners = {name: found[0][0] for name, found in places.items()}
    removal = removal_of(groups, slices, parameters, first_owners, uniform, multiple_of)
    return Taking(module, removal, places, proof, named_modules(module), uniform)


def _kept(module: nn.Module, masks: Masks | None) -> Callable[[str], Tensor | None]:
    parameters = named_parameters(module)
    if masks is None:
        return lambda name: parameters[name].detach() != 0
    masks = masks.gathered() if masks.shardings else masks
    recorded = {id(parameter): name for name, parameter in resolve(masks, module).items()}
    whole: dict[str, Tensor] = {}

    def kept(name: str) -> Tensor | None:
        known = recorded.get(id(parameters[name]))
        if known is None:
            return None
        if known not in whole:
            whole[known] = masks[known]
        return whole[known]

    return kept


def _owners(module: nn.Module) -> Mapping[int, list[tuple[nn.Module, str]]]:
    """All places that hold a parameter, by its identity."""
    found: dict[int, list[tuple[nn.Module, str]]] = {}
    for each in module.modules():
        for name, parameter in each._parameters.items():
            if parameter is not None:
                found.setdefault(id(parameter), []).append((each, name))
    return found


def _check_possible(model: nn.Module) -> None:
    for part in model.modules():
        if isinstance(part, DistributedDataParallel):
            raise ValueError(
                "DistributedDataParallel has taken down the shapes of its parameters: shrink the model before it is wrapped"
            )
        if type(part).__name__ == "CorrectedModule":
            raise ValueError(
                "patches of a CorrectedModule name weights by their places, which would move: shrink the model before"
            )
    divided = [name for name, parameter in model.named_parameters() if is_sharded(parameter)]
    if divided:
        raise ValueError(
            f"{divided[0]} is divided among processes (fully_shard): save the whole model, and shrink it in one process"
        )
    adapted = list(adapted_layers(model))
    if adapted:
        raise ValueError(
            f"{listed(adapted, 2)} have adapters, which are as wide as the layers: merge them before "
            "(lrp_prune.merge_adapters(model, masks))"
        )
    typed = {name: parameter for name, parameter in model.named_parameters() if not parameter.is_floating_point()}
    for name in (name for name, parameter in typed.items() if parameter.is_complex()):
        raise ValueError(
            f"{name} is complex: what becomes of its channels is not followed, so that nothing can be taken out"
        )
    integers = list(typed)
    if integers:
        raise ValueError(
            f"{integers[0]} is quantized: its codes cannot be taken apart by rows. Shrink the model in a floating-point type, "
            "and quantize it then"
        )


def _layer(taking: Taking, index: int) -> Layer:
    group: Group = taking.removal.groups[index]
    gone = int(taking.removal.gone[index].sum())
    reasons = taking.removal.why.get(index, []) if gone < int(group.dead.sum()) else []
    return Layer(group.name, group.kind, len(group.dead), int(group.dead.sum()), gone, "; ".join(reasons))


def _check_taken(module: nn.Module, layers: Iterable[Layer], strict: bool) -> None:
    layers = list(layers)
    left = [layer for layer in layers if layer.taken < layer.pruned]
    if not any(layer.taken for layer in layers) or (strict and left):
        told = "; ".join(f"{layer.name}: {layer.why}" for layer in islice(left, 4))
        more = f"; and {len(left) - 4} more" if len(left) > 4 else ""
        none = "none of the units" if not strict or not any(layer.taken for layer in layers) else "not all units"
        raise ValueError(f"{none} that are pruned in {class_name(module)} can be taken out ({told}{more})")
