"""Going through the modules of a model, as ``nn.Module.named_modules`` does, without a generator in a generator for each level.

Each pass through a model goes through its modules a dozen times, to look for what needs care; with batches that are small this is
what a pass costs.
"""

from collections.abc import Iterator

from torch import nn

_OWN = nn.Module.named_modules


def modules_of(model: nn.Module) -> list[nn.Module]:
    """Every module once, parents first.

    Example:
        >>> modules_of(nn.Sequential(nn.ReLU()))
        [Sequential(
          (0): ReLU()
        ), ReLU()]
    """
    found: dict[int, nn.Module] = {}
    waiting = [model]
    while waiting:
        module = waiting.pop()
        if id(module) in found:
            continue
        if type(module).named_modules is not _OWN:
            found.update((id(inner), inner) for _, inner in module.named_modules())
            continue
        found[id(module)] = module
        waiting.extend(child for child in reversed(module._modules.values()) if child is not None)
    return list(found.values())


def named_modules_of(model: nn.Module, each_path: bool = False) -> Iterator[tuple[str, nn.Module]]:
    """Every module with its name, parents first.

    Args:
        model: its own name is empty.
        each_path: one that is held in several places comes once for each of them, in place of once under the first.
    """
    seen = set[int]()
    waiting = [("", model)]
    while waiting:
        name, module = waiting.pop()
        if id(module) in seen and not each_path:
            continue
        if type(module).named_modules is not _OWN:
            own = module.named_modules(prefix=name, remove_duplicate=not each_path)
            inside = [(path, inner) for path, inner in own if each_path or id(inner) not in seen]
            seen.update(id(inner) for _, inner in inside)
            yield from inside
            continue
        seen.add(id(module))
        yield name, module
        prefix = f"{name}." if name else ""
        children = reversed(module._modules.items())
        waiting.extend((prefix + key, child) for key, child in children if child is not None)


def named_parameters_of(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Every parameter once, with its name; tied ones under the first."""
    if type(model).named_parameters is not nn.Module.named_parameters:
        yield from model.named_parameters()
        return
    seen = set[int]()
    for name, module in named_modules_of(model):
        prefix = f"{name}." if name else ""
        for key, parameter in module._parameters.items():
            if parameter is not None and id(parameter) not in seen:
                seen.add(id(parameter))
                yield prefix + key, parameter
