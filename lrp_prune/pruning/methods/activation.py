"""Units by how large their activations are."""

from dataclasses import dataclass
from typing import Any, ClassVar

from lrp_prune.pruning.methods.base import Collects
from lrp_prune.pruning.methods.of_units import UnitMethod
from lrp_prune.pruning.methods.propagating import check_collected


@dataclass(frozen=True)
class Activation(UnitMethod):
    r"""The size of a unit's activations where layers read it, :math:`(\sum_{c \in u} \|a_c\|_2^2)^{1/2}`: forward passes alone.

    Of activations as a criterion see Molchanov et al. (arXiv 1611.06440, section 2.2). Unlike :class:`Wanda` it does not look at
    the weights that read them.

    Args:
        skip_first: how many tokens at the beginning of each sample of a causal language model are left out.
        target: a function of model and batch that runs the model; None: as it is run to explain it.

    Example:
        >>> import torch, lrp_prune
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> batches = [(torch.randn(16, 4), torch.randint(2, (16,)))]
        >>> lrp_prune.prune(model, batches, 0.5, "activation", granularity="neuron").granularity
        'neuron'
    """

    skip_first: int = 0
    target: Any = None
    name: ClassVar[str] = "activation"

    def __post_init__(self) -> None:
        check_collected(None, self.target, self.skip_first)

    def collects(self, kinds: tuple[str, ...]) -> Collects:
        """The norms of activations."""
        self.check_kinds(kinds)
        return Collects("activation", "gradient", self.skip_first, explains=False)
