"""A Hugging Face configuration that says what sizes a model has now, if it can."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from itertools import combinations
from typing import Any, NamedTuple

import torch
from torch import nn

from lrp_prune.models.profile import profile_of
from lrp_prune.models.wording import listed
from lrp_prune.names import class_name
from lrp_prune.shrinking.attributes import Size

_PAIRS = 128


class Configured(NamedTuple):
    """What became of a configuration.

    Args:
        says_it: whether it says the new sizes.
        told: what was changed, or why not; empty where there is no configuration.
        back: puts back what was changed.
    """

    says_it: bool
    told: str
    back: Callable[[], None]


Entry = tuple[tuple[str, ...], str]
"""An entry of a configuration: the way to the part of it, and its name."""


def configured(module: nn.Module, sizes: Sequence[Size]) -> Configured:
    """Write the sizes into the model's configuration if a model made by it has the shapes that this one has.

    Entries that equal a size that changes are set to what it becomes, and entries without a value as well; which of them have
    to be shows in the shapes of a model that is made without data.
    """
    inner = profile_of(module).inner
    config = getattr(inner, "config", None)
    if inner is None or config is None:
        return Configured(False, "", _nothing)
    wanted = _shapes(inner)
    different = uneven_sizes(sizes)
    if different:
        uneven = f"layers differ in {listed(different, 3)}"
        return Configured(False, f"the configuration of {class_name(inner)} says the old sizes ({uneven})", _nothing)
    entries, wrong = _fitting(inner, config, _choices(config, sizes), wanted)
    if not wrong:
        return _written(config, entries)
    said = f"the configuration of {class_name(inner)} has no way to say the new sizes (of {listed(wrong, 3)})"
    return Configured(False, said, _nothing)


def uneven_sizes(sizes: Sequence[Size]) -> list[str]:
    """The sizes that were the same, and are not any more: no configuration says one of these."""
    found: dict[tuple[str, int], set[int]] = {}
    for size in sizes:
        found.setdefault((size.of, size.before), set()).add(size.after)
    return sorted({of for (of, _), after in found.items() if len(after) > 1})


def _written(config: Any, entries: dict[Entry, int]) -> Configured:
    before = {(path, name): getattr(_part(config, path), name) for path, name in entries}
    for (path, name), value in entries.items():
        setattr(_part(config, path), name, value)

    def back() -> None:
        for (path, name), value in before.items():
            setattr(_part(config, path), name, value)

    changes = [f"{'.'.join((*path, name))} {before[path, name]} -> {value}" for (path, name), value in entries.items()]
    return Configured(True, f"configuration: {', '.join(changes)}" if changes else "", back)


def _nothing() -> None:
    pass


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(entry.shape) for name, entry in model.named_parameters()}


def _made(inner: nn.Module, config: Any) -> nn.Module:
    with torch.device("meta"):
        return type(inner)(config)


def _part(config: Any, path: Sequence[str]) -> Any:
    for name in path:
        config = getattr(config, name)
    return config


def _parts(config: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    yield path, config
    for name, value in vars(config).items():
        if hasattr(value, "model_type") and hasattr(value, "to_dict"):
            yield from _parts(value, (*path, name))


def _head_width(sizes: Sequence[Size]) -> list[int]:
    """How wide a head is, which configurations may leave to be computed from the number of heads."""
    heads = {size for size in sizes if size.of == "heads"}
    return sorted(
        {
            size.before // head.before
            for head in heads
            for size in sizes
            if size.before % head.before == 0 and size.of != head.of
        }
    )


def _choices(config: Any, sizes: Sequence[Size]) -> dict[Entry, list[int]]:
    """What entries may be set to: those that equal a size that changes, and then those without a value."""
    widths = _head_width(sizes)
    valued: dict[Entry, list[int]] = {}
    empty: dict[Entry, list[int]] = {}
    for path, part in _parts(config):
        general = _general(part)
        for name, value in vars(part).items():
            if name.startswith("_") or name in general or isinstance(value, bool):
                continue
            if isinstance(value, int):
                fitting = [size.after for size in sizes if size.before == value]
                if fitting:
                    valued[path, name] = list(dict.fromkeys(fitting))
            elif value is None:
                empty[path, name] = list(dict.fromkeys([*(size.after for size in sizes), *widths]))
    return {**valued, **empty}


def _general(config: Any) -> frozenset[str]:
    """The entries that every configuration has, which say no sizes."""
    base = next((kind for kind in type(config).__mro__ if kind.__module__ == "transformers.configuration_utils"), None)
    return frozenset() if base is None else frozenset(vars(base()))


def _fitting(
    inner: nn.Module, config: Any, choices: Mapping[Entry, Sequence[int]], wanted: Mapping[str, tuple[int, ...]]
) -> tuple[dict[Entry, int], list[str]]:
    """The entries by which a model gets the shapes that are wanted, and what it does not get by them.

    Step by step those are taken that make most of them right.
    """
    steps: list[dict[Entry, int]] = [{key: value} for key, values in choices.items() for value in values]
    found: dict[Entry, int] = {}
    wrong = _wrong(inner, config, found, wanted)
    if wrong is None:
        return {}, list(wanted)
    pairs = [{**one, **other} for one, other in combinations(steps, 2) if set(one) != set(other)][:_PAIRS]
    while wrong:
        best: dict[Entry, int] | None = None
        for several in (steps, pairs):  # two at once only where no single one helps: more heads, and how wide they are
            for step in several:
                now = _wrong(inner, config, {**found, **step}, wanted)
                if now is not None and len(now) < len(wrong):
                    best, wrong = step, now
            if best is not None:
                break
        if best is None:
            break
        found.update(best)
    return found, wrong or []


def _wrong(
    inner: nn.Module, config: Any, entries: Mapping[Entry, int], wanted: Mapping[str, tuple[int, ...]]
) -> list[str] | None:
    """The parameters of a model that is made by a configuration with other shapes than are wanted; None if it has others."""
    changed = deepcopy(config)
    try:
        for (path, name), value in entries.items():
            setattr(_part(changed, path), name, value)
        shapes = _shapes(_made(inner, changed))
    except Exception:  # whatever a configuration or a model says of numbers that do not go together
        return None
    return [name for name, shape in wanted.items() if shapes[name] != shape] if set(shapes) == set(wanted) else None
