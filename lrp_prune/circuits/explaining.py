"""One batch explained: a forward and backward pass or several, and what each unit contributed in them."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from lrp_prune.attribution.propagation import attributing
from lrp_prune.attribution.running import undisturbed
from lrp_prune.circuits.ablation import Place, Reference, capturing, gating, places, replacing
from lrp_prune.circuits.sites import Site, passing
from lrp_prune.names import named_modules
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


class Explained:
    """One batch's contributions, by the formulas of :mod:`lrp_prune.circuits.scores`."""

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
