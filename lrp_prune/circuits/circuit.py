"""Circuits: which units (or weights) of a model are kept for a task, to be saved, compared and turned into masks."""

import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lrp_prune.circuits.ablation import effective
from lrp_prune.circuits.sites import Site
from lrp_prune.pruning import Masks
from lrp_prune.relevance.members import Member
from lrp_prune.selection import bits
from lrp_prune.storage import load_tensors, save_tensors


class Node(NamedTuple):
    """One unit: its group (``kind:module``; for weights the parameter's name), index within it, and score if it has one."""

    group: str
    unit: int
    score: float = 0.0


class Overlap(NamedTuple):
    """How much two circuits share."""

    shared: int
    first: int
    second: int
    jaccard: float
    """Shared nodes over nodes of either; 1 for two empty circuits."""
    expected: float
    """Shared nodes expected by chance, if each kept as many nodes of each group at random."""


class Circuit:
    """The kept units of a model: everything else is ablated.

    Args:
        kept: group -> bool ``[units]``, True is kept; for granularity ``"weight"`` parameter name -> bool of its shape.
        sites: where the units are; empty for weights.
        granularity: ``"weight"``, or the kinds of units, joined by commas.
        model: the model's description.
        description: whatever should be known of its making (method, task, scores); plain values.

    Raises:
        ValueError: if groups and sites do not fit together.

    Example:
        >>> site = Site("mlp_neuron", "2", 3, 1, (Member("2.weight", torch.tensor([[0, 1, 2]])),), (("2.weight", (2, 3)),))
        >>> circuit = Circuit({"mlp_neuron:2": torch.tensor([True, False, True])}, [site], "mlp_neuron")
        >>> circuit.size, circuit.total, (~circuit).size
        (2, 3, 1)
        >>> circuit.to_masks()["2.weight"]
        tensor([[ True, False,  True],
                [ True, False,  True]])
    """

    def __init__(
        self,
        kept: Mapping[str, Tensor],
        sites: Sequence[Site],
        granularity: str,
        model: str = "",
        description: Mapping[str, Any] | None = None,
    ) -> None:
        self.kept = {group: mask.detach().to("cpu", torch.bool) for group, mask in kept.items()}
        self.sites = tuple(sites)
        self.granularity, self.model = granularity, model
        self.description: dict[str, Any] = dict(description or {})
        if granularity != "weight":
            units = {site.name: site.units for site in self.sites}
            for group in {*self.kept, *units}:
                if group not in self.kept or group not in units or self.kept[group].shape != (units[group],):
                    raise ValueError(f"the circuit's group {group!r} and its sites do not fit together")

    @property
    def size(self) -> int:
        """How many nodes are kept."""
        return sum(int(mask.sum()) for mask in self.kept.values())

    @property
    def total(self) -> int:
        """How many nodes there are."""
        return sum(mask.numel() for mask in self.kept.values())

    @property
    def density(self) -> float:
        """The fraction of nodes that is kept."""
        return self.size / max(self.total, 1)

    def sizes(self) -> dict[str, tuple[int, int]]:
        """Per kind of unit: kept and all."""
        result: dict[str, tuple[int, int]] = {}
        for group, mask in self.kept.items():
            kind = group.partition(":")[0] if self.granularity != "weight" else "weight"
            kept, total = result.get(kind, (0, 0))
            result[kind] = (kept + int(mask.sum()), total + mask.numel())
        return result

    def nodes(self) -> list[Node]:
        """The kept nodes, in the model's order."""
        return [
            Node(group, int(unit))
            for group, mask in self.kept.items()
            for unit in mask.reshape(-1).nonzero().reshape(-1)
        ]

    def _replace(self, kept: Mapping[str, Tensor]) -> "Circuit":
        return Circuit(kept, self.sites, self.granularity, self.model, self.description)

    def __invert__(self) -> "Circuit":
        """The complement: the model without this circuit."""
        return self._replace({group: ~mask for group, mask in self.kept.items()})

    def without(self, *nodes: Node) -> "Circuit":
        """The circuit with some nodes ablated as well."""
        kept = {group: mask.clone() for group, mask in self.kept.items()}
        for node in nodes:
            kept[node.group].view(-1)[node.unit] = False
        return self._replace(kept)

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Circuit)
            and self.kept.keys() == other.kept.keys()
            and all(torch.equal(mask, other.kept[group]) for group, mask in self.kept.items())
        )

    __hash__ = None  # type: ignore[assignment]  # compared by value

    def __repr__(self) -> str:
        parts = ", ".join(f"{kept:,} of {total:,} {kind}s" for kind, (kept, total) in self.sizes().items())
        return f"Circuit({parts})"

    def overlap(self, other: "Circuit") -> Overlap:
        """How many nodes two circuits of the same groups share.

        Raises:
            ValueError: if they have other groups.
        """
        if self.kept.keys() != other.kept.keys():
            raise ValueError(f"circuits of {self.granularity}s and of {other.granularity}s have different nodes")
        shared = sum(int((mask & other.kept[group]).sum()) for group, mask in self.kept.items())
        expected = sum(
            int(mask.sum()) * int(other.kept[group].sum()) / max(mask.numel(), 1) for group, mask in self.kept.items()
        )
        either = self.size + other.size - shared
        return Overlap(shared, self.size, other.size, shared / either if either else 1.0, expected)

    def to_masks(self) -> Masks:
        """Masks that zero all that is not kept, for pruning and patches.

        A parameter entry is kept if all nodes that own it are. Masking gives the model of zero ablation; where units own
        biases of layers before (MLP neurons) these are pruned with them, which changes nothing.
        """
        if self.granularity == "weight":
            return Masks(self.kept)
        masks: dict[str, Tensor] = {}
        for site in self.sites:
            shapes = dict(site.shapes)
            for member in site.members:
                mask = masks.setdefault(
                    member.parameter, torch.ones(shapes[member.parameter], dtype=torch.bool, device="cpu")
                )
                mask &= member.kept(self.kept[site.name])
        kinds = {site.kind for site in self.sites}
        words = {"head": "head", "mlp_neuron": "neuron", "attention_block": "block", "mlp_block": "block"}
        named = {words.get(kind, "weight") for kind in kinds}
        return Masks(masks, granularity=named.pop() if len(named) == 1 else "weight")

    def closed(self) -> "Circuit":
        """The circuit without nodes that lie in an ablated head or block: they have no effect."""
        if self.granularity == "weight":
            return self
        passing = effective(self.sites, {group: mask.to(torch.uint8) for group, mask in self.kept.items()})
        return self._replace({group: passing[group].bool() for group in self.kept})

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write to a safetensors file with its description as JSON; atomic; one bit for each node."""
        description = {
            "granularity": self.granularity,
            "model": self.model,
            "shapes": {group: list(mask.shape) for group, mask in self.kept.items()},
            "sites": [site_to_list(site) for site in self.sites],
            "description": self.description,
        }
        save_tensors(path, "circuit", {group: bits.pack(mask) for group, mask in self.kept.items()}, description)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Circuit":
        """Read what :meth:`save` wrote.

        Raises:
            ValueError: if the file is damaged, of another kind, or of a newer version.
        """
        packed, description = load_tensors(path, "circuit")
        kept = {group: bits.unpack(packed[group], tuple(shape)) for group, shape in description["shapes"].items()}
        sites = [site_from_list(site) for site in description["sites"]]
        return cls(kept, sites, description["granularity"], description["model"], description["description"])


def site_to_list(site: Site) -> list[Any]:
    """The site in plain values."""
    members = [member.to_list() for member in site.members]
    return [
        site.kind,
        site.module,
        site.units,
        site.width,
        members,
        [[name, list(shape)] for name, shape in site.shapes],
    ]


def site_from_list(values: Sequence[Any]) -> Site:
    """The site that :func:`site_to_list` described."""
    kind, module, units, width, members, shapes = values
    return Site(
        kind,
        module,
        units,
        width,
        tuple(map(Member.from_list, members)),
        tuple((name, tuple(shape)) for name, shape in shapes),
    )
