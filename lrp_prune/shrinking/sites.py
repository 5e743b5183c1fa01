"""Around which modules sizes change: those that hold what is cut, and those that these lie in, up to where they meet."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from lrp_prune.shrinking.attributes import Site, Size, is_known
from lrp_prune.shrinking.configuration import uneven_sizes
from lrp_prune.shrinking.cuts import Cut
from lrp_prune.shrinking.heads import Slices
from lrp_prune.shrinking.removal import Removal


def sites_of(
    removal: Removal,
    part: Sequence[int],
    cuts: Mapping[str, Cut],
    modules: Mapping[str, nn.Module],
    shapes: Mapping[str, Sequence[int]],
    known: bool = False,
) -> list[Site]:
    """The modules that numbers may have to change in, when the units of one part go.

    Args:
        removal: what goes.
        part: indices of groups.
        cuts: of that.
        modules: of the model, by canonical name.
        shapes: of the parameters as they are.
        known: torch's layers as well, whose numbers need no trial.
    """
    found: dict[str, Site] = {}
    for index in part:
        group = removal.groups[index]
        slices = [each for each in removal.slices.get(group.name, ()) if group.kind == "head"]
        touched = {
            name for name in (*(m.parameter for m in group.members), *(s.parameter for s in slices)) if name in cuts
        }
        sizes = _head_sizes(len(group.dead), removal.gone[index], slices) if group.kind == "head" else []
        for name in sorted(touched):
            sizes += _sizes(name, cuts[name], shapes[name])
        same = {size.before for size in sizes if size.before == size.after}
        sizes = [size for size in sizes if size.before != size.after]
        for name in _around({name.rpartition(".")[0] for name in touched}):
            module = modules.get(name)
            if module is not None and (known or not is_known(module)):
                site = _site(name, module, sizes, touched, cuts, shapes, same)
                found[name] = _merged(found[name], site) if name in found else site
    return list(found.values())


def _site(
    name: str,
    module: nn.Module,
    sizes: Sequence[Size],
    touched: set[str],
    cuts: Mapping[str, Cut],
    shapes: Mapping[str, Sequence[int]],
    same: set[int],
) -> Site:
    prefix = f"{name}." if name else ""
    below = [each for each in touched if each.startswith(prefix)]
    layer = bool(below) and not any(True for _ in module.children())
    if layer:  # it knows of its own sizes only
        sizes = [size for each in below for size in _sizes(each, cuts[each], shapes[each])]
    others = same | {size for each in below for axis, size in enumerate(shapes[each]) if not _changes(cuts[each], axis)}
    return Site(name, module, list(sizes), frozenset(others), layer)


def _merged(first: Site, second: Site) -> Site:
    sizes = {size.of: size for size in (*first.sizes, *second.sizes)}
    return first._replace(sizes=list(sizes.values()), others=first.others | second.others)


def _changes(cut: Cut, axis: int) -> bool:
    return axis in cut.kept or (cut.rows is not None and axis < 2)


def _sizes(name: str, cut: Cut, shape: Sequence[int]) -> list[Size]:
    last = ".".join(name.split(".")[-2:])
    if cut.rows is not None and cut.columns is not None:
        return [Size(f"{last}:0", shape[0], len(cut.rows)), Size(f"{last}:1", shape[1], cut.columns.shape[1])]
    return [Size(f"{last}:{axis}", shape[axis], len(kept)) for axis, kept in cut.kept.items()]


def _head_sizes(heads: int, gone: Tensor, slices: Sequence[Slices]) -> list[Size]:
    """How many heads there are, how many sets of them share a key, and how many each such set has; also what stays the same."""
    left = int((~gone).sum())
    # Each by itself, or all share what no head is alone in, if anything.
    sets = next(
        (each.sets for each in slices if each.sets is not None), torch.ones(1, heads, dtype=torch.bool, device="cpu")
    )
    kept = int((sets & ~gone).any(1).sum())
    return [
        Size("heads", heads, left),
        Size("sets of heads", len(sets), kept),
        Size("heads of a set", heads // len(sets), left // max(kept, 1)),
    ]


def site_of_configuration(config: object, sites: Sequence[Site]) -> Site | None:
    """A configuration that all layers share, if all of them have the same sizes."""
    sizes = list({size: None for site in sites for size in site.sizes})
    if config is None or not sizes or uneven_sizes(sizes):
        return None
    # Any of its numbers may be about something else.
    return Site("config", config, sizes, frozenset(size.before for size in sizes), False)


def _around(owners: set[str]) -> list[str]:
    """These modules and those that they lie in, up to the first that all lie in."""
    paths = [owner.split(".") if owner else [] for owner in sorted(owners)]
    common = 0
    while all(len(path) > common for path in paths) and len({path[common] for path in paths}) == 1:
        common += 1
    if len(paths) == 1:
        common = max(common - 1, 0)
    found = {".".join(path[:depth]) for path in paths for depth in range(common, len(path) + 1)}
    return sorted(found)
