"""The table that tells, after a round, what was pruned where."""

import io
import math
from collections.abc import Mapping

from lightning.fabric.utilities import rank_zero_info
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ProgressBar
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from lrp_prune.pruning import Masks
from lrp_prune.pruning.recalibration import Recalibration
from lrp_prune.unscored import described, entries_of, share

_WIDTH = 100


def layer_group(name: str) -> str:
    """The kind of layer a parameter belongs to: its name with the numbers of the blocks around it left open.

    Example:
        >>> layer_group("model.layers.11.mlp.up_proj.weight"), layer_group("classifier.2.weight")
        ('model.layers.*.mlp.up_proj', 'classifier.2')
    """
    *blocks, last = name.removesuffix(".weight").split(".")
    return ".".join([*("*" if block.isdigit() else block for block in blocks), last])


def common_path(groups: list[str]) -> str:
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


def group_sparsities(masks: Masks) -> dict[str, tuple[int, int, int]]:
    """Number of parameters, of entries and of pruned entries in each group of layers."""
    groups: dict[str, tuple[int, int, int]] = {}
    for name in masks:
        parameters, entries, pruned = groups.get(layer_group(name), (0, 0, 0))
        groups[layer_group(name)] = (
            parameters + 1,
            entries + math.prod(masks.shapes[name]),
            pruned + masks.pruned_in(name),
        )
    return groups


def round_table(
    masks: Masks,
    previous: Masks | None,
    *,
    index: int,
    count: int,
    target: float | Mapping[str, float],
    method: str,
    samples: int,
    explains: str = "",
    recalibration: Recalibration | None = None,
    width: int = _WIDTH,
) -> str:
    """A round's table as text.

    Args:
        masks: after the round.
        previous: before it.
        index: the round, from 1.
        count: rounds in all.
        target: the total sparsity aimed at, or one for each pattern.
        method: how weights were scored.
        samples: reference samples that relevance was collected on; 0 if none was needed.
        explains: what is explained, in words; empty if nothing is.
        recalibration: what was done to the weights that are kept, if it was.
        width: characters in a line.
    """
    aim = f"{target:.2%}" if isinstance(target, float) else ", ".join(f"{p} {v:.2%}" for p, v in target.items())
    before = previous.num_pruned if previous is not None else 0
    data = f" on {samples:,} samples" if samples else ""
    lines = (
        f"Pruning round {index} of {count} by {method}{data}\n"
        f"total sparsity {masks.sparsity:.2%} (target {aim}): {masks.num_pruned:,} of {masks.num_entries:,} weights "
        f"pruned, {masks.num_pruned - before:,} of them now"
    )
    if explains:
        lines += f"\nexplains: {explains}"
    if recalibration is not None:
        lines += f"\nrecalibrated: {recalibration}"
    if masks.unscored:
        missing = entries_of(masks.unscored, masks.shapes)
        lines += f"\nnot scored and kept: {share(missing, masks.num_entries)}: {described(masks.unscored)}"
    groups = group_sparsities(masks)
    shared = common_path(list(groups))
    table = Table(box=SIMPLE_HEAD)
    table.add_column(f"layers of {shared}" if shared else "layers", overflow="fold", min_width=18)
    for title in ("tensors", "weights", "pruned", "newly", "sparsity", "lowest", "highest"):
        table.add_column(title, justify="right")
    earlier = group_sparsities(previous) if previous is not None else {}
    for group, (parameters, entries, pruned) in groups.items():
        each = [masks.sparsity_of(name) for name in masks if layer_group(name) == group]
        newly = pruned - earlier.get(group, (0, 0, 0))[2]
        shares = [f"{value:.2%}" for value in (pruned / max(entries, 1), min(each), max(each))]
        counts = [f"{count:,}" for count in (parameters, entries, pruned, newly)]
        table.add_row(group[len(shared) + bool(shared) :], *counts, *shares)
    buffer = io.StringIO()
    Console(file=buffer, width=width).print(table)
    return lines + "\n" + "\n".join(line.rstrip() for line in buffer.getvalue().splitlines() if line.strip())


def show(trainer: Trainer, text: str) -> None:
    """Print on rank 0, above the progress bar if there is one."""
    if not trainer.is_global_zero:
        return
    bar = trainer.progress_bar_callback
    if isinstance(bar, ProgressBar) and getattr(bar, "is_enabled", False):
        bar.print(text)
    else:
        rank_zero_info(text)
