"""What a batch holds: its fields by name, its labels, its samples; and the same batch with other tensors in it."""

import copy
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils import _pytree as pytree

IGNORED = -100
"""The label of positions that are not explained."""
LABELS = ("labels", "label", "label_ids", "targets", "target", "target_values", "y")
"""The names under which a batch, or a forward, has its labels."""
SPANS = ("start_positions", "end_positions")
"""The names of the labels of question answering."""
MAIN_INPUTS = ("input_ids", "inputs_embeds", "pixel_values", "input_values", "input_features")
"""The names under which Hugging Face models take what they are about: they have one row a sample."""


def fields(batch: Any) -> dict[str, Any] | None:
    """What a batch holds by name: a mapping, a named tuple, a dataclass, or an object with tensors as its attributes.

    None for what has no names: a tensor, a tuple, a number.

    Example:
        >>> fields({"x": 1}), fields((1, 2))
        ({'x': 1}, None)
    """
    if isinstance(batch, Mapping):
        return dict(batch)
    if isinstance(batch, PackedSequence | Tensor | nn.Module | type):
        return None
    if isinstance(batch, tuple):
        names = getattr(batch, "_fields", None)
        return dict(zip(names, batch, strict=True)) if names else None
    if dataclasses.is_dataclass(batch):
        return {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
    if _is_graph(batch):
        return {name: batch[name] for name in batch.keys()}  # noqa: SIM118  # iterating over one gives pairs
    named = {name: value for name, value in attributes(batch).items() if not name.startswith("_")}
    return named if any(map(_holds_tensors, named.values())) else None


def attributes(value: Any) -> dict[str, Any]:
    """What an object keeps by name, in its dictionary or in slots."""
    slots = [name for kind in type(value).__mro__ for name in _listed(vars(kind).get("__slots__", ()))]
    own = {name: getattr(value, name) for name in slots if name not in _OF_PYTHON and hasattr(value, name)}
    return {**own, **getattr(value, "__dict__", {})}


_OF_PYTHON = frozenset({"__dict__", "__weakref__"})


def _listed(names: Iterable[str]) -> Iterable[str]:
    return (names,) if isinstance(names, str) else names


def _holds_tensors(value: Any) -> bool:
    entries = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else (value,)
    return any(isinstance(entry, Tensor) for entry in entries)


def _is_packed(value: Any) -> bool:
    return isinstance(value, PackedSequence)


def _is_graph(batch: Any) -> bool:
    """Whether this is an object that keeps its tensors in a store of its own, as those of PyTorch Geometric do."""
    if isinstance(batch, nn.Module) or not all(
        callable(getattr(batch, name, None)) for name in ("keys", "__getitem__", "__setitem__")
    ):
        return False
    return any(isinstance(batch[name], Tensor) for name in batch.keys())  # noqa: SIM118


def entry(batch: Any, name: str) -> Any:
    """The batch's entry of that name, None if there is none."""
    named = fields(batch)
    return None if named is None else named.get(name)


def label_name(named: Mapping[str, Any]) -> str | None:
    """The name under which these fields have their labels."""
    return next((name for name in LABELS if named.get(name) is not None), None)


def tensors(batch: Any) -> list[Tensor]:
    """Every tensor of a batch, in its order."""
    found: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    mapped(batch, note)
    return found


def mapped(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """The same batch with the function's result in place of each tensor; what was given stays as it is.

    Whatever ``torch.utils._pytree`` knows is gone through by it, so that types which users register there are as well;
    named tuples, dataclasses, mappings and objects keep their types.
    """

    def leaf(item: Any) -> Any:
        if isinstance(item, Tensor):
            return function(item)
        if isinstance(item, PackedSequence):
            order = (item.sorted_indices, item.unsorted_indices)
            # Lengths stay on the host, where torch wants them.
            return PackedSequence(
                function(item.data), item.batch_sizes.clone(), *(None if i is None else function(i) for i in order)
            )
        if isinstance(item, Mapping):
            return _mapped_mapping(item, function)
        if isinstance(item, list | tuple):  # of a class of its own, which pytree does not know
            return type(item)(mapped(entry, function) for entry in item)
        named = fields(item)
        return with_fields(item, {name: mapped(part, function) for name, part in named.items()}) if named else item

    return pytree.tree_map(leaf, value, is_leaf=_is_packed)


def contained(batch: Any) -> Any:
    """The same tensors in containers of their own, so that the batch may lose or get entries and this stays as it is.

    Example:
        >>> batch = {"x": torch.zeros(1), "more": [torch.ones(1)]}
        >>> kept = contained(batch)
        >>> _ = batch.pop("x"), batch["more"].clear()
        >>> kept
        {'x': tensor([0.]), 'more': [tensor([1.])]}
    """
    return mapped(batch, lambda tensor: tensor)


def laid_together(first: Any, second: Any) -> Any:
    """One batch with the samples of two; None if they do not fit: other lengths or types, or tensors without a row a sample.

    Example:
        >>> laid_together((torch.zeros(2, 3), torch.zeros(2)), (torch.ones(1, 3), torch.ones(1)))[1]
        tensor([0., 0., 1.])
        >>> laid_together(torch.zeros(2, 3), torch.zeros(2, 4)) is None
        True
    """
    (mine, structure), (theirs, other) = pytree.tree_flatten(first), pytree.tree_flatten(second)
    if structure != other or not mine or not all(isinstance(leaf, Tensor) for leaf in (*mine, *theirs)):
        return None
    for leaves in (mine, theirs):
        if any(leaf.dim() == 0 for leaf in leaves) or len({len(leaf) for leaf in leaves}) != 1:
            return None
    if any(a.shape[1:] != b.shape[1:] or a.dtype != b.dtype for a, b in zip(mine, theirs, strict=True)):
        return None
    return pytree.tree_unflatten([torch.cat(pair) for pair in zip(mine, theirs, strict=True)], structure)


def in_groups(batches: Sequence[Any], size: int) -> Iterator[tuple[Any, int]]:
    """Batches laid together, no more than so many each, as far as they fit; with how many each is made of.

    Example:
        >>> [(tuple(batch.shape), number) for batch, number in in_groups([torch.ones(2, 3)] * 3 + [torch.ones(1, 4)], 2)]
        [((4, 3), 2), ((2, 3), 1), ((1, 4), 1)]
    """
    while batches:
        together, number = batches[0], 1
        for batch in batches[1:size]:
            both = laid_together(together, batch)
            if both is None:
                break
            together, number = both, number + 1
        batches = batches[number:]
        yield together, number


def with_fields(batch: Any, named: Mapping[str, Any]) -> Any:
    """A copy of an object with other values in its :func:`fields`."""
    made = copy.copy(batch)
    for name, value in named.items():
        if _is_graph(batch):
            made[name] = value
        else:
            object.__setattr__(made, name, value)  # of frozen dataclasses as well
    return made


def _mapped_mapping(value: Mapping[Any, Any], function: Callable[[Tensor], Tensor]) -> Any:
    items = {name: mapped(item, function) for name, item in value.items()}
    try:
        made: Any = copy.copy(value)
        # A class of its own may keep its entries in a dictionary, which a copy shares.
        stores = {
            name: copy.copy(store) for name, store in getattr(made, "__dict__", {}).items() if isinstance(store, dict)
        }
        getattr(made, "__dict__", {}).update(stores)
        for name, item in items.items():
            made[name] = item
    except TypeError:  # one that cannot be changed
        return items
    return made


def to_device(batch: Any, device: torch.device) -> Any:
    """The batch on a device, in ordinary tensors also where it was made in inference mode."""

    def moved(tensor: Tensor) -> Tensor:
        return tensor.clone() if tensor.is_inference() and tensor.device == device else tensor.to(device)

    return mapped(batch, moved)


def samples_in(batch: Any) -> int:
    """Number of samples: the first dimension of the first tensor that has one; of packed sequences their number.

    Raises:
        ValueError: if the batch holds no such tensor.
    """
    named = fields(batch) or {}
    main = [named[name] for name in MAIN_INPUTS if isinstance(named.get(name), Tensor)]
    packed = next(filter(_is_packed, pytree.tree_leaves(batch, is_leaf=_is_packed)), None)
    if packed is not None and not main:
        return int(packed.batch_sizes[0])
    first = next((tensor for tensor in main or tensors(batch) if tensor.dim()), None)
    if first is None:
        raise ValueError(f"the batch ({type(batch).__name__}) holds no tensor with a batch dimension")
    return int(first.shape[0])


def of_samples(batch: Any, samples: Sequence[int]) -> Any:
    """A part of a batch: some of its samples. None where it cannot be divided: not every tensor has a row for each.

    Example:
        >>> of_samples((torch.tensor([1, 2, 3]), torch.tensor([4, 5, 6])), [2])
        (tensor([3]), tensor([6]))
    """
    leaves = pytree.tree_leaves(batch, is_leaf=_is_packed)
    plain = all(isinstance(part, Tensor | bool | Mapping | None) for part in leaves)
    found = tensors(batch) if plain else []
    if not found or any(tensor.dim() == 0 or len(tensor) != len(found[0]) for tensor in found):
        return None
    return mapped(batch, lambda tensor: tensor[torch.tensor(samples, device=tensor.device)])


def check_batches(batches: Any, argument: str = "batches") -> None:
    """Refuse one batch where several are expected: its entries, or its rows, would be taken for batches.

    Args:
        batches: what was given.
        argument: as what.

    Raises:
        ValueError: and says what to pass.

    Example:
        >>> check_batches([torch.zeros(2, 3)])
        >>> check_batches(torch.zeros(2, 3))
        Traceback (most recent call last):
            ...
        ValueError: batches must be an iterable of batches, got a tensor of shape (2, 3): pass [batch]
    """
    what = _one_batch(batches)
    if what is None and not isinstance(batches, Iterable) and not hasattr(batches, "__getitem__"):
        what = f"{'an' if type(batches).__name__[0] in 'AEIOUaeiou' else 'a'} {type(batches).__name__}"
    if what is not None:
        raise ValueError(f"{argument} must be an iterable of batches, got {what}: pass [batch]")


def _one_batch(batches: Any) -> str | None:
    """What one batch is, in words; None for what may be several."""
    if isinstance(batches, Tensor):
        return f"a tensor of shape {tuple(batches.shape)}"
    if isinstance(batches, str):
        return "a string"
    named = None if hasattr(batches, "__next__") else fields(batches) if not _is_loader(batches) else None
    if named:
        return f"{_kind(batches)} of {', '.join(map(str, list(named)[:4]))}"
    if not isinstance(batches, tuple | list) or not batches:
        return None
    held = [item for item in batches if isinstance(item, Tensor)]
    if isinstance(batches, tuple) and held:
        return f"a tuple of {_shapes(batches)}"
    if len(held) == len(batches) and len({(item.dtype, item.dim()) for item in held}) > 1:
        return f"a list of {_shapes(batches)}, which are no batches of one kind"
    if len(batches) == 2 and isinstance(batches[1], Tensor) and not isinstance(batches[0], Tensor):
        return f"a list of inputs and of {_shapes(batches[1:])}"
    return None


def _is_loader(batches: Any) -> bool:
    """Whether an object with attributes is gone through by iteration, as loaders and data sets are."""
    return (hasattr(batches, "__iter__") or hasattr(batches, "__getitem__")) and not (
        isinstance(batches, Mapping | tuple) or dataclasses.is_dataclass(batches) or _is_graph(batches)
    )


def _kind(batch: Any) -> str:
    return "a mapping" if isinstance(batch, Mapping) else f"one {type(batch).__name__}"


def _shapes(items: Sequence[Any]) -> str:
    return " and ".join(
        f"a tensor of shape {tuple(item.shape)}" if isinstance(item, Tensor) else type(item).__name__ for item in items
    )
