"""The table that tells, after a round, what was pruned where."""

from collections.abc import Mapping

from lightning.fabric.utilities import rank_zero_info
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ProgressBar

from lrp_prune.pruning import Masks
from lrp_prune.pruning.compensation import Compensated
from lrp_prune.pruning.kinds import figures_by_kind
from lrp_prune.pruning.recalibration import Recalibration
from lrp_prune.pruning.report import WIDTH, layer_table, unscored_lines


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
    compensated: Compensated | None = None,
    width: int = WIDTH,
) -> str:
    """A round's table as text.

    Args:
        masks: after the round.
        previous: before it.
        index: the round, from 1.
        count: rounds in all.
        target: the total sparsity aimed at, or one for each pattern; where units are pruned, the share of these.
        method: how weights were scored.
        samples: reference samples that relevance was collected on; 0 if none was needed.
        explains: what is explained, in words; empty if nothing is.
        recalibration: how the weights that are kept were scaled, if they were.
        compensated: what came of updating them, if they were updated.
        width: characters in a line.
    """
    aim = f"{target:.2%}" if isinstance(target, float) else ", ".join(f"{p} {v:.2%}" for p, v in target.items())
    if masks.granularity != "weight":  # what units own is no even share of the weights
        aim += f" of the {' and '.join(f'{kind}s' for kind in masks.granularity.split(','))}"
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
    if compensated is not None:
        lines += f"\ncompensated: {compensated}"
    earlier = figures_by_kind(previous) if previous is not None else {}
    newly = {
        group: each.pruned - (earlier[group].pruned if group in earlier else 0)
        for group, each in figures_by_kind(masks).items()
    }
    return "\n".join([lines, *unscored_lines(masks), layer_table(masks, newly, width)])


def preview(masks: Masks, method: str, samples: int, explains: str) -> str:
    """What would be pruned, as text; of divided masks all processes must ask for it.

    Args:
        masks: that are not applied.
        method, samples, explains: see :func:`round_table`.
    """
    data = f" on {samples:,} samples" if samples else ""
    explained = f"\nexplains: {explains}" if explains else ""
    return f"Preview of pruning by {method}{data}: no weight is changed{explained}\n{masks.report()}"


def show(trainer: Trainer, text: str) -> None:
    """Print on rank 0, above the progress bar if there is one."""
    if not trainer.is_global_zero:
        return
    bar = trainer.progress_bar_callback
    if isinstance(bar, ProgressBar) and getattr(bar, "is_enabled", False):
        bar.print(text)
    else:
        rank_zero_info(text)
