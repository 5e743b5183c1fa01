"""Numbers that modules hold about their sizes: those of torch's own layers, and what others need to be told.

torch's layers say what their numbers mean. What a module of anybody else's needs is tried out: an integer that equals a size
that has changed may have to change with it, and whether it has to shows in the outputs. Where both would be right, a number
that equals nothing else changes, and one that may as well be another size (the width of the residual stream) stays.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import combinations, product
from typing import NamedTuple

from torch import Tensor, nn

from lrp_prune.shrinking.cuts import Cut, Slot

_TRIALS = 256
"""Ways to set the numbers of a kind of modules that are tried out before it is given up."""


Key = tuple[type, str, str]
"""The class of a module, what it is called where it lies, and one of its attributes: alike in all layers."""
Numbers = Mapping[Key, str]
"""What becomes of numbers: the size (:attr:`Size.of`) that it is set to; empty: it stays."""


class Size(NamedTuple):
    """A size that changes: what it is of, and both of its values."""

    of: str
    before: int
    after: int


class Site(NamedTuple):
    """A module whose numbers may have to change.

    Args:
        name: canonical.
        module: itself, or a configuration that modules read while they run.
        sizes: those around it that change.
        others: those of its own parameters that stay.
        layer: whether it is a layer, with parameters of its own that are cut and nothing inside.
    """

    name: str
    module: object
    sizes: Sequence[Size]
    others: frozenset[int]
    layer: bool

    def key(self, attribute: str) -> Key:
        """Under which an attribute of it is decided."""
        own = self.name.rpartition(".")[2]
        return type(self.module), "" if own.isdigit() else own, attribute


def layer_slots(module: nn.Module, cut: Cut, after: Tensor) -> list[Slot]:
    """The numbers of one of torch's own layers after its weight is cut."""
    wanted: dict[str, int] = {}
    shape = after.shape
    if isinstance(module, nn.Linear) and after.dim() == 2:
        wanted = {"out_features": shape[0], "in_features": shape[1]}
    elif isinstance(module, nn.modules.conv._ConvNd) and after.dim() > 2:
        groups = cut.groups or module.groups
        rows, width = shape[0], shape[1]
        inputs, outputs = (rows, width * groups) if module.transposed else (width * groups, rows)
        wanted = {"in_channels": inputs, "out_channels": outputs, "groups": groups}
    elif isinstance(module, nn.modules.batchnorm._NormBase):
        wanted = {"num_features": shape[0]}
    elif isinstance(module, nn.Embedding):
        wanted = {"num_embeddings": shape[0], "embedding_dim": shape[1]}
    return [
        attribute_slot(module, name, value)
        for name, value in wanted.items()
        if hasattr(module, name) and getattr(module, name) != value
    ]


def is_known(module: nn.Module) -> bool:
    """Whether a module is one of torch's layers, whose numbers :func:`layer_slots` knows."""
    return isinstance(module, nn.Linear | nn.modules.conv._ConvNd | nn.modules.batchnorm._NormBase | nn.Embedding)


def attribute_slot(module: object, name: str, value: object) -> Slot:
    """A number of a module."""
    return Slot(lambda new: setattr(module, name, new), getattr(module, name), value, (module, name))


def numbers_to_try(sites: Iterable[Site]) -> Iterator[Numbers]:
    """Ways to set the numbers of some modules, the most likely first; all modules of a class alike."""
    sites = list(sites)
    choices: dict[Key, list[str]] = {}
    for site in sites:
        for name, value in integers(site.module):
            fitting = [size for size in site.sizes if size.before in _entries(value)]
            if not fitting:
                continue
            known = choices.setdefault(site.key(name), [])
            sure = site.layer or not any(size.before in site.others for size in fitting)
            ways = [size.of for size in fitting]
            for way in ways if sure else []:
                if way not in known:
                    known.append(way)
            for way in ("", *ways):
                if way not in known:
                    known.append(way)
    distinct = {key: _distinct(key, ways, sites) for key, ways in choices.items()}
    keys = [key for key, ways in distinct.items() if len(ways) > 1]
    fixed = {key: ways[0] for key, ways in distinct.items()}
    tried = 0
    for deviations in range(len(keys) + 1):
        for changed in combinations(keys, deviations):
            for chosen in product(*(distinct[key][1:] for key in changed)):
                yield {**fixed, **dict(zip(changed, chosen, strict=True))}
                tried += 1
                if tried >= _TRIALS:
                    return


def number_slots(sites: Iterable[Site], numbers: Numbers) -> list[Slot]:
    """The numbers of these modules, set in one of these ways."""
    slots = []
    for site in sites:
        for name, value in integers(site.module):
            way = numbers.get(site.key(name), "")
            size = next((size for size in site.sizes if size.of == way and size.before in _entries(value)), None)
            if size is not None:
                slots.append(attribute_slot(site.module, name, _replaced(value, size)))
    return slots


def integers(module: object) -> list[tuple[str, int | tuple[int, ...] | list[int]]]:
    """The integers that a module holds, and its rows of them."""
    found = []
    for name, value in vars(module).items():
        plain = [value] if isinstance(value, int) else value if isinstance(value, tuple | list) else []
        numbers = plain and all(isinstance(entry, int) and not isinstance(entry, bool) for entry in plain)
        if numbers and not name.startswith("_"):
            found.append((name, value))
    return found


def _entries(value: int | Sequence[int]) -> Sequence[int]:
    return [value] if isinstance(value, int) else value


def _replaced(value: int | tuple[int, ...] | list[int], size: Size) -> int | tuple[int, ...] | list[int]:
    if isinstance(value, int):
        return size.after
    return type(value)(size.after if entry == size.before else entry for entry in value)


def _distinct(key: Key, ways: Sequence[str], sites: Sequence[Site]) -> list[str]:
    """Of ways that set the same numbers everywhere, the first."""
    seen, found = set(), []
    for way in ways:
        values = tuple(
            next((size.after for size in site.sizes if size.of == way), None)
            for site in sites
            if site.key(key[2]) == key
        )
        if values not in seen:
            seen.add(values)
            found.append(way)
    return found
