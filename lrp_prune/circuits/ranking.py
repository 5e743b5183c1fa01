"""Rankings: all nodes with their scores, from which circuits of any size are taken."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lrp_prune.arguments import check_integer, check_number
from lrp_prune.circuits.circuit import Circuit, Node, site_from_list, site_to_list
from lrp_prune.circuits.sites import Site
from lrp_prune.pruning import Masks
from lrp_prune.selection import bits
from lrp_prune.selection.keys import ORDERS
from lrp_prune.selection.selection import smallest
from lrp_prune.storage import load_tensors, save_tensors


class Ranking:
    """Nodes by importance.

    Args:
        scores: group -> ``[units]``, or parameter name -> scores of its shape.
        sites: where the units are; empty for weights.
        granularity: ``"weight"``, or the kinds of units, joined by commas.
        order: ``"absolute"``: by the size of the score; ``"signed"``: the most positive is the most important.
        rounds: the round in which each node was dropped, higher is later, in the shapes of ``scores``; a node that was
            dropped later is more important whatever its score. None: all in one.
        model: the model's description.
        description: how it was made, in plain values.

    Example:
        >>> ranking = Ranking({"weight": torch.tensor([0.1, -3.0, 2.0])}, [], "weight")
        >>> ranking.at(2).kept["weight"], ranking.at(1 / 3).kept["weight"]
        (tensor([False,  True,  True]), tensor([False,  True, False]))
        >>> [node.unit for node in ranking.nodes()]
        [1, 2, 0]
    """

    def __init__(
        self,
        scores: Mapping[str, Tensor],
        sites: Sequence[Site],
        granularity: str,
        order: str = "absolute",
        rounds: Mapping[str, Tensor] | None = None,
        model: str = "",
        description: Mapping[str, Any] | None = None,
    ) -> None:
        if order not in ORDERS:
            raise ValueError(f"order must be one of {ORDERS}, got {order!r}")
        self.scores, self.sites, self.granularity = dict(scores), tuple(sites), granularity
        self.order, self.model = order, model
        self.rounds = dict(rounds) if rounds is not None else None
        self.description: dict[str, Any] = dict(description or {})

    def __len__(self) -> int:
        return sum(tensor.numel() for tensor in self.scores.values())

    def __repr__(self) -> str:
        return f"Ranking({len(self):,} nodes, {self.granularity}, {self.order}, {self.description.get('method', '')})"

    def count(self, size: int | float) -> int:
        """Nodes in a circuit of that size: an integer is a number of nodes, a float a fraction, rounded down as MIB does.

        Raises:
            ValueError: if it is out of range.
        """
        check_size("size", size)
        number = int(size * len(self) + 1e-9) if isinstance(size, float) else size
        if number > len(self):
            raise ValueError(f"size must be a fraction in [0, 1] or a number up to {len(self)}, got {size!r}")
        return number

    def at(self, size: int | float) -> Circuit:
        """The circuit of the most important nodes, exactly so many; equal ones by position.

        Args:
            size: a number of nodes, or a fraction (a float) of all.
        """
        number = self.count(size)
        values, alive = [*self.scores.values()], None
        if self.rounds is not None:
            values, alive = self._of_round(number)
        packed = smallest(
            values,
            len(self) - number,
            order=self.order,
            kept=alive,
            names=list(self.scores),
        ).masks()
        kept = {
            name: bits.unpack(chosen, self.scores[name].shape) for name, chosen in zip(self.scores, packed, strict=True)
        }
        return Circuit(kept, self.sites, self.granularity, self.model, {**self.description, "order": self.order})

    def _of_round(self, number: int) -> tuple[list[Tensor], list[Tensor | None]]:
        """Values in which only the round counts within which ``number`` falls: later ones are largest, earlier dropped."""
        assert self.rounds is not None
        last = max(int(tensor.max()) for tensor in self.rounds.values() if tensor.numel())
        counts = sum(torch.bincount(tensor.reshape(-1).long(), minlength=last + 1) for tensor in self.rounds.values())
        assert isinstance(counts, Tensor)
        boundary, later = last, 0
        while boundary > 0 and later + int(counts[boundary]) < number:
            later += int(counts[boundary])
            boundary -= 1
        largest = torch.finfo(torch.float32).max
        values = [self.scores[name].float().masked_fill(self.rounds[name] > boundary, largest) for name in self.scores]
        return values, [bits.pack((self.rounds[name] >= boundary).cpu()) for name in self.scores]

    def nodes(self, limit: int | None = None) -> list[Node]:
        """The ``limit`` most important nodes with their scores, the most important first; None for all."""
        found = []
        for node in self.at(len(self) if limit is None else min(limit, len(self))).nodes():
            score = float(self.scores[node.group].reshape(-1)[node.unit])
            dropped = int(self.rounds[node.group].reshape(-1)[node.unit]) if self.rounds is not None else 0
            found.append((dropped, abs(score) if self.order == "absolute" else score, node._replace(score=score)))
        return [node for _, _, node in sorted(found, key=lambda entry: (-entry[0], -entry[1]))]

    def to_masks(self, size: int | float) -> Masks:
        """Masks that zero all but the circuit of that size."""
        return self.at(size).to_masks()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write to a safetensors file with its description as JSON; atomic."""
        tensors = {f"scores/{name}": tensor for name, tensor in self.scores.items()}
        tensors |= {f"rounds/{name}": tensor for name, tensor in (self.rounds or {}).items()}
        description = {
            "granularity": self.granularity,
            "order": self.order,
            "model": self.model,
            "sites": [site_to_list(site) for site in self.sites],
            "description": self.description,
        }
        save_tensors(path, "ranking", tensors, description)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Ranking":
        """Read what :meth:`save` wrote.

        Raises:
            ValueError: if the file is damaged, of another kind, or of a newer version.
        """
        tensors, description = load_tensors(path, "ranking")
        scores = {name.removeprefix("scores/"): value for name, value in tensors.items() if name.startswith("scores/")}
        rounds = {name.removeprefix("rounds/"): value for name, value in tensors.items() if name.startswith("rounds/")}
        return cls(
            scores,
            [site_from_list(site) for site in description["sites"]],
            description["granularity"],
            description["order"],
            rounds or None,
            description["model"],
            description["description"],
        )


def check_size(name: str, size: Any) -> None:
    """Refuse what is neither a number of nodes nor, as a float, a fraction of all.

    Raises:
        ValueError: likewise.
    """
    if isinstance(size, float):
        check_number(name, size, "[0, 1]")
    else:
        check_integer(name, size, 0)
