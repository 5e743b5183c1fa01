"""One batch explained: a forward and backward pass or several, and what each unit contributed in them."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial

import torch
from torch import Tensor, nn

from lrp_prune.circuits.ablation import Place, Reference, capturing, gating, places, replacing
from lrp_prune.circuits.methods import Way
from lrp_prune.circuits.sites import Site, passing
from lrp_prune.engine.propagation import attributing
from lrp_prune.models.states import undisturbed
from lrp_prune.names import named_modules
from lrp_prune.tasks.task import Batch, Task, answer_logits

_Tensors = dict[Place, list[Tensor]]


class Explained:
    """One batch's contributions, by the formulas of :mod:`lrp_prune.circuits.scores`."""

    def __init__(
        self,
        model: nn.Module,
        sites: Sequence[Site],
        batch: Batch,
        task: Task,
        metric: str | None,
        way: Way,
        unruled: str,
        gates: Mapping[str, Tensor] | None,
        replacement: Reference | None,
    ) -> None:
        self._model, self._sites, self._batch = model, sites, batch
        self._target, self._way, self._unruled = task.target(metric), way, unruled
        self._gates, self._replacement = gates or {}, replacement

    def contributions(self, interchange: bool = False) -> _Tensors:
        """``[samples, tokens, channels]`` at each place; with ``interchange`` closed gates take the counterfactual's."""
        if self._way.over_gates:
            return self._over_gates(self._way.steps)
        if not self._way.contrasted:
            return _each(torch.mul, *self._pass())
        tables = [
            (name, True) for name, module in named_modules(self._model).items() if isinstance(module, nn.Embedding)
        ]
        with passing(self._model), capturing(self._model, [*places(self._sites), *tables]) as other:
            answer_logits(self._model, self._batch, counterfactual=True)
        if interchange:
            self._replacement = other
        if self._way.steps:
            embeddings = {place: other[place] for place in tables if other[place]}
            clean, gradients = self._over_inputs(embeddings, self._way.steps)
        else:
            clean, gradients = self._pass()
        return _each(torch.mul, _each(torch.sub, clean, other), gradients)

    def _over_inputs(self, embeddings: Reference, steps: int) -> tuple[_Tensors, _Tensors]:
        """Clean activations, and the mean of gradients with the embeddings k / n of the way to the clean ones, k = 1 ... n."""
        if not embeddings:
            raise ValueError("integrated gradients interpolate between embeddings, and the model calls no nn.Embedding")
        total: _Tensors = {}
        for step in range(1, steps + 1):
            clean, gradients = self._pass(embeddings, embeddings, step / steps)
            total = _each(torch.add, total, gradients) if total else gradients
        return clean, {place: [tensor / steps for tensor in tensors] for place, tensors in total.items()}

    def _over_gates(self, steps: int) -> _Tensors:
        """The mean of (a - r) g with all units at z a + (1 - z) r, z = (k - 1/2) / n, k = 1 ... n."""
        total: _Tensors = {}
        for step in range(steps):
            share = (step + 0.5) / steps
            # Before it is moved: z a + (1 - z) r is rounded where r is not, and a difference of 0 must be 0.
            with capturing(self._model, places(self._sites)) as activations:
                _, gradients = self._pass(places(self._sites), self._replacement, share)
            moved = _each(torch.sub, activations, self._replacement) if self._replacement else activations
            total = _each(
                partial(torch.addcmul, value=1 / steps), total or _each(torch.zeros_like, moved), moved, gradients
            )
        return total

    def _pass(
        self, moved: Iterable[Place] = (), toward: Reference | None = None, share: float = 1.0
    ) -> tuple[_Tensors, _Tensors]:
        """Activations and propagated gradients of the units, with ``moved`` places this share of the way from ``toward``."""
        model = self._model
        with ExitStack() as stack:
            stack.enter_context(undisturbed(model))
            propagation = stack.enter_context(attributing(model, self._way.composite, unruled=self._unruled))
            stack.enter_context(gating(model, self._sites, self._gates, self._replacement))
            stack.enter_context(replacing(model, {place: torch.tensor(share, device="cpu") for place in moved}, toward))
            # A copy, so that only what this layer does with it counts, and nothing is added to it in place.
            noted = stack.enter_context(capturing(model, places(self._sites), Tensor.clone))
            value = self._target(model, self._batch)
            order = [(place, tensor) for place, tensors in noted.items() for tensor in tensors]
            found = propagation.gradients(value, [tensor for _, tensor in order])
        activations: _Tensors = {place: [] for place in noted}
        gradients: _Tensors = {place: [] for place in noted}
        for (place, tensor), gradient in zip(order, found, strict=True):
            activations[place].append(tensor.detach())
            gradients[place].append(torch.zeros_like(tensor) if gradient is None else gradient.detach())
        return activations, gradients


def _each(function: Callable[..., Tensor], first: Reference, *others: Reference) -> _Tensors:
    """The function of corresponding tensors."""
    return {
        place: [function(*aligned) for aligned in zip(tensors, *(other[place] for other in others), strict=True)]
        for place, tensors in first.items()
    }
