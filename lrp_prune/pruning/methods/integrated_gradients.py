"""Units by integrated gradients."""

from dataclasses import dataclass
from typing import Any, ClassVar

from lrp_prune.attribution.defaults import best_for
from lrp_prune.pruning.methods.base import Collects
from lrp_prune.pruning.methods.of_units import UnitMethod
from lrp_prune.pruning.methods.propagating import check_collected


@dataclass(frozen=True)
class IntegratedGradients(UnitMethod):
    r"""Integrated gradients (arXiv 1703.01365) through a unit: its conductance (Dhamdhere et al., arXiv 1805.12233).

    With all inputs at :math:`\alpha x`, from the baseline of zeros to the sample, the unit's activation is
    :math:`a(\alpha)` and its conductance :math:`\int_0^1 \frac{\partial f}{\partial a} \, da(\alpha)`, by the trapezoidal rule.
    Over the units of a layer that all of the network goes through it sums to :math:`f(x) - f(0)`. Where inputs are tokens, it is
    their embeddings that are scaled. Each layer has to read the same at each step: a mixture of experts, whose router picks other
    tokens on the way, is refused where their number differs, and is better not scored by it.

    Args:
        steps: between the baseline and the sample; there are ``steps + 1`` passes over each batch.
        statistic: how tokens and samples are reduced, see :func:`lrp_prune.attribute`; None for the best of units.
        target: what is explained, see :func:`lrp_prune.attribute`; None to infer it.
        skip_first: how many tokens at the beginning of each sample of a causal language model are left out.

    Raises:
        ValueError: for less than one step, or a statistic or target that does not exist.

    Example:
        >>> import torch, lrp_prune
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> batches = [(torch.randn(16, 4), torch.randint(2, (16,)))]
        >>> method = lrp_prune.IntegratedGradients(steps=8)
        >>> lrp_prune.prune(model, batches, 0.5, method, granularity="neuron").granularity
        'neuron'
    """

    steps: int = 20
    statistic: Any = None
    target: Any = None
    skip_first: int = 0
    name: ClassVar[str] = "integrated_gradients"

    def __post_init__(self) -> None:
        if isinstance(self.steps, bool) or not isinstance(self.steps, int) or self.steps < 1:
            raise ValueError(f"steps must be an integer of at least 1, got {self.steps!r}")
        check_collected(self.statistic, self.target, self.skip_first)

    def collects(self, kinds: tuple[str, ...]) -> Collects:
        """Changes of activations times gradients, on the way to each sample."""
        self.check_kinds(kinds)
        return Collects(self.statistic or best_for(kinds).statistic, "gradient", self.skip_first, steps=self.steps)
