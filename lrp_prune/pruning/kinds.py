"""Kinds of layers: what figures about many tensors are told by."""

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from lrp_prune.names import layer_of

if TYPE_CHECKING:
    from lrp_prune.pruning.masks import Masks


def layer_group(name: str) -> str:
    """The kind of layer a parameter belongs to: its name with the numbers of the blocks around it left open.

    Example:
        >>> layer_group("model.layers.11.mlp.up_proj.weight"), layer_group("classifier.2.weight")
        ('model.layers.*.mlp.up_proj', 'classifier.2')
    """
    *blocks, last = layer_of(name).split(".")
    return ".".join([*("*" if block.isdigit() else block for block in blocks), last])


def by_kind(names: Iterable[str]) -> dict[str, list[str]]:
    """Names by kind of layer, kinds and names in their first order."""
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(layer_group(name), []).append(name)
    return found


def common_path(groups: Sequence[str]) -> str:
    """The modules that all groups lie in, as they would fill a table's first column with the same words.

    Example:
        >>> common_path(["model.layers.*.mlp.up_proj", "model.layers.*.self_attn.q_proj"]), common_path(["head"])
        ('model.layers.*', '')
    """
    paths = [group.split(".")[:-1] for group in groups]
    shared = []
    for segments in zip(*paths, strict=False):
        if len(set(segments)) > 1:
            break
        shared.append(segments[0])
    return ".".join(shared)


def in_short(groups: Sequence[str], most: int = 32) -> dict[str, str]:
    """What groups are called below :func:`common_path`: long names by their last modules, where these tell them apart.

    Example:
        >>> in_short(["bert.layer.*.attention.self.query", "bert.layer.*.attention.self.key", "head"], most=20)
        {'bert.layer.*.attention.self.query': '...self.query', 'bert.layer.*.attention.self.key': '...self.key', 'head': 'head'}
        >>> in_short(["model.*.up", "model.*.down"])
        {'model.*.up': 'up', 'model.*.down': 'down'}
    """
    shared = common_path(groups)
    names = {group: group[len(shared) + bool(shared) :] for group in groups}
    cut = {group: _cut(name, most) for group, name in names.items()}
    return cut if len(set(cut.values())) == len(names) else names


def _cut(name: str, most: int) -> str:
    parts = name.split(".")
    while len(name) > most and len(parts) > 2:
        parts = parts[1:]
        name = "..." + ".".join(parts)
    return name


class Figures(NamedTuple):
    """What is pruned of a kind of layer.

    Args:
        tensors: how many.
        entries: of all of them.
        pruned: of these.
        lowest: sparsity of the tensor that loses least.
        highest: sparsity of the one that loses most.
    """

    tensors: int
    entries: int
    pruned: int
    lowest: float
    highest: float

    @property
    def sparsity(self) -> float:
        """The share of all entries that is pruned."""
        return self.pruned / max(self.entries, 1)


def figures_by_kind(masks: "Masks") -> dict[str, Figures]:
    """What is pruned of each kind of layer."""
    found = {}
    for group, names in by_kind(masks).items():
        each = [masks.sparsity_of(name) for name in names]
        entries = sum(math.prod(masks.shapes[name]) for name in names)
        found[group] = Figures(len(names), entries, sum(map(masks.pruned_in, names)), min(each), max(each))
    return found
