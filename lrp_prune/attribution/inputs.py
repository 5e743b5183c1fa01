"""Relevance of what a model is given: of the tokens, pixels and features of one batch."""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lrp_prune.attribution.conditional import Condition
from lrp_prune.engine.composites import Composite, composite_of
from lrp_prune.engine.forms import Convolution
from lrp_prune.engine.propagation import propagating
from lrp_prune.engine.unaltered import unaltered
from lrp_prune.engine.uses import Observer, Use, WeightUses
from lrp_prune.models.backends import experts_apart
from lrp_prune.models.batches import entry, fields, samples_in, to_device
from lrp_prune.models.calling import call_of
from lrp_prune.models.padding import attended_labels, counted_tokens
from lrp_prune.models.profile import parameters_of, profile_of
from lrp_prune.models.states import eager, unchanged_state
from lrp_prune.models.subject import subject_of
from lrp_prune.targets import Target, check_suits, checked, explaining, predicted, values_of
from lrp_prune.targets.tokens import labelled

_NOT_TOKENS = ("position", "token_type", "segment", "label")
"""Parts of names of integers that are looked up and are no tokens."""


@dataclass(frozen=True)
class InputRelevance:
    """The relevance of what one batch gave to a model.

    Args:
        inputs: name of the forward's argument -> relevance: of token ids ``[samples, tokens]`` (``[samples, choices, tokens]``
            where there are several texts to choose from), summed over their embeddings; of floating-point inputs in their own
            shape.
        given: the arguments themselves, under the same names.
        elsewhere: what went to other roots, summed: learned positions, class tokens, constants.
        latent: module -> relevance of its output, in its shape.
        values: the explained value of each sample ``[samples]``, or where the target knows the sum only, that: ``[1]``; of units
            that relevance is propagated through, theirs.
        target: what is explained.
        channels: which dimension of a floating-point input has the channels that convolutions go over, of those that any reads.
    """

    inputs: dict[str, Tensor]
    given: dict[str, Tensor]
    elsewhere: dict[str, float]
    latent: dict[str, Tensor]
    values: Tensor
    target: Target
    channels: dict[str, int]


class _Convolved:
    """Notes what convolutions go over, to tell an input's channels from its steps."""

    backward_needed = False
    operand_dtype: torch.dtype | None = None
    propagated_dtype: torch.dtype | None = None

    def __init__(self) -> None:
        self._seen: list[tuple[torch.Size, tuple[int, ...]]] = []

    def of(self, use: Use) -> list[Observer]:
        """Itself, for convolutions of batches."""
        found = isinstance(use.form, Convolution) and not use.constant
        return [self] if found else []

    def forward(self, use: Use, activation: Tensor) -> None:
        if activation.dim() == use.weight.dim():
            self._seen.append((activation.shape, activation.stride()))

    def backward(self, use: Use, activation: Tensor, d: Tensor, input_gradient: Tensor) -> None: ...

    def channels(self, value: Tensor) -> int | None:
        """The dimension of an input that the first convolution of its shape, also turned, takes for its channels."""
        axes = list(zip(value.shape, value.stride(), strict=True))
        for shape, strides in self._seen:
            if sorted(axes) == sorted(zip(shape, strides, strict=True)):
                return axes.index((shape[1], strides[1]))
            if shape == value.shape:
                return 1
        return None


def input_relevance(
    model: nn.Module,
    batch: Any,
    target: Any = None,
    composite: str | Composite = "attnlrp",
    latent: Sequence[str] | None = None,
    unruled: str = "warn",
    through: Mapping[str, Sequence[int]] | None = None,
    granularity: str = "neuron",
) -> InputRelevance:
    """Relevance of each input of a model for one batch, in one forward and backward pass; nothing of the model changes.

    Args:
        model: any module, or a ``LightningModule``.
        batch: as :func:`lrp_prune.attribute` takes it; labels are not needed.
        target: what is explained, as in :func:`lrp_prune.explain`.
        composite: the rules.
        latent: patterns of modules whose outputs' relevance is wanted too.
        unruled: what to do about operations without a rule.
        through: units, by whose relevance it is propagated from there on: group -> places; None for all paths.
        granularity: of these units.

    Raises:
        KeyError: for units that there are not.
        ValueError: if the target does not fit, the batch has no samples, the model has no input that relevance can end at, or a
            pattern of latent modules none that returns an activation.
        FloatingPointError: if the explained value or a relevance is not finite.

    Example:
        >>> import torch
        >>> found = input_relevance(nn.Linear(3, 2, bias=False), torch.ones(1, 3))
        >>> bool(torch.isclose(found.inputs["input"].sum(), found.values.sum()))
        True
    """
    subject = subject_of(model)
    module = subject.module
    check_samples(batch)
    with unaltered(module), labelled():
        batch = on_device_of(module, batch)
        found = target_for(module, batch, target, subject.own_target)
        rules = composite_of(composite)
        condition = None
        if through is not None:
            explained = partial(values_of, found, module, batch)
            condition = Condition(module, explained, rules, through, granularity, unruled)
            unruled = "ignore"  # it was told of all that the value depends on
        convolved = _Convolved()
        uses = WeightUses(convolved.of) if condition is None else condition.uses
        as_before = nullcontext() if condition is None else experts_apart(module)
        with as_before, propagating(module, rules, latent, unruled, uses, constants=True) as propagation:
            values = values_of(found, module, batch)
            if condition is not None:
                values = condition.values(samples_in(batch))
            entries = propagation.entries(values.sum())
    _check_followed(latent, {root.name for root, _ in entries if root.latent})
    given = given_by_name(module, batch)
    lookups = [root.ids if root.parameter else None for root, _ in entries if not root.latent]
    names = iter(names_of_lookups(lookups, given))
    inputs, kept, elsewhere, layers = dict[str, Tensor](), dict[str, Tensor](), dict[str, float](), dict[str, Tensor]()
    for root, relevance in entries:
        relevance = relevance.detach()
        if root.latent:
            _add(layers, root.name, relevance)
            continue
        name = next(names)
        if name is not None:
            _add(inputs, name, relevance.sum(-1).reshape(given[name].shape))
            kept[name] = given[name]
        elif root.parameter is None and root.ids is None and not root.constant:
            _add(inputs, root.name, relevance)
            kept[root.name] = root.leaf.detach()
        else:
            elsewhere[root.name] = elsewhere.get(root.name, 0.0) + float(relevance.sum())
    if not inputs:
        raise ValueError(
            f"none of what {profile_of(module).name} is given has relevance of its own: it looks up no token ids of the batch, "
            f"and has no floating-point input; relevance ended at {', '.join(elsewhere) or 'nothing'}"
        )
    dims = {name: convolved.channels(value) for name, value in kept.items() if value.is_floating_point()}
    channels = {name: dim for name, dim in dims.items() if dim is not None}
    return InputRelevance(inputs, kept, elsewhere, layers, values.detach(), found, channels)


def _check_followed(patterns: Sequence[str] | None, followed: set[str]) -> None:
    for pattern in patterns or ():
        if not any(fnmatchcase(name, pattern) for name in followed):
            raise ValueError(
                f"latent pattern {pattern!r} matches no module that has relevance by position: they do not run, or what they "
                "return first is no activation"
            )


def _add(to: dict[str, Tensor], name: str, relevance: Tensor) -> None:
    """Under a name of its own where one module, or argument, was met with another shape."""
    known = to.get(name)
    if known is not None and known.shape != relevance.shape:
        name = f"{name}#{sum(key.partition('#')[0] == name for key in to)}"
        known = None
    to[name] = relevance if known is None else known + relevance


def on_device_of(module: nn.Module, batch: Any) -> Any:
    """A batch where the model's first parameter is."""
    parameter = next(module.parameters(), None)
    return batch if parameter is None else to_device(batch, parameter.device)


def target_for(module: nn.Module, batch: Any, target: Any, own: Any = None) -> Target:
    """The target of an explanation: what was asked for, the model's own, or the logit of what it predicts.

    Raises:
        ValueError: for a target that is for other models.
    """
    found = explaining(target)
    if found is None and (target is not None or own is None):
        with unchanged_state(module), eager(module):
            return predicted(module, batch)
    found = checked(own if found is None else found)
    check_suits(found, module)
    return found


def collected_target(model: nn.Module, target: Any) -> Any:
    """What :func:`target_for` explains, as a target for all batches of a collection."""
    own = target is None and subject_of(model).own_target is not None
    return None if own else explaining(target) or "last_token"


def check_samples(batch: Any) -> None:
    """Refuse a batch without samples, of which there would be nothing to show.

    Raises:
        ValueError: likewise.
    """
    if not samples_in(batch):
        raise ValueError("the batch has no samples: relevance is of at least one")


def given_by_name(module: nn.Module, batch: Any) -> dict[str, Tensor]:
    """The tensors that a model's forward is given for a batch, by the names of its arguments."""
    try:
        call = call_of(module, batch)
    except ValueError:  # a target of one's own calls it in its own way
        return {name: value for name, value in (fields(batch) or {}).items() if isinstance(value, Tensor)}
    names = [name for name in parameters_of(module) if name != "self"]
    named = {names[index] if index < len(names) else str(index): value for index, value in enumerate(call.args)}
    return {name: value for name, value in {**named, **call.kwargs}.items() if isinstance(value, Tensor)}


def unpadded(module: nn.Module, batch: Any, skip_first: int = 0) -> dict[str, Tensor]:
    """Which positions of which arguments count, bool ``[samples, positions]``: those that are no padding.

    Args:
        module: what is run.
        batch: as it takes it.
        skip_first: how many tokens at the beginning of each sample of a causal language model do not count either.
    """
    encoder_decoder = profile_of(module).encoder_decoder
    mask = entry(batch, "attention_mask")
    if isinstance(mask, Tensor) and mask.dim() == 3:
        mask = mask.flatten(1)  # of texts to choose from, one after the other
    elif not encoder_decoder:
        mask = counted_tokens(module, batch, skip_first)
    found = {"input_ids": mask, "inputs_embeds": mask}
    if encoder_decoder:
        found["decoder_input_ids"] = attended_labels(module, batch)
    return {name: value != 0 for name, value in found.items() if isinstance(value, Tensor) and value.dim() == 2}


def names_of_lookups(lookups: Sequence[Tensor | None], given: Mapping[str, Tensor]) -> list[str | None]:
    """Which argument each lookup is of; None for positions and the like.

    It is of the argument whose ids are the same. Numbers that follow one another are positions, and no tokens that happen to have
    these ids, unless they are read from the argument's own memory, or nothing is (ids may have been copied to a device).

    Where two arguments are equal (an encoder and a decoder that read the same), each has its own lookup, in their order.
    """
    read = {
        name for name, value in given.items() if any(ids is not None and _same_memory(ids, value) for ids in lookups)
    }
    found: list[str | None] = []
    for ids in lookups:
        fitting = [
            name
            for name, value in given.items()
            if ids is not None
            and not value.is_floating_point()
            and (value.shape == ids.shape or (value.dim() == ids.dim() + 1 and value.flatten(0, 1).shape == ids.shape))
            and not any(part in name for part in _NOT_TOKENS)
            and (_same_memory(ids, value) or not (name in read and _is_counting(ids)))
            and bool((value.to(ids.device).reshape(ids.shape) == ids).all())
        ]
        found.append(next((name for name in fitting if name not in found), fitting[0] if fitting else None))
    return found


def _is_counting(ids: Tensor) -> bool:
    return ids.dim() > 0 and bool((ids.diff(dim=-1) == 1).all())


def _same_memory(one: Tensor, other: Tensor) -> bool:
    return one.device == other.device and one.data_ptr() == other.data_ptr() and one.data_ptr() != 0
