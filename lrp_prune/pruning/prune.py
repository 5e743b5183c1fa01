"""One shot: batches in, pruned model out."""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from lrp_prune.pruning.masks import Masks
from lrp_prune.pruning.scorers import scorer, selection_options
from lrp_prune.pruning.select import select


def prune(
    model: nn.Module,
    batches: Iterable[Any] = (),
    sparsity: float | Mapping[str, float] = 0.5,
    method: str = "lrp",
    scope: str | None = None,
    ranking: str = "absolute",
    normalize: str | None = "auto",
    **options: Any,
) -> Masks:
    """Prune a model in place, without training.

    Args:
        model: a Hugging Face model, any ``nn.Module``, or a ``LightningModule``.
        batches: reference samples, see :func:`lrp_prune.attribute`; not needed for ``magnitude`` and ``random``.
        sparsity: the fraction to prune, in all or by pattern of parameter names.
        method: ``"lrp"``, ``"wanda"``, ``"gradient"``, ``"magnitude"`` or ``"random"``.
        scope: what is compared: ``"global"``, ``"layer"``, ``"row"``, ``"column"`` or ``"N:M"``; None for the method's best.
        ranking: ``"absolute"`` or ``"ascending"``.
        normalize: None, ``"mean"``, ``"sum"`` or ``"max"``; ``"auto"`` for the method's best.
        **options: of :func:`lrp_prune.pruning.scorer`: ``target``, ``composite``, ``statistic``, ``granularity``,
            ``include``, ``exclude``, ...

    Returns:
        The masks; nothing of the model has changed if an error is raised.

    Raises:
        ValueError: for wrong arguments, and what :func:`lrp_prune.attribute` raises.

    Example:
        >>> import torch, lrp_prune
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> batches = [(torch.randn(16, 4), torch.randint(2, (16,)))]
        >>> lrp_prune.prune(model, batches, sparsity=0.5).sparsity
        0.5
    """
    chosen = scorer(method, model, **options)
    for batch in batches:
        chosen.update(batch)
    selection = selection_options(method, options.get("granularity", "weight"), scope, ranking, normalize)
    masks = select(chosen.compute(), sparsity=sparsity, **selection)
    masks.apply_(model)
    return masks
