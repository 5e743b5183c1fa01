"""Units by the first order of what their removal changes."""

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from lrp_prune.pruning.methods.base import Collects, Scorable
from lrp_prune.pruning.methods.of_units import UnitMethod
from lrp_prune.pruning.methods.propagating import check_collected


@dataclass(frozen=True)
class Taylor(UnitMethod):
    r"""The first order of a Taylor expansion in a unit's activation (Molchanov et al., arXiv 1611.06440, section 2.2).

    :math:`\Theta_u = \frac{1}{N} \sum_\mathrm{samples} \left| \sum_{c \in u, t} a_{tc} \, \partial C / \partial a_{tc} \right|`,
    and each layer's scores are divided by their length, :math:`\Theta_u / (\sum_v \Theta_v^2)^{1/2}`. There :math:`C` is the
    training's loss; here it is what is explained, so pass the loss as ``target`` for the same.

    Args:
        target: what is explained, see :func:`lrp_prune.attribute`; None to infer it.
        skip_first: how many tokens at the beginning of each sample of a causal language model are left out.

    Example:
        By the loss:

        >>> import torch, lrp_prune
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> batches = [(torch.randn(16, 4), torch.randint(2, (16,)))]
        >>> def loss(model, batch):
        ...     return torch.nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="sum")
        >>> lrp_prune.prune(model, batches, 0.5, lrp_prune.Taylor(target=loss), granularity="neuron").granularity
        'neuron'
    """

    target: Any = None
    skip_first: int = 0
    name: ClassVar[str] = "taylor"

    def __post_init__(self) -> None:
        check_collected(None, self.target, self.skip_first)

    def collects(self, kinds: tuple[str, ...]) -> Collects:
        """Activations times gradients, summed over each sample."""
        self.check_kinds(kinds)
        return Collects("abs_sample", "gradient", self.skip_first)

    def score(self, scorable: Scorable) -> Tensor:
        """What was collected, in units of its layer's length."""
        collected = super().score(scorable)
        length = collected.norm()
        return collected / length if length > 0 else collected
