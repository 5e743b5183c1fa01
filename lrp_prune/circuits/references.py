"""Replacement activations for a task's batches."""

from collections.abc import Callable, Sequence
from functools import partial

from torch import nn

from lrp_prune.circuits.ablation import Reference, check_ablation, counterfactual_reference, mean_reference
from lrp_prune.circuits.sites import Site
from lrp_prune.tasks.task import Batch, answer_logits


def reference_for(
    model: nn.Module, sites: Sequence[Site], batches: Sequence[Batch], ablation: str
) -> Callable[[Batch], Reference | None]:
    """What gives a batch's replacement activations.

    Args:
        model: the module, not ablated.
        sites: the units.
        batches: over whose counterfactual prompts means are taken.
        ablation: one of :data:`~lrp_prune.circuits.ablation.ABLATIONS`.

    Raises:
        ValueError: for an unknown ablation.
    """
    check_ablation(ablation)
    if ablation == "zero" or not sites:
        return lambda batch: None
    if ablation == "mean":
        runs = [partial(answer_logits, model, batch, counterfactual=True) for batch in batches]
        means = mean_reference(runs, model, sites)
        return lambda batch: means
    return lambda batch: counterfactual_reference(
        partial(answer_logits, model, batch, counterfactual=True), model, sites
    )
