"""Canonical parameter names: what a parameter is called whatever has been wrapped around its model.

A mask made in a Lightning run is applied to the bare Hugging Face model and the other way round, so names in
relevance, masks and patches carry no wrapper: neither those of ``torch.compile``, DDP, FSDP and activation
checkpointing, nor the attribute under which a ``LightningModule`` holds its model; and those of adapters (PEFT) look
through the adapter, so that a weight is called the same with and without one.
"""

import re
from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from lrp_prune.adapters import inserted_paths
from lrp_prune.distributed.sharding import at_rest
from lrp_prune.walks import named_modules_of, named_parameters_of

_WRAPPER_SEGMENTS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
_WRAPPER_CLASSES = frozenset(
    {"DistributedDataParallel", "DataParallel", "OptimizedModule", "FullyShardedDataParallel", "CorrectedModule"}
)


def canonical_name(name: str) -> str:
    """Remove the path segments that wrappers insert.

    Example:
        >>> canonical_name("_orig_mod.layers.0._checkpoint_wrapped_module.weight")
        'layers.0.weight'
    """
    if "_orig_mod" not in name and "_wrapped_module" not in name:
        return name
    return ".".join(segment for segment in name.split(".") if segment not in _WRAPPER_SEGMENTS)


def unwrap(model: nn.Module) -> nn.Module:
    """The module inside ``torch.compile``, ``DistributedDataParallel`` and the like; other modules as they are.

    Raises:
        TypeError: for what is no module.
    """
    given: Any = model
    if not isinstance(given, nn.Module):
        name, inside = type(given).__name__, isinstance(getattr(given, "model", None), nn.Module)
        way_out = f": pass the model that it holds, {name}.model" if inside else ""
        raise TypeError(f"a model must be a torch.nn.Module, got {name}{way_out}")
    while type(model).__name__ in _WRAPPER_CLASSES:
        inner = getattr(model, "_orig_mod", None) or getattr(model, "module", None)
        if not isinstance(inner, nn.Module):
            break
        model = inner
    return model


def class_name(model: nn.Module) -> str:
    """The model's class, also after ``fully_shard``, which puts a class of its own before it.

    Example:
        >>> class_name(nn.Linear(1, 1))
        'Linear'
    """
    return kind_of(model).__name__


def kind_of(model: nn.Module) -> type[nn.Module]:
    """The model's class, without what ``fully_shard`` puts before it."""
    bases = type(model).__mro__
    behind = next((index for index, base in enumerate(bases) if base.__name__ == "FSDPModule"), -1)
    return bases[behind + 1]


def named_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Every parameter of the unwrapped model once (tied ones under their first name), by canonical name.

    Of a model that is sharded by FSDP2 the sharded ones; so not to be called within its forward.
    """
    at_rest(model)
    canonical = naming(model)
    return {canonical(name): parameter for name, parameter in named_parameters_of(unwrap(model))}


def aliases(model: nn.Module) -> dict[str, nn.Parameter]:
    """As :func:`named_parameters`, with tied parameters under each of their names."""
    canonical = naming(model)
    named = unwrap(model).named_parameters(remove_duplicate=False)
    return {canonical(name): parameter for name, parameter in named}


def named_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Every module of the unwrapped model by canonical name; the root is ``""``.

    The outermost of several with one canonical name (an adapter's layer and the one inside it) has it; the others keep theirs.
    """
    canonical, found = naming(model), dict[str, nn.Module]()
    for name, module in named_modules_of(unwrap(model)):
        short = canonical(name)
        found[name if short in found else short] = module
    return found


def naming(model: nn.Module) -> Callable[[str], str]:
    """From a name in the unwrapped model to the canonical one."""
    inserted = inserted_paths(unwrap(model))
    if not inserted:
        return canonical_name

    def canonical(name: str) -> str:
        segments = name.split(".")
        own = [segment for end, segment in enumerate(segments, 1) if ".".join(segments[:end]) not in inserted]
        return canonical_name(".".join(own))

    return canonical


def layer_of(parameter: str) -> str:
    """The name of the layer whose weight it is; of any other parameter its own.

    Example:
        >>> layer_of("mlp.up_proj.weight"), layer_of("mlp.up_proj.bias")
        ('mlp.up_proj', 'mlp.up_proj.bias')
    """
    return parameter.removesuffix(".weight")


def is_called_bias(own: str, owner: nn.Module) -> bool:
    """Whether a parameter's own name says that it is a bias, as ``b_Q`` does beside ``W_Q``, and ``b`` beside ``w``.

    Args:
        own: its name without that of the module that holds it.
        owner: that module.

    Example:
        >>> import torch
        >>> owner = nn.ParameterDict({name: torch.ones(2) for name in ("W_Q", "b_Q", "b_proj", "bias1")})
        >>> [name for name in owner if is_called_bias(name, owner)]
        ['b_Q', 'bias1']
    """
    if {"bias", "biases"} & set(re.split(r"[_\d]+", own.lower())):
        return True
    convention = re.fullmatch(r"(_?)b((_.*)?)", own)
    return convention is not None and any(f"{convention[1]}{w}{convention[2]}" in owner._parameters for w in "Ww")


def matches(name: str, patterns: Iterable[str] | None) -> bool:
    """Whether one of the shell-style patterns matches the name, or the name of a module that contains it.

    Example:
        >>> matches("layers.0.mlp.up_proj.weight", ["*.mlp"]), matches("layers.0.mlp.up_proj.weight", ["mlp"])
        (True, False)
    """
    prefixes = [name]
    while "." in prefixes[-1]:
        prefixes.append(prefixes[-1].rpartition(".")[0])
    return any(fnmatchcase(prefix, pattern) for pattern in patterns or () for prefix in prefixes)


def resolve(names: Iterable[str], model: nn.Module) -> dict[str, nn.Parameter]:
    """Find recorded canonical names on a model that may be wrapped one attribute deeper, or less deep.

    Returns:
        ``{recorded name: parameter}`` in the order of ``names``.

    Raises:
        KeyError: if no single prefix makes all names parameters of the model, and the message names the first that is missing;
            or if several do, of different parameters.
    """
    wanted = list(names)
    parameters = named_parameters(model)
    known = aliases(model)
    if all(name in known for name in wanted):
        return {name: known[name] for name in wanted}
    prefixes = [name[: -len(wanted[0])] for name in known if wanted and name.endswith("." + wanted[0])]
    fitting = [prefix for prefix in prefixes if all(prefix + name in known for name in wanted)]
    found = [{name: known[prefix + name] for name in wanted} for prefix in fitting]
    for prefix, other in zip(fitting, found, strict=True):
        if any(other[name] is not parameter for name, parameter in found[0].items()):
            raise KeyError(
                f"{wanted[0]!r} may mean {fitting[0] + wanted[0]!r} or {prefix + wanted[0]!r} of "
                f"{type(unwrap(model)).__name__}: give the module that it was made for"
            )
    if found:
        return found[0]
    segments = wanted[0].split(".") if wanted else []
    for depth in range(1, len(segments)):
        prefix = ".".join(segments[:depth]) + "."
        if all(name.startswith(prefix) and name[len(prefix) :] in known for name in wanted):
            return {name: known[name[len(prefix) :]] for name in wanted}
    missing = next(name for name in wanted if name not in known)
    examples = ", ".join(list(parameters)[:3])
    raise KeyError(
        f"{type(unwrap(model)).__name__} has no parameter {missing!r} (it has {examples}, ...): was it made for another model?"
    )
