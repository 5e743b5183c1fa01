"""What the methods have in common that score units and nothing else."""

from lrp_prune.pruning.methods.base import Method

_UNITS = frozenset({"neuron", "head", "block"})


class UnitMethod(Method):
    """A method that scores neurons, heads and blocks."""

    def check_kinds(self, kinds: tuple[str, ...]) -> None:
        """Refuse what it has no scores of.

        Raises:
            ValueError: for weights, and rows of embeddings.
        """
        others = [kind for kind in kinds if kind not in _UNITS]
        if others:
            raise ValueError(
                f"method {self.name!r} scores units, not {others[0]}s: pass granularity='neuron', 'head' or 'block', or another "
                "method"
            )
