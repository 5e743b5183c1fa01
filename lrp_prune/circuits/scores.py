r"""Scores of units: what a method says each contributes to the task's metric :math:`m`.

With the activation ``a`` ``[samples, tokens, channels]`` of a unit in the clean prompt, ``a'`` in the counterfactual one, and the
gradient ``g`` that a composite propagates to it, the contribution of a unit at a token is summed over its channels:

===========================  =====================================================================================
``attnlrp``, ``cp_lrp``      :math:`a \cdot g`, its relevance (arXiv 2402.05602; SparC3, arXiv 2506.13727)
``gradient``                 :math:`a \cdot \partial m / \partial a`
``attribution_patching``     :math:`(a - a') \cdot \partial m / \partial a` (Nanda 2023; Syed et al., arXiv 2310.10348)
``attribution_patching_ig``  the same with the gradient averaged over inputs :math:`x' + \frac{k}{n} (x - x')`, k = 1 ... n,
                             of the embeddings (Hanna et al., arXiv 2403.17806)
``relp``                     :math:`(a - a') \cdot g` with AttnLRP's gradient at the clean prompt (after RelP, arXiv 2508.21258)
``activation``               :math:`\|a\|_2`
===========================  =====================================================================================

How tokens and samples are reduced is the statistic, see :mod:`lrp_prune.attribution.statistics`.
"""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from lrp_prune.attribution.propagation import attributing
from lrp_prune.attribution.running import undisturbed
from lrp_prune.circuits.ablation import Place, Reference, capturing, gating, places, replacing
from lrp_prune.circuits.references import reference_for
from lrp_prune.circuits.sites import Site, passing
from lrp_prune.names import named_modules
from lrp_prune.pruning import scorer
from lrp_prune.tasks.task import Batch, Task, answer_logits

COMPOSITES: dict[str, str] = {
    "attnlrp": "attnlrp",
    "cp_lrp": "cp_lrp",
    "gradient": "gradient",
    "attribution_patching": "gradient",
    "attribution_patching_ig": "gradient",
    "relp": "attnlrp",
}
"""The methods that propagate something, and by which composite."""
CONTRASTED: frozenset[str] = frozenset({"attribution_patching", "attribution_patching_ig", "relp"})
"""The methods that look at the difference from the counterfactual prompt."""


class UnitScores:
    """Sums the contributions of all units over batches.

    Args:
        sites: the units.
        statistic: ``"signed"``, ``"abs_sample"``, ``"abs_token"`` or ``"squared_token"``.
        skip_first: how many tokens at the beginning do not count.
    """

    def __init__(self, sites: Sequence[Site], statistic: str, skip_first: int = 0) -> None:
        self._sites, self._statistic, self._skip_first = sites, statistic, skip_first
        self._sums = {site.name: torch.zeros(site.units, dtype=torch.float64) for site in sites}
        self._samples = 0

    def add(self, contributions: Mapping[Place, Sequence[Tensor]], samples: int, norm: bool = False) -> None:
        """Add ``[samples, tokens, channels]`` contributions at each place; with ``norm`` the length over channels."""
        for site in self._sites:
            for tensor in contributions[site.module, site.at_output]:
                by_token = tensor.detach().double().reshape(samples, -1, site.units, tensor.shape[-1] // site.units)
                by_token = by_token[:, self._skip_first :]
                values = by_token.square().sum(-1).sqrt() if norm else by_token.sum(-1)
                self._sums[site.name] += self._reduced(values).cpu()
        self._samples += samples

    def _reduced(self, values: Tensor) -> Tensor:
        if self._statistic == "signed":
            return values.sum((0, 1))
        if self._statistic == "abs_sample":
            return values.sum(1).abs().sum(0)
        return (values.abs() if self._statistic == "abs_token" else values.square()).sum((0, 1))

    def compute(self) -> dict[str, Tensor]:
        """The means over samples, by site."""
        means = {name: sums / self._samples for name, sums in self._sums.items()}
        if self._statistic == "squared_token":
            means = {name: values.sqrt() for name, values in means.items()}
        return {name: values.float() for name, values in means.items()}


def unit_scores(
    model: nn.Module,
    sites: Sequence[Site],
    task: Task,
    method: str,
    statistic: str,
    *,
    metric: str | None,
    batch_size: int,
    steps: int,
    skip_first: int,
    unruled: str,
    seed: int,
    gates: Mapping[str, Tensor] | None = None,
    ablation: str = "counterfactual",
) -> dict[str, Tensor]:
    """Scores of all units, by site; of the model in which the units that ``gates`` close are ablated.

    See :func:`lrp_prune.circuits.discover` for the arguments.
    """
    if method == "random":
        generator = torch.Generator().manual_seed(seed)
        return {site.name: torch.rand(site.units, generator=generator) for site in sites}
    batches = task.batches(batch_size)
    if method == "wanda":
        reference = reference_for(model, sites, batches, ablation) if gates else None
        return _wanda(model, sites, batches, gates, reference, skip_first)
    scores = UnitScores(sites, statistic, skip_first)
    # Methods that run the counterfactual prompt themselves need no second run of it.
    interchange = bool(gates) and ablation == "counterfactual" and method in CONTRASTED
    reference = reference_for(model, sites, batches, ablation) if gates and not interchange else None
    for batch in batches:
        replacement = reference(batch) if reference else None
        samples = len(batch["input_ids"])
        if method == "activation":
            with (
                passing(model),
                gating(model, sites, gates or {}, replacement),
                capturing(model, places(sites)) as noted,
            ):
                answer_logits(model, batch)
            scores.add(noted, samples, norm=True)
        else:
            explained = _Explained(model, sites, batch, task, metric, COMPOSITES[method], unruled, gates, replacement)
            scores.add(explained.contributions(method, steps, interchange), samples)
    return scores.compute()


class _Explained:
    """One batch's contributions."""

    def __init__(
        self,
        model: nn.Module,
        sites: Sequence[Site],
        batch: Batch,
        task: Task,
        metric: str | None,
        composite: str,
        unruled: str,
        gates: Mapping[str, Tensor] | None,
        replacement: Reference | None,
    ) -> None:
        self._model, self._sites, self._batch = model, sites, batch
        self._target, self._composite, self._unruled = task.target(metric), composite, unruled
        self._gates, self._replacement = gates or {}, replacement

    def contributions(self, method: str, steps: int, interchange: bool = False) -> dict[Place, list[Tensor]]:
        """``[samples, tokens, channels]`` at each place; with ``interchange`` closed gates take the counterfactual's."""
        embeddings: Reference | None = None
        if method in CONTRASTED:
            tables = [(name, True) for name, module in _embeddings(self._model)]
            with passing(self._model), capturing(self._model, [*places(self._sites), *tables]) as other:
                answer_logits(self._model, self._batch, counterfactual=True)
            embeddings = {place: other[place] for place in tables if other[place]}
            if interchange:
                self._replacement = other
        if method != "attribution_patching_ig":
            clean, gradients = self._pass(None, 1.0)
        else:
            if not embeddings:
                raise ValueError(
                    "integrated gradients interpolate between embeddings, and the model calls no nn.Embedding"
                )
            for step in range(1, steps + 1):
                clean, found = self._pass(embeddings, step / steps)
                gradients = found if step == 1 else _added(gradients, found)
            gradients = {place: [tensor / steps for tensor in tensors] for place, tensors in gradients.items()}
        if method in CONTRASTED:
            clean = {
                place: [a - b for a, b in zip(tensors, other[place], strict=True)] for place, tensors in clean.items()
            }
        return {
            place: [a * g for a, g in zip(tensors, gradients[place], strict=True)] for place, tensors in clean.items()
        }

    def _pass(
        self, embeddings: Reference | None, share: float
    ) -> tuple[dict[Place, list[Tensor]], dict[Place, list[Tensor]]]:
        """Activations and propagated gradients, with the embeddings this share of the way to the clean ones."""
        model = self._model
        with ExitStack() as stack:
            stack.enter_context(undisturbed(model))
            propagation = stack.enter_context(attributing(model, self._composite, unruled=self._unruled))
            if embeddings:
                gate = {place: torch.tensor(share) for place in embeddings}
                stack.enter_context(replacing(model, gate, embeddings))
            stack.enter_context(gating(model, self._sites, self._gates, self._replacement))
            # A copy, so that only what this layer does with it counts, and nothing is added to it in place.
            noted = stack.enter_context(capturing(model, places(self._sites), Tensor.clone))
            value = self._target(model, self._batch)
            order = [(place, tensor) for place, tensors in noted.items() for tensor in tensors]
            found = propagation.gradients(value, [tensor for _, tensor in order])
        activations: dict[Place, list[Tensor]] = {place: [] for place in noted}
        gradients: dict[Place, list[Tensor]] = {place: [] for place in noted}
        for (place, tensor), gradient in zip(order, found, strict=True):
            activations[place].append(tensor.detach())
            gradients[place].append(torch.zeros_like(tensor) if gradient is None else gradient.detach())
        return activations, gradients


def _embeddings(model: nn.Module) -> list[tuple[str, nn.Module]]:
    return [(name, module) for name, module in named_modules(model).items() if isinstance(module, nn.Embedding)]


def _added(first: Mapping[Place, list[Tensor]], second: Mapping[Place, list[Tensor]]) -> dict[Place, list[Tensor]]:
    return {place: [a + b for a, b in zip(tensors, second[place], strict=True)] for place, tensors in first.items()}


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
    collected = scorer("wanda", model, include=[member.parameter for member in readers.values()], skip_first=skip_first)
    for batch in batches:
        replacement = reference(batch) if callable(reference) else None
        with gating(model, sites, gates or {}, replacement):
            collected.update({"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]})
    relevance = collected.compute()
    scores = {}
    for site in sites:
        weights = relevance[readers[site.name].parameter].movedim(readers[site.name].dim, 0)
        scores[site.name] = weights.reshape(site.units, -1).sum(1).cpu()
    return scores
