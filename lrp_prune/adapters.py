"""Adapters, as PEFT puts them into a model: which of its modules and parameters are theirs, and which the model's own.

PEFT is not imported: its classes are known by the names of their bases.
"""

from collections.abc import Iterator
from weakref import WeakKeyDictionary

from torch import nn

from lrp_prune.walks import named_modules_of

_KINDS = ("PeftModel", "BaseTuner", "BaseTunerLayer", "ModulesToSaveWrapper")


_known: "WeakKeyDictionary[type, str]" = WeakKeyDictionary()  # models have thousands of modules, of few classes


def _kind(module: nn.Module) -> str:
    """What of PEFT's a module is; empty for any other."""
    kind = type(module)
    found = _known.get(kind)
    if found is None:
        names = {base.__name__ for base in kind.__mro__ if base.__module__.partition(".")[0] == "peft"}
        found = _known[kind] = next((name for name in _KINDS if name in names), "")
    return found


def inserted_paths(model: nn.Module) -> frozenset[str]:
    """Paths of modules that adapters put between the model's own: what a canonical name leaves out.

    ``base_model`` and ``base_model.model`` of a ``PeftModel``, ``base_layer`` of an adapted layer, and of a module that is
    trained as a whole beside the adapters (``modules_to_save``) the way to the copy that is used.
    """
    found: set[str] = set()
    for name, module in _adapting(model):
        prefix, kind = f"{name}." if name else "", _kind(module)
        if kind == "PeftModel":
            found.add(f"{prefix}base_model")
        elif kind == "BaseTuner":
            found.add(f"{prefix}model")
        elif kind == "BaseTunerLayer":
            found.add(f"{prefix}base_layer")
        else:
            used = _copy_in_use(module)
            found.update({f"{prefix}modules_to_save", f"{prefix}modules_to_save.{used}"} if used else ())
            found.update(() if used else {f"{prefix}original_module"})
    return frozenset(found)


def adapted_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The layers with an adapter, by their name in the model as it is; of one inside another the outermost."""
    found: dict[str, nn.Module] = {}
    for name, module in _adapting(model):
        if _kind(module) == "BaseTunerLayer" and not any(name.startswith(f"{outer}.") for outer in found):
            found[name] = module
    return found


def adapting_models(model: nn.Module) -> dict[str, nn.Module]:
    """Each ``PeftModel`` in a model, itself included, by its name."""
    return {name: module for name, module in _adapting(model) if _kind(module) == "PeftModel"}


def adapter_parameters(model: nn.Module) -> set[str]:
    """Names, in the model as it is, of what adapters added: their parameters, and copies of the model's that are not in use.

    By name, since PEFT makes new parameters of some layers (``nn.MultiheadAttention``) whenever a model is gone through.
    """
    added: list[
        tuple[str, str]
    ] = []  # what lies below the one belongs to the adapter, but for what lies below the other
    for name, module in _adapting(model):
        prefix, kind = f"{name}." if name else "", _kind(module)
        if kind == "BaseTunerLayer":
            added.append((prefix, f"{prefix}base_layer."))
        elif kind == "ModulesToSaveWrapper":
            used = _copy_in_use(module)
            added.append((prefix, f"{prefix}modules_to_save.{used}." if used else f"{prefix}original_module."))
    if not added:
        return set()
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    return {name for name in names for above, own in added if name.startswith(above) and not name.startswith(own)}


def _adapting(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    return ((name, module) for name, module in named_modules_of(model, each_path=True) if _kind(module))


def _copy_in_use(wrapper: nn.Module) -> str:
    """Which of the copies of a ``modules_to_save`` runs; empty where the original does."""
    active = getattr(wrapper, "active_adapters", None) or []
    disabled = bool(getattr(wrapper, "disable_adapters", False))
    return "" if disabled else next((name for name in active if name in wrapper.modules_to_save), "")  # type: ignore[operator]
