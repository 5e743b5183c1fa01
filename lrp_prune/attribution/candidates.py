"""Candidates: which weights of a model are there to be scored and pruned; the same for every method."""

import re
from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from lrp_prune.adapters import adapted_layers, adapter_parameters
from lrp_prune.arguments import check_patterns
from lrp_prune.engine.quantized import quantized_modules
from lrp_prune.models.scripted import refuse_scripted
from lrp_prune.names import aliases, is_called_bias, matches, named_parameters, naming, unwrap

_DATA_WORDS = frozenset(
    """
    token tokens embed embeds embedding embeddings emb pos position positions positional position_encoding table
    latent latents scale log ape
    """.split()
)
_TABLES = frozenset({"Embed", "Embedding", "Unembed", "Unembedding"})
_LAYERS = (nn.Linear, nn.Bilinear, nn.modules.conv._ConvNd, nn.RNNBase, nn.RNNCellBase)


def candidates(
    model: nn.Module,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
    trainable_only: bool = False,
    embeddings: bool = False,
) -> dict[str, nn.Parameter]:
    """The weights that can be scored and pruned: what a sparsity is the share of, whatever the method.

    By default these are all parameters of two and more dimensions, except

    * embeddings, and the output embedding (the weight that makes logits over a vocabulary);
    * scales and shifts of normalizations;
    * *data*: what a module holds beside its layers and adds to, concatenates with or compares with activations. Nothing but
      names and shapes tell that without a batch, so it is everything that is not called ``weight`` or ``..._weight`` and

      - has a first dimension of one, since it is broadcast over the samples: class tokens ``(1, 1, D)``, position
        embeddings ``(1, T, D)``, learned queries; or at most one dimension larger than one: layer scales ``(D, 1, 1)``; or
      - has a word in its own name that says so: ``bias``, ``token``, ``embedding``, ``position``, ``table``, ``latent``,
        ``scale``, ``log``, their plurals and short forms (relative position bias tables, biases of experts, ``A_log``,
        ``b_Q`` beside ``W_Q``), or has two dimensions and is held by a class called ``Embed``, ``Unembed`` or
        ``Embedding``.

      A parameter that is only a vector in disguise, ``(1, 1, 1, D)``, is none of either, whatever it is called;
    * what adapters (PEFT) add to a model, so that its weights are the same ones with and without them.

    What a parameter is used for says more than its name, but shows in a forward only. So methods that look at samples leave a
    bare table alone that is looked up by ids (``table[ids]``), as they do other embeddings, and take what activations are
    multiplied with in a matrix product for a weight, whatever it is called and whatever its shape
    (see :class:`~lrp_prune.attribution.beside.Beside`). Those that do not look at samples go by the name.

    Args:
        model: any module.
        include: patterns of names to take instead. A pattern takes data and adapters only where it names nothing else.
        exclude: patterns of names to leave out.
        trainable_only: leave out weights that do not require grad, unless ``include`` names them.
        embeddings: take the embeddings, and nothing else.

    Returns:
        Canonical name -> parameter, in the model's order.

    Raises:
        ValueError: if a pattern matches no parameter, or vectors only; nothing is left; a weight is quantized; only trainable
            weights are asked for, and these are adapters; or the model is compiled by ``torch.jit``.
    """
    check_patterns("include", include)
    check_patterns("exclude", exclude)
    refuse_scripted(unwrap(model))
    parameters = named_parameters(model)
    _refuse_quantized(model, parameters, include, exclude)
    for pattern in (*(include or ()), *(exclude or ())):
        if not any(matches(name, [pattern]) for name in parameters):
            raise ValueError(_matches_nothing(model, pattern, parameters))
    possible = {name: parameter for name, parameter in parameters.items() if parameter.dim() >= 2}
    tables = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, nn.Embedding | nn.EmbeddingBag)
        for parameter in module.parameters(recurse=False)
    }
    added = set(map(naming(model), adapter_parameters(unwrap(model))))
    owners = _owners(model)
    data = {name for name, entry in possible.items() if _is_data(entry, *owners[name])}
    beside = data | (added & set(possible))
    if include is not None:
        wanted = _included(include, parameters, possible, beside)
    elif embeddings:
        wanted = {name for name, parameter in possible.items() if id(parameter) in tables}
    else:
        if trainable_only and added:
            raise ValueError(_adapters_only(model))
        left_out = tables | _output_embeddings(model) | _normalizations(model)
        wanted = {
            name
            for name, parameter in possible.items()
            if id(parameter) not in left_out and name not in beside and (parameter.requires_grad or not trainable_only)
        }
    chosen = {name: parameter for name, parameter in possible.items() if name in wanted and not matches(name, exclude)}
    if not chosen:
        why = (
            "none requires grad" if trainable_only and include is None else f"include={include!r}, exclude={exclude!r}"
        )
        raise ValueError(f"{type(model).__name__} has no weight to score: {why}")
    return chosen


def taken_for_data(
    model: nn.Module,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
    trainable_only: bool = False,
) -> dict[str, nn.Parameter]:
    """What :func:`candidates` leaves out as data, by name and shape: a forward may show that it is multiplied like a weight.

    Args:
        model: any module.
        include: patterns of names to look among; what a pattern names alone is a candidate.
        exclude: patterns of names to leave out.
        trainable_only: leave out what does not require grad, unless ``include`` names it.
    """
    owners, left_out = _owners(model), _output_embeddings(model) | _normalizations(model)
    added = set(map(naming(model), adapter_parameters(unwrap(model))))
    found = {}
    for name, entry in named_parameters(model).items():
        owner, own = owners[name]
        if entry.dim() < 2 or id(entry) in left_out or name in added or not entry.is_floating_point():
            continue
        if matches(name, exclude):
            continue
        asked = matches(name, include) if include is not None else entry.requires_grad or not trainable_only
        if asked and _is_data(entry, owner, own) and type(owner).__name__ not in _TABLES:
            found[name] = entry
    taken = candidates(model, include, exclude) if found and include is not None else {}
    return {name: entry for name, entry in found.items() if name not in taken}


def _included(
    include: Sequence[str], parameters: Mapping[str, Tensor], possible: Mapping[str, Tensor], beside: set[str]
) -> set[str]:
    found: set[str] = set()
    for pattern in include:
        named = [name for name in possible if matches(name, [pattern])]
        if not named:
            example = next(name for name in parameters if matches(name, [pattern]))
            raise ValueError(
                f"include pattern {pattern!r} names nothing that can be scored: {example} has shape "
                f"{tuple(parameters[example].shape)}, and weights have two dimensions or more"
            )
        found.update([name for name in named if name not in beside] or named)
    return found


def _matches_nothing(model: nn.Module, pattern: str, parameters: Mapping[str, nn.Parameter]) -> str:
    names = {id(parameter): name for name, parameter in parameters.items()}
    for alias, parameter in aliases(model).items():
        if matches(alias, [pattern]):
            return (
                f"pattern {pattern!r} names {alias}, which is tied to {names[id(parameter)]}: they are one parameter, called "
                f"by the first of its names; use {names[id(parameter)]!r}"
            )
    return f"pattern {pattern!r} matches no parameter; there are {', '.join(list(parameters)[:4])}, ..."


def _refuse_quantized(
    model: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    include: Sequence[str] | None,
    exclude: Sequence[str] | None,
) -> None:
    found = {name: str(entry.dtype) for name, entry in parameters.items() if not entry.is_floating_point()}
    found.update({f"{name}.weight" if name else "weight": what for name, what in quantized_modules(model).items()})
    for name, what in found.items():
        if matches(name, exclude) or (include is not None and not matches(name, include)):
            continue
        if name in parameters and parameters[name].is_complex():
            raise ValueError(
                f"{name} is complex ({what}): relevance is a number for each weight, and a complex one is two. Leave it out "
                "(exclude=), or hold its real and imaginary parts in parameters of their own"
            )
        raise ValueError(
            f"{name} is quantized ({what}): its codes can be neither scored nor set to zero. Prune the model in a "
            "floating-point type and quantize it then"
        )


def _output_embeddings(model: nn.Module) -> set[int]:
    """The weights that turn hidden states into logits over a vocabulary, as Hugging Face models name them."""
    found = set()
    for module in model.modules():
        getter = getattr(module, "get_output_embeddings", None)
        head = getter() if callable(getter) else None
        weight = getattr(head, "weight", None)
        if isinstance(weight, nn.Parameter):
            found.add(id(weight))
    return found


def _normalizations(model: nn.Module) -> set[int]:
    kinds = (nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase, getattr(nn, "RMSNorm", nn.LayerNorm))
    return {id(entry) for module in model.modules() if isinstance(module, kinds) for entry in module.parameters(False)}


def _adapters_only(model: nn.Module) -> str:
    layers = sorted({f"*.{name.rpartition('.')[2]}" for name in adapted_layers(unwrap(model))}) or ["..."]
    return (
        f"{type(unwrap(model)).__name__} has adapters: its own weights are frozen, and zeros in an adapter are none in the sum "
        f"that it becomes a part of. Say what is meant: include={layers!r} for the weights that adapters are added to (and "
        "lrp_prune.merge_adapters(model, masks) to merge these afterwards), include=['*.lora_*'] for the adapters"
    )


def _owners(model: nn.Module) -> dict[str, tuple[nn.Module, str]]:
    """Of each parameter the module that holds it, and what it is called there."""
    found: dict[str, tuple[nn.Module, str]] = {}
    model, canonical = unwrap(model), naming(model)
    for name, _ in model.named_parameters():
        path, _, own = name.rpartition(".")
        owner = model.get_submodule(path)
        # In a list "0" says nothing, and the list's name does.
        listed = isinstance(owner, nn.ParameterList | nn.ParameterDict)
        found[canonical(name)] = owner, path.rpartition(".")[2] if listed else own
    return found


def _is_data(parameter: Tensor, owner: nn.Module, own: str) -> bool:
    """See :func:`candidates`."""
    if isinstance(owner, _LAYERS):
        return own.endswith("_g")  # the magnitude in a weight norm
    own = re.sub(r"_(orig|v)$", "", own)  # what torch.nn.utils.prune and the older reparametrizations call a weight
    called_weight = own == "weight" or own.endswith("_weight")
    long = sum(size > 1 for size in parameter.shape)
    if long <= 1 and (parameter.dim() > 2 or not called_weight):
        return True
    if called_weight:
        return False
    words = set(re.split(r"[_\d]+", own.lower()))
    held = parameter.dim() == 2 and type(owner).__name__ in _TABLES
    return parameter.shape[0] == 1 or held or is_called_bias(own, owner) or bool(words & _DATA_WORDS)
