"""The hidden states from which a model predicts labelled tokens."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lrp_prune.correction.conditions.condition import first_tensor
from lrp_prune.effects.entries import measuring
from lrp_prune.models.batches import IGNORED
from lrp_prune.models.outputs import answer_of
from lrp_prune.names import named_modules


def module_at(model: nn.Module, name: str) -> nn.Module:
    """The module of a canonical name, also where the model is wrapped one attribute deeper, or less deep.

    Raises:
        KeyError: if there is none, or several.
    """
    modules = named_modules(model)
    if name in modules:
        return modules[name]
    deeper = [each for each in modules if each.endswith("." + name)]
    shorter = [each for each in modules if each and name.endswith("." + each)]
    found = deeper or [max(shorter, key=len)] if deeper or shorter else []
    if len(found) != 1:
        known = ", ".join([each for each in modules if each][:3])
        what = f"several modules {name!r}: {', '.join(found)}" if found else f"no module {name!r} (it has {known}, ...)"
        raise KeyError(f"{type(model).__name__} has {what}")
    return modules[found[0]]


def states_before(model: nn.Module, at: str, batches: Iterable[Mapping[str, Any]], name: str) -> Tensor:
    """What a module returned at the places from which labelled tokens are predicted, of all batches.

    Args:
        model: a causal language model.
        at: canonical name of the module.
        batches: mappings with ``input_ids`` and ``labels`` ``[samples, tokens]``, at the tokens' own places, and an
            ``attention_mask`` where tokens are padded.
        name: of the set, for errors.

    Returns:
        Float32 ``[places, width]``, on the CPU.

    Raises:
        ValueError: if nothing is labelled.
    """
    return joined([states_in(model, at, batch, name) for batch in batches], name)


def states_in(model: nn.Module, at: str, batch: Any, name: str) -> Tensor:
    """The same of one batch, which may have no labelled token.

    Raises:
        KeyError: if the model has no such module.
        ValueError: for a batch without labels, or a module whose output is not one state a token.
    """
    if not isinstance(batch, Mapping) or "labels" not in batch:
        what = f"has no 'labels' (it has {', '.join(batch)})" if isinstance(batch, Mapping) else "is no mapping"
        raise ValueError(
            f"a condition is learned at labelled tokens, and a batch of {name!r} {what}: give batches with 'input_ids' and "
            "'labels', -100 where the condition has nothing to learn"
        )
    module, kept = module_at(model, at), []

    def keep(_: nn.Module, __: Any, output: Any) -> None:
        kept.append(first_tensor(output).detach())

    handle = module.register_forward_hook(keep)
    try:
        with measuring(model):
            answer_of(model, {key: value for key, value in batch.items() if key != "labels"})
    finally:
        handle.remove()
    if len(kept) != 1:
        raise ValueError(
            f"{at!r} ran {len(kept)} times for a batch of {name!r}: a condition looks at a module that runs once"
        )
    labels = batch["labels"]
    if kept[0].shape[:2] != labels.shape:
        raise ValueError(f"{at!r} returned shape {tuple(kept[0].shape)} for labels {tuple(labels.shape)} of {name!r}")
    places = (labels[:, 1:] != IGNORED).to(kept[0].device)
    return kept[0][:, :-1][places].float().cpu()


def joined(found: Sequence[Tensor], name: str) -> Tensor:
    """The states of several batches.

    Raises:
        ValueError: if there are none.
    """
    if not sum(map(len, found)):
        raise ValueError(f"the set {name!r} has no labelled token: nothing can be learned from it")
    return torch.cat(list(found))
