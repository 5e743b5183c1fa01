"""``explain``: what of an input speaks for a prediction, as an object to look at."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lrp_prune.attribution.inputs import InputRelevance, input_relevance, unpadded
from lrp_prune.engine.composites import Composite, composite_of
from lrp_prune.models.batches import IGNORED, fields, label_name
from lrp_prune.models.profile import profile_of
from lrp_prune.models.subject import subject_of
from lrp_prune.targets import Logit, Target, describe, in_words
from lrp_prune.targets.tokens import answers_by_token, places_answered
from lrp_prune.visualization.explanation import Explanation
from lrp_prune.visualization.parts import Pixels, Tokens
from lrp_prune.visualization.subwords import labelled

log = logging.getLogger("lrp_prune")
_NAMED = 4
"""How many answers of a batch are named in words."""


def explain(
    model: nn.Module,
    inputs: Any,
    target: Any = None,
    *,
    composite: str | Composite = "attnlrp",
    tokenizer: Any = None,
    latent: Sequence[str] | None = None,
    features: Sequence[str] | None = None,
    unruled: str = "warn",
    through: Mapping[str, Sequence[int]] | None = None,
    granularity: str = "neuron",
) -> Explanation:
    """What of the input speaks for a prediction, and what against it: relevance of tokens, pixels or features, to look at.

    One forward and one backward pass for the whole batch, two of each with ``through=``; the model is as it was.

    Args:
        model: any module, or a ``LightningModule``.
        inputs: a batch as :func:`lrp_prune.attribute` takes it, without labels unless the target needs them; with a tokenizer
            also a text, or several. An encoder-decoder that is given no decoder's tokens is explained at the first that it says.
        target: None for the logit of what the model predicts (at the last token of a language model, at the last labelled or
            masked one of a masked language model or token classifier, which it has to be told, in the mean over pixels that have
            a class each); the id of a class or token,
            or one for each sample; a target as in :func:`lrp_prune.attribute`, such as
            :class:`~lrp_prune.targets.LogitDifference`.
        composite: the rules: ``"attnlrp"``, ``"cp_lrp"``, ``"epsilon_gamma"`` for convolutional networks, ...
        tokenizer: of transformers, for texts, and for what tokens are called; without it they are called by their ids.
        latent: patterns of modules whose outputs' relevance is kept by position, for
            :meth:`~lrp_prune.Explanation.plot_layers`.
        features: what the entries of floating-point inputs ``[samples, features]``, or the steps of ``[samples, steps, ...]``
            (``[samples, channels, steps]`` where convolutions go over them), are called.
        unruled: what to do about operations without a rule: ``"warn"``, ``"error"`` or ``"ignore"``.
        through: group -> places of units, as in :func:`lrp_prune.top_samples`: what of the input speaks for the prediction by way
            of these units alone, which is what they stand for (conditional relevance, Achtibat et al. 2023). ``values`` are
            then the units' relevance, which the input's adds up to as far as the rules conserve.
        granularity: of these units, ``"neuron"`` or ``"head"``.

    Raises:
        KeyError: for units that the model does not have.
        ValueError: for texts without a tokenizer, a target that does not fit, or a model without inputs that relevance
            can end at.
        FloatingPointError: if the explained value or a relevance is not finite.

    Example:
        >>> import torch, lrp_prune
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> explanation = lrp_prune.explain(model, torch.randn(4, 3), features=["height", "width", "depth"])
        >>> [label for label, value in explanation.inputs["input"].of(0)]
        ['height', 'width', 'depth']
    """
    batch = _batch(model, inputs, tokenizer)
    rules = composite_of(composite)
    found = input_relevance(model, batch, target, rules, latent, unruled, through, granularity)
    module = subject_of(model).module
    shown = {name: mask.cpu() for name, mask in unpadded(module, batch).items()}
    given = {
        name: found.given[name].detach().to("cpu", copy=True) for name in found.inputs
    }  # the batch may be written to
    parts = {
        name: _part(name, *_laid_out(found, name, given[name]), shown.get(name), tokenizer, features)
        for name, relevance in found.inputs.items()
    }
    return Explanation(
        parts,
        found.values.float().cpu(),
        _in_words(module, found.target, tokenizer) + _place(module, found.target, batch) + _by_way_of(through),
        rules.name,
        found.elsewhere,
        _by_position(found),
    )


def _batch(model: nn.Module, inputs: Any, tokenizer: Any) -> Any:
    texts = [inputs] if isinstance(inputs, str) else inputs
    if isinstance(texts, list | tuple) and texts and all(isinstance(text, str) for text in texts):
        if tokenizer is None:
            raise ValueError("texts need tokenizer=, the one that the model was trained with")
        if len(texts) > 1 and tokenizer.pad_token_id is None:
            raise ValueError("several texts need a tokenizer with a pad_token: set tokenizer.pad_token, or explain one")
        inputs = dict(tokenizer(list(texts), return_tensors="pt", padding=len(texts) > 1))
    profile, named = profile_of(subject_of(model).module), fields(inputs)
    ids, masked = None if named is None else named.get("input_ids"), getattr(tokenizer, "mask_token_id", None)
    if answers_by_token(profile) and named is not None and label_name(named) is None and isinstance(ids, Tensor):
        return inputs if masked is None else {**named, "labels": ids.where(ids == masked, IGNORED)}
    if not profile.encoder_decoder or named is None or label_name(named) is not None:
        return inputs
    if any(name.startswith("decoder_input") for name in named):
        return inputs
    start = getattr(profile.config, "decoder_start_token_id", None)
    ids = named.get("input_ids")
    if start is None or not isinstance(ids, Tensor):
        raise ValueError(
            f"{profile.name} needs decoder_input_ids or labels in the batch: what its decoder has said before"
        )
    log.info("the first token that the decoder says is explained: give decoder_input_ids or labels for a later one")
    return {**named, "decoder_input_ids": ids.new_full((len(ids), 1), start)}


def _laid_out(found: InputRelevance, name: str, values: Tensor) -> tuple[Tensor, Tensor]:
    """Relevance and values with samples first, and then channels of images, or the steps that a convolution goes over."""
    relevance = found.inputs[name].float().cpu()
    if relevance.dim() < 2:  # one number for each sample, or one sample
        shape = (-1, 1) if found.values.numel() == relevance.numel() else (1, -1)
        return relevance.reshape(shape), values.reshape(shape)
    if not values.is_floating_point():  # of several texts to choose from they follow each other
        return relevance.flatten(1), values.flatten(1)
    channels = found.channels.get(name)
    if channels is None or relevance.dim() < 3:
        return relevance, values
    turned = relevance.movedim(channels, 1), values.movedim(channels, 1)
    return turned if relevance.dim() == 4 else (turned[0].transpose(1, 2), turned[1].transpose(1, 2))


def _part(
    name: str, relevance: Tensor, values: Tensor, shown: Tensor | None, tokenizer: Any, features: Sequence[str] | None
) -> Tokens | Pixels:
    if values.is_floating_point() and values.dim() == 4:
        return Pixels(relevance, values.float())
    rows = relevance if relevance.dim() == 2 else relevance.flatten(2).sum(-1)
    if shown is None or shown.shape != rows.shape:
        shown = torch.ones_like(rows, dtype=torch.bool)
    rows = rows.masked_fill(~shown, 0.0)
    positions = [row.nonzero()[:, 0].tolist() for row in shown]
    if not values.is_floating_point():
        named = [labelled(ids[places].tolist(), tokenizer) for ids, places in zip(values, positions, strict=True)]
        kind = "ids" if tokenizer is None else "tokens"
    else:
        kind = "features" if values.dim() == 2 else "steps"
        if features is not None and len(features) != rows.shape[1]:
            raise ValueError(f"features has {len(features)} names, and {name!r} has {rows.shape[1]} {kind}")
        names = [str(place) for place in range(rows.shape[1])] if features is None else list(features)
        named = [([names[place] for place in places], [True] * len(places)) for places in positions]
    labels, begins = (tuple(tuple(each[index]) for each in named) for index in (0, 1))
    return Tokens(rows, labels, tuple(map(tuple, positions)), begins, kind, values)  # type: ignore[arg-type]  # a pair by index


def _by_position(found: InputRelevance) -> Mapping[str, Tensor]:
    """Relevance of latent modules, summed over features; of images over channels and pixels of a row."""
    return {
        name: (values if values.dim() < 3 else values.flatten(2).sum(-1)).float().cpu()
        for name, values in found.latent.items()
    }


def _place(module: nn.Module, target: Target, batch: Any) -> str:
    """Where a model answers that does so at some of its tokens."""
    places = places_answered(module, batch) if isinstance(target, Logit) else None
    if places is None:
        return ""
    named = list(dict.fromkeys(places.tolist()))
    return f" at token {', '.join(map(str, named[:_NAMED]))}{', ...' if len(named) > _NAMED else ''}"


def _by_way_of(through: Mapping[str, Sequence[int]] | None) -> str:
    if through is None:
        return ""
    named = (f"{group}[{', '.join(map(str, places))}]" for group, places in through.items())
    return f" by way of {', '.join(named)}"


def _in_words(module: nn.Module, target: Target, tokenizer: Any) -> str:
    if not isinstance(target, Logit) or isinstance(target.answers, str):
        return in_words(describe(target))
    ids = torch.as_tensor(target.answers).reshape(-1).tolist()
    ids = ids[:1] if len(set(ids)) == 1 else ids
    more = f", ... ({len(ids)} samples)" if len(ids) > _NAMED else ""
    return f"the logit of {', '.join(_answer(module, number, tokenizer) for number in ids[:_NAMED])}{more}"


def _answer(module: nn.Module, number: int, tokenizer: Any) -> str:
    """What a class or a token is called: by the model's configuration, or by the tokenizer."""
    profile = profile_of(module)
    if profile.kind is not None and "language model" in profile.kind.task:
        return str(number) if tokenizer is None else repr(tokenizer.decode([number]))
    names = getattr(profile.config, "id2label", None) or {}
    name = str(names.get(number, number))
    return str(number) if name == f"LABEL_{number}" else name
