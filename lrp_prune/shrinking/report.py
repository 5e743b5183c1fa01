"""What came of shrinking: what went, what did not and why, sizes before and after."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from textwrap import fill
from typing import Any, NamedTuple

from rich.box import SIMPLE_HEAD
from rich.table import Table
from torch import nn

from lrp_prune.models.wording import listed
from lrp_prune.pruning.kinds import common_path, in_short, layer_group
from lrp_prune.pruning.report import WIDTH, as_text
from lrp_prune.shrinking.measuring import Speed

_SHOWN = 6


class Layer(NamedTuple):
    """The units that a layer reads.

    Args:
        name: of the layer.
        kind: ``"neuron"`` or ``"head"``.
        units: how many there were.
        pruned: how many of them masks prune.
        taken: how many of these were taken out.
        why: why the others were not.
    """

    name: str
    kind: str
    units: int
    pruned: int
    taken: int
    why: str


class Totals(NamedTuple):
    """How many entries all parameters have, and how many bytes."""

    parameters: int
    bytes: int

    @classmethod
    def of(cls, module: nn.Module) -> "Totals":
        """Those of a model; of tied parameters once."""
        found = list(module.parameters())
        return cls(sum(each.numel() for each in found), sum(each.numel() * each.element_size() for each in found))


@dataclass
class Shrunk:
    """A model that :func:`lrp_prune.shrink` has made smaller, and what it did; printing it says so.

    Args:
        model: the model, which was changed in place; of a ``LightningModule`` the one that is run.
        layers: those that units were pruned of.
        before, after: entries and bytes of all parameters.
        difference: how far the outputs are from the masked model's at most, as a share of the largest.
        tolerance: up to where that is rounding.
        numbers: what modules hold about their sizes and was set, by name.
        configuration: what became of a Hugging Face configuration; empty where there is none.
        dense_configuration: a copy of the configuration as it was.
        loads_plainly: whether the configuration says the new sizes, so that ``from_pretrained`` loads what is saved.
        speed: what was measured, if it was asked for.
    """

    model: nn.Module
    layers: Sequence[Layer]
    before: Totals
    after: Totals
    difference: float
    tolerance: float
    numbers: Mapping[str, object] = field(default_factory=dict)
    configuration: str = ""
    dense_configuration: Any = None
    loads_plainly: bool = False
    speed: Speed | None = None

    @property
    def taken(self) -> int:
        """How many units were taken out."""
        return sum(layer.taken for layer in self.layers)

    @property
    def left(self) -> dict[str, str]:
        """Layers with pruned units that are still there, as zeros: why."""
        return {layer.name: layer.why for layer in self.layers if layer.taken < layer.pruned}

    def save(self, folder: str | os.PathLike[str], *, max_shard_size: int = 5 * 10**9) -> None:
        """Write the model into a folder: for ``from_pretrained`` if that loads it, else for :func:`lrp_prune.load_shrunk`.

        Args:
            folder: is made if it is not there.
            max_shard_size: bytes of a file, at most, unless a single tensor has more.
        """
        from lrp_prune.shrinking.files import save_shrunk

        save_shrunk(self, folder, max_shard_size)

    def __str__(self) -> str:
        lines = [self._head(), _table(self.layers)]
        reasons: dict[str, list[str]] = {}
        for name, why in self.left.items():
            reasons.setdefault(why, []).append(name)
        for why, names in list(reasons.items())[:_SHOWN]:
            lines.append(f"still there, as zeros, in {listed(names, 3)}: {why}")
        if len(reasons) > _SHOWN:
            lines.append(f"and for {len(reasons) - _SHOWN} more reasons (see .left)")
        if self.configuration:
            lines.append(self.configuration)
        if self.speed is not None:
            lines.append(_measured(self.speed))
        return "\n".join(
            line if "\n" in line else fill(line, WIDTH, subsequent_indent="  ", break_long_words=False)
            for line in lines
        )

    def _head(self) -> str:
        counts = []
        for kind in ("neuron", "head"):
            layers = [layer for layer in self.layers if layer.kind == kind]
            if layers:
                units = sum(layer.units for layer in layers)
                counts.append(f"{sum(layer.taken for layer in layers):,} of {units:,} {kind}s")
        factor = self.before.parameters / max(self.after.parameters, 1)
        return (
            f"{' and '.join(counts)} taken out; {self.before.parameters:,} -> {self.after.parameters:,} parameters "
            f"({factor:.2f} times fewer), {_readable(self.before.bytes)} -> {_readable(self.after.bytes)}"
        )


def _table(layers: Sequence[Layer]) -> str:
    """Units, pruned, taken out, by kind of layer."""
    kinds: dict[str, list[Layer]] = {}
    for layer in layers:
        kinds.setdefault(layer_group(layer.name), []).append(layer)
    shared, names = common_path(list(kinds)), in_short(list(kinds))
    table = Table(box=SIMPLE_HEAD)
    table.add_column(f"layers of {shared}" if shared else "layers", overflow="fold")
    for title in ("units", "pruned", "taken out"):
        table.add_column(title, justify="right")
    for kind, several in kinds.items():
        number = f" ({len(several)})" if len(several) > 1 else ""
        columns = zip(*((layer.units, layer.pruned, layer.taken) for layer in several), strict=True)
        table.add_row(names[kind] + number, *(f"{sum(column):,}" for column in columns))
    return as_text(table)


def _measured(speed: Speed) -> str:
    return (
        f"a forward takes {1000 * speed.before:.1f} ms masked and {1000 * speed.after:.1f} ms without them, {speed.ratio:.2f} "
        f"times faster, and holds {_readable(speed.memory_before)} and {_readable(speed.memory_after)} beside the weights"
    )


def _readable(size: int) -> str:
    for unit, factor in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if size >= factor:
            return f"{size / factor:.1f} {unit}"
    return f"{size} B"
