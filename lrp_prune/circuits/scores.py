r"""Scores of units: what a method says each contributes to the task's metric :math:`m`.

With the activation ``a`` ``[samples, tokens, channels]`` of a unit in the clean prompt, ``a'`` in the counterfactual one, and the
gradient ``g`` that a composite propagates to it, the contribution of a unit at a token is summed over its channels:

===========================  =====================================================================================
``attnlrp``, ``cp_lrp``      :math:`a \cdot g`, its relevance (arXiv 2402.05602; SparC3, arXiv 2506.13727)
``gradient``                 :math:`a \cdot \partial m / \partial a`
``attribution_patching``     :math:`(a - a') \cdot \partial m / \partial a` (Nanda 2023; Syed et al., arXiv 2310.10348)
``attribution_patching_ig``  the same with the gradient averaged over inputs :math:`x' + \frac{k}{n} (x - x')`, k = 1 ... n,
                             of the embeddings (Hanna et al., arXiv 2403.17806)
``gate_ig``                  :math:`(a - r) \cdot \partial m / \partial a` averaged over the model with all units at once at
                             :math:`z a + (1 - z) r`, :math:`z = (k - \frac12) / n`, k = 1 ... n: integrated gradients
                             (arXiv 1703.01365) over the gates, from the ablation by ``r`` to the full model
``relp``                     :math:`(a - a') \cdot g` with AttnLRP's gradient at the clean prompt (after RelP, arXiv 2508.21258)
``activation``               :math:`\|a\|_2`
===========================  =====================================================================================

How tokens and samples are reduced is the statistic, see :mod:`lrp_prune.relevance.statistics`.
"""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from lrp_prune.circuits.ablation import Place, capturing, gating, places
from lrp_prune.circuits.explaining import Explained
from lrp_prune.circuits.methods import Way
from lrp_prune.circuits.references import reference_for
from lrp_prune.circuits.sites import NOT_ALIGNED, Site, passing
from lrp_prune.pruning import Wanda, scorer
from lrp_prune.relevance.statistics import statistic_of
from lrp_prune.tasks.task import Batch, Task, answer_logits


class UnitScores:
    """Sums the contributions of all units over batches.

    Args:
        sites: the units.
        statistic: ``"signed"``, ``"abs_sample"``, ``"abs_token"``, ``"pxp"`` or ``"squared_token"``.
        skip_first: how many tokens at the beginning do not count.
    """

    def __init__(self, sites: Sequence[Site], statistic: str, skip_first: int = 0) -> None:
        self._sites, self._statistic, self._skip_first = sites, statistic_of(statistic), skip_first
        self._statistic.check_suits("unit")
        self._sums = {site.name: torch.zeros(site.units, dtype=torch.float64, device="cpu") for site in sites}
        self._samples = 0

    def add(self, contributions: Mapping[Place, Sequence[Tensor]], samples: int, norm: bool = False) -> None:
        """Add ``[samples, tokens, channels]`` contributions at each place; with ``norm`` the length over channels."""
        for site in self._sites:
            for tensor in contributions[site.module, site.at_output]:
                if tensor[..., 0].numel() % samples:
                    raise ValueError(NOT_ALIGNED.format(name=site.module))
                by_token = tensor.detach().double().reshape(samples, -1, site.units, tensor.shape[-1] // site.units)
                by_token = by_token[:, self._skip_first :]
                values = by_token.square().sum(-1).sqrt() if norm else by_token.sum(-1)
                self._sums[site.name] += self._statistic.reduced(values).cpu()
        self._samples += samples

    def compute(self) -> dict[str, Tensor]:
        """The means over samples, by site."""
        return {name: self._statistic.read(sums, self._samples).float() for name, sums in self._sums.items()}


def unit_scores(
    model: nn.Module,
    sites: Sequence[Site],
    task: Task,
    way: Way,
    *,
    metric: str | None,
    batch_size: int,
    unruled: str,
    gates: Mapping[str, Tensor] | None = None,
    ablation: str = "counterfactual",
) -> dict[str, Tensor]:
    """Scores of all units, by site; of the model in which the units that ``gates`` close are ablated.

    See :func:`lrp_prune.circuits.discover` for the arguments.
    """
    if way.name == "random":
        generator = torch.Generator().manual_seed(way.seed)
        return {site.name: torch.rand(site.units, generator=generator, device="cpu") for site in sites}
    batches = task.batches(batch_size)
    if way.name == "wanda":
        reference = reference_for(model, sites, batches, ablation) if gates else None
        return _wanda(model, sites, batches, gates, reference, way.skip_first)
    scores = UnitScores(sites, way.statistic, way.skip_first)
    # Methods that run the counterfactual prompt themselves need no second run of it.
    interchange = bool(gates) and ablation == "counterfactual" and way.contrasted
    replaced = bool(gates) or way.over_gates
    reference = reference_for(model, sites, batches, ablation) if replaced and not interchange else None
    for batch in batches:
        replacement = reference(batch) if reference else None
        samples = len(batch["input_ids"])
        if way.name == "activation":
            with (
                passing(model),
                gating(model, sites, gates or {}, replacement),
                capturing(model, places(sites)) as noted,
            ):
                answer_logits(model, batch)
            scores.add(noted, samples, norm=True)
        else:
            explained = Explained(model, sites, batch, task, metric, way, unruled, gates, replacement)
            scores.add(explained.contributions(interchange), samples)
    return scores.compute()


def _wanda(
    model: nn.Module,
    sites: Sequence[Site],
    batches: Iterable[Batch],
    gates: Mapping[str, Tensor] | None,
    reference: object,
    skip_first: int,
) -> dict[str, Tensor]:
    r"""Wanda's :math:`|W_{ji}| \cdot \|a_i\|_2` summed over the weights that read a unit's channels."""
    readers = {site.name: site.members[0] for site in sites}
    collected = scorer(Wanda(skip_first), model, include=[member.parameter for member in readers.values()])
    for batch in batches:
        replacement = reference(batch) if callable(reference) else None
        with gating(model, sites, gates or {}, replacement):
            collected.update({"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]})
    relevance = collected.compute()
    scores = {}
    for site in sites:
        reader = readers[site.name]
        weights = relevance[reader.parameter].movedim(1 if reader.dim is None else reader.dim, 0)
        scores[site.name] = weights.reshape(site.units, -1).sum(1).cpu()
    return scores
