"""Wanda: weights by their size and that of what they are multiplied with."""

from dataclasses import dataclass
from typing import Any, ClassVar

from lrp_prune.pruning.methods.base import Collects, Method
from lrp_prune.pruning.methods.propagating import check_collected


@dataclass(frozen=True)
class Wanda(Method):
    r"""Wanda (arXiv 2306.11695): :math:`|W_{ji}| \cdot \|a_i\|_2`, by forward passes alone.

    Of units it is the norm of what a unit contributes to the layers that read it,
    :math:`(\sum_{c \in u} \|w_c\|^2 \|a_c\|^2)^{1/2}`.

    Args:
        skip_first: how many tokens at the beginning of each sample of a causal language model are left out.
        target: a function of model and batch that runs the model; None: as it is run to explain it.
    """

    skip_first: int = 0
    target: Any = None
    name: ClassVar[str] = "wanda"
    scope: ClassVar[str] = "row"

    def __post_init__(self) -> None:
        check_collected(None, self.target, self.skip_first)

    def collects(self, kinds: tuple[str, ...]) -> Collects:
        """The norms of inputs, times the weights that read them."""
        return Collects("input_norm", "gradient", self.skip_first, explains=False)
