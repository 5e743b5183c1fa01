"""A Hugging Face configuration that says what sizes a model has now, if it can."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import nn

from lrp_prune.models.profile import profile_of
from lrp_prune.models.wording import listed
from lrp_prune.names import class_name
from lrp_prune.shrinking.attributes import Size
from lrp_prune.shrinking.proof import Proof

_PAIRS = 192


class Configured(NamedTuple):
    """What became of a configuration.

    Args:
        says_it: whether it says the new sizes.
        told: what was changed, or why not; empty where there is no configuration.
        back: puts back what was changed.
        made: a model without data that it makes, with the numbers of each of its modules.
    """

    says_it: bool
    told: str
    back: Callable[[], None]
    made: nn.Module | None = None


Entry = tuple[tuple[str, ...], str]
"""An entry of a configuration: the way to the part of it, and its name."""


def configured(module: nn.Module, sizes: Sequence[Size], proof: Proof) -> Configured:
    """Write the sizes into the configuration if a model made by it has the shapes that this one has, and computes the same.

    Entries that equal a size that changes are set to what it becomes, and entries without a value as well; which of them have
    to be shows in a model that is made without data, and then given the tensors of this one.

    Args:
        module: what is run.
        sizes: those that have changed.
        proof: of the masked model.
    """
    inner = profile_of(module).inner
    config = getattr(inner, "config", None)
    if inner is None or config is None:
        return Configured(False, "", _nothing)
    different = uneven_sizes(sizes)
    if different:
        uneven = f"layers differ in {listed(different, 3)}"
        return Configured(False, f"the configuration of {class_name(inner)} says the old sizes ({uneven})", _nothing)
    search = _Search(module, inner, config, proof)
    entries, wrong = search.fitting(_choices(config, sizes))
    if entries is not None:
        return _written(config, entries, search.made)
    said = f"the configuration of {class_name(inner)} has no way to say the new sizes (of {listed(wrong, 3)})"
    return Configured(False, said, _nothing)


def uneven_sizes(sizes: Sequence[Size]) -> list[str]:
    """The sizes that were the same, and are not any more: no configuration says one of these."""
    found: dict[tuple[str, int], set[int]] = {}
    for size in sizes:
        found.setdefault((size.of, size.before), set()).add(size.after)
    return sorted({of for (of, _), after in found.items() if len(after) > 1})


def _written(config: Any, entries: dict[Entry, int], made: nn.Module | None) -> Configured:
    before = {(path, name): getattr(_part(config, path), name) for path, name in entries}
    for (path, name), value in entries.items():
        setattr(_part(config, path), name, value)

    def back() -> None:
        for (path, name), value in before.items():
            setattr(_part(config, path), name, value)

    changes = [f"{'.'.join((*path, name))} {before[path, name]} -> {value}" for (path, name), value in entries.items()]
    return Configured(True, f"configuration: {', '.join(changes)}" if changes else "", back, made)


def _nothing() -> None:
    pass


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(entry.shape) for name, entry in model.named_parameters()}


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


class _Search:
    """Looks for the entries of a configuration by which a model is made that another one is.

    Args:
        module: what is run.
        inner: the Hugging Face model in it, or itself.
        config: its configuration, which stays as it is.
        proof: of what it has to compute.
    """

    def __init__(self, module: nn.Module, inner: nn.Module, config: Any, proof: Proof) -> None:
        self._module, self._inner, self._config, self._proof = module, inner, config, proof
        self._wanted = _shapes(inner)
        self.made: nn.Module | None = None
        """The model that was made in the end."""

    def fitting(self, choices: Mapping[Entry, Sequence[int]]) -> tuple[dict[Entry, int] | None, list[str]]:
        """The entries; or None, and the parameters that cannot be made as they are.

        Step by step those are taken that make most of the shapes right.
        """
        steps: list[dict[Entry, int]] = [{key: value} for key, values in choices.items() for value in values]
        found: dict[Entry, int] = {}
        wrong = self._wrong(found)
        if wrong is None:
            return None, list(self._wanted)
        if not wrong and self._computes(found):
            return found, []
        as_it_is = self._shapes(found)
        telling = [step for step in steps if self._shapes(step) != as_it_is]
        # Two at once only where no single one helps: the number of heads, and how wide they are, which it was by that number.
        pairs = [{**one, **other} for one in telling for other in steps if set(one) != set(other)][:_PAIRS]
        while True:
            best: tuple[dict[Entry, int], list[str]] | None = None
            for step in chain(telling, [None], pairs):
                if step is None:
                    if best is not None:
                        break
                    continue
                now = self._wrong({**found, **step})
                if now == [] and self._computes({**found, **step}):
                    return {**found, **step}, []
                if now and len(now) < len(best[1] if best is not None else wrong):
                    best = step, now
            if best is None:
                return None, wrong or list(self._wanted)
            found, wrong = {**found, **best[0]}, best[1]

    def _changed(self, entries: Mapping[Entry, int]) -> nn.Module | None:
        """A model without data, made with these entries; None if there is none."""
        changed = deepcopy(self._config)
        try:
            for (path, name), value in entries.items():
                setattr(_part(changed, path), name, value)
            getattr(changed, "validate", _nothing)()  # as saving and loading do
            with torch.device("meta"):
                made: nn.Module = type(self._inner)(changed)
        except Exception:  # whatever a configuration or a model says of numbers that do not go together
            return None
        return made

    def _shapes(self, entries: Mapping[Entry, int]) -> dict[str, tuple[int, ...]]:
        made = self._changed(entries)
        return {} if made is None else _shapes(made)

    def _wrong(self, entries: Mapping[Entry, int]) -> list[str] | None:
        """The parameters of such a model with other shapes than are wanted; None if it has others."""
        shapes = self._shapes(entries)
        if set(shapes) != set(self._wanted):
            return None
        return [name for name in shapes if shapes[name] != self._wanted[name]]

    def _computes(self, entries: Mapping[Entry, int]) -> bool:
        """Whether such a model puts out the same when it has the tensors of this one: shapes alone do not tell all sizes."""
        made = self._changed(entries)
        assert made is not None
        made.load_state_dict(self._inner.state_dict(), strict=False, assign=True)
        own, others = dict(made.named_buffers()), dict(self._inner.named_buffers())
        if {name: entry.shape for name, entry in own.items()} != {name: entry.shape for name, entry in others.items()}:
            return False
        for name, buffer in others.items():
            owner, _, last = name.rpartition(".")
            made.get_submodule(owner)._buffers[last] = buffer
        try:
            with _standing_in(self._module, self._inner, made) as whole:
                right = self._proof.difference(whole, batches=1) <= self._proof.tolerance
        except torch.OutOfMemoryError:
            raise
        except Exception:
            return False
        self.made = made if right else None
        return right


@contextmanager
def _standing_in(module: nn.Module, inner: nn.Module, other: nn.Module) -> Iterator[nn.Module]:
    """The module with another one in the place of one inside it."""
    places = [(part, name) for part in module.modules() for name, child in part._modules.items() if child is inner]
    try:
        for part, name in places:
            part._modules[name] = other
        yield module if inner is not module else other
    finally:
        for part, name in places:
            part._modules[name] = inner
