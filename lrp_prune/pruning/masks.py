"""Masks: which entries of which parameters are kept, at one bit for each."""

import hashlib
import math
import os
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lrp_prune.distributed.sharding import Sharding, all_reduced, counted, local_part, sharding_of
from lrp_prune.pruning import mask_files, masking
from lrp_prune.selection import bits as packing

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Masks(Mapping[str, Tensor]):
    """Boolean masks by canonical parameter name; True is kept, False is pruned.

    They are stored packed on the CPU, one bit for each entry; reading one unpacks it into a new tensor. ``&`` keeps
    what both keep, ``|`` what one of them keeps, ``~`` what is pruned; both sides must have the same names and shapes.
    Equal masks compare equal whatever the order of their names and their granularity.

    Masks of a model that ``fully_shard`` has divided are divided as it is (``shardings``): a process holds the bits of its
    own parts, and reading a mask gives a ``DTensor``. Counts are those of the whole, and need no other process; operators,
    :meth:`checksum`, :meth:`state_dict`, :meth:`save` and :meth:`gathered` do, and must be called in all of them.

    Masks hold everything that a sparsity was asked for. Weights that could not be scored are kept whole, and ``unscored`` names
    them: what they matter is not known. ``&`` and ``|`` know it of what one side knows it of, and ``~`` leaves them alone.
    ``layouts`` says where weights have their outputs (one of :data:`lrp_prune.selection.scopes.LAYOUTS`), where that is known.

    Args:
        masks: bool tensors of the parameters' shapes.
        granularity: what was pruned as a whole: ``"weight"``, ``"neuron"``, ``"head"``, ``"block"`` or ``"embedding"``.
        unscored: names among the masks that nothing is known about, each with the reason.

    Raises:
        ValueError: if a mask is not boolean.

    Example:
        >>> masks = Masks({"weight": torch.tensor([[True, False], [True, True]])})
        >>> masks.sparsity, masks.num_pruned, masks.num_entries
        (0.25, 1, 4)
        >>> layer = nn.Linear(2, 2, bias=False)
        >>> masks.apply_(layer)
        >>> int((layer.weight == 0).sum())
        1
    """

    def __init__(
        self, masks: Mapping[str, Tensor], *, granularity: str = "weight", unscored: Mapping[str, str] | None = None
    ) -> None:
        for name, mask in masks.items():
            if mask.dtype != torch.bool:
                raise ValueError(f"the mask of {name} has type {mask.dtype}: masks are torch.bool, True where kept")
        self._bits = {name: packing.pack(mask).cpu() for name, mask in masks.items()}
        self.shapes: dict[str, tuple[int, ...]] = {name: tuple(mask.shape) for name, mask in masks.items()}
        self.granularity = granularity
        self.unscored: dict[str, str] = dict(unscored or {})
        self.layouts: dict[str, str] = {}
        self.shardings: dict[str, Sharding] = {}
        self._pruned: dict[str, int] = {}

    @classmethod
    def from_bits(
        cls,
        bits: Mapping[str, Tensor],
        shapes: Mapping[str, tuple[int, ...]],
        *,
        granularity: str = "weight",
        shardings: Mapping[str, Sharding] | None = None,
        unscored: Mapping[str, str] | None = None,
        layouts: Mapping[str, str] | None = None,
    ) -> "Masks":
        """Masks from what :meth:`bits` and ``shapes`` give; the bytes are kept, not copied.

        Args:
            bits: packed masks; of those that are divided among processes, of the part here.
            shapes: of the whole masks.
            granularity: what was pruned as a whole.
            shardings: how masks are divided among processes.
            unscored: see :class:`Masks`.
            layouts: see :class:`Masks`.

        Raises:
            ValueError: if bytes and shape of a mask do not fit together.
        """
        masks = cls({}, granularity=granularity, unscored=unscored)
        masks.shardings = {
            name: sharding for name, sharding in (shardings or {}).items() if sharding.mesh is not None and name in bits
        }
        masks.layouts = {name: layout for name, layout in (layouts or {}).items() if name in bits}
        for name, packed in bits.items():
            if name not in shapes:
                raise ValueError(f"the mask of {name} has no shape")
            shape = tuple(int(size) for size in shapes[name])
            masks.shapes[name] = shape
            packing.check(packed, masks.sharding(name).local_numel, shape, name)
            masks._bits[name] = packed.cpu()
        masks._count_together()
        return masks

    def _count_together(self) -> None:
        """Count now what is pruned in all parts: nobody else may be there when the counts are read."""
        self._pruned = counted(self.shardings, {name: self._pruned_here(name) for name in self.shardings})

    def _pruned_here(self, name: str) -> int:
        return self.sharding(name).local_numel - packing.count(self._bits[name])

    def sharding(self, name: str) -> Sharding:
        """How a mask is divided among processes, which may be not at all."""
        return self.shardings.get(name) or Sharding(self.shapes[name])

    def __getitem__(self, name: str) -> Tensor:
        return self.sharding(name).tensor(self.local(name))

    def local(self, name: str) -> Tensor:
        """The mask of what is in this process: all of the parameter, unless it is divided among processes."""
        return packing.unpack(self._bits[name], self.sharding(name).local_shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._bits)

    def __len__(self) -> int:
        return len(self._bits)

    def __contains__(self, name: object) -> bool:
        return name in self._bits

    def bits(self, name: str) -> Tensor:
        """The packed :meth:`local` mask, uint8 ``[ceil(entries / 8)]``: entry ``i`` is bit ``i % 8`` of byte ``i // 8``."""
        return self._bits[name]

    def pruned_in(self, name: str) -> int:
        """How many entries of one parameter are pruned."""
        if name not in self._pruned:
            self._pruned[name] = self._pruned_here(name)
        return self._pruned[name]

    def sparsity_of(self, name: str) -> float:
        """The fraction of one parameter's entries that is pruned."""
        return self.pruned_in(name) / max(math.prod(self.shapes[name]), 1)

    @property
    def num_pruned(self) -> int:
        """How many entries are pruned."""
        return sum(self.pruned_in(name) for name in self)

    @property
    def num_entries(self) -> int:
        """How many entries the masks have."""
        return sum(math.prod(shape) for shape in self.shapes.values())

    @property
    def sparsity(self) -> float:
        """The fraction of all entries that is pruned: of everything that was asked for, scored or not."""
        return self.num_pruned / max(self.num_entries, 1)

    def apply_(self, model: nn.Module) -> None:
        """Set what is pruned to +0.0 in place, whatever was there (-0.0, infinity and NaN too).

        Args:
            model: the model; wrapped or not, or one that holds the model the masks were made for under an attribute. Where
                adapters are merged, what units had in them is left out, with a warning.

        Raises:
            KeyError: if the model has not all parameters; nothing has changed then.
            ValueError: if a shape differs, or a parameter is not floating-point or offloaded; nothing has changed then.
        """
        masks = masking.fitting(self, model)
        parameters = masking.masked_parameters(model, masks.shapes)
        for name, parameter in parameters.items():
            masks._check_division(name, parameter)
        for name, parameter in parameters.items():
            weights = local_part(parameter)
            with torch.no_grad():
                weights.masked_fill_(~masks.part(name, parameter), 0.0)

    def part(self, name: str, parameter: Tensor) -> Tensor:
        """The mask of what this process has of a parameter, which may be divided where the masks are whole.

        Raises:
            ValueError: if it is divided in another way than the masks.
        """
        self._check_division(name, parameter)
        mask = packing.unpack(self._bits[name].to(local_part(parameter).device), self.sharding(name).local_shape)
        return mask if name in self.shardings else sharding_of(parameter, name).part(mask)

    def _check_division(self, name: str, parameter: Tensor) -> None:
        if name in self.shardings and self.shardings[name] != sharding_of(parameter, name):
            raise ValueError(
                f"the mask of {name} is divided among processes, and its parameter is not, or in another way: use "
                "masks.gathered()"
            )

    def _combined(self, other: "Masks", function: Callable[[Tensor, Tensor], Tensor], action: str) -> "Masks":
        joined = masking.combined(self, other, function, action)
        granularity = self.granularity if self.granularity == other.granularity else "weight"
        unscored = {name: reason for name, reason in self.unscored.items() if name in other.unscored}
        layouts = {**other.layouts, **self.layouts}
        known = {"granularity": granularity, "unscored": unscored, "layouts": layouts}
        return self._with_bits(joined, **known)

    def __and__(self, other: "Masks") -> "Masks":
        """Keep what both keep."""
        if not isinstance(other, Masks):
            return NotImplemented
        return self._combined(other, torch.bitwise_and, "intersect")

    def __or__(self, other: "Masks") -> "Masks":
        """Keep what one of them keeps."""
        if not isinstance(other, Masks):
            return NotImplemented
        return self._combined(other, torch.bitwise_or, "unite")

    def __invert__(self) -> "Masks":
        """Keep what is pruned, prune what is kept; what is unscored is kept in both."""
        flipped = {
            name: packed if name in self.unscored else packing.invert(packed, self.sharding(name).local_numel)
            for name, packed in self._bits.items()
        }
        return self._with_bits(flipped)

    def _with_bits(self, bits: Mapping[str, Tensor], **changes: Any) -> "Masks":
        known = ("granularity", "shardings", "unscored", "layouts")
        return Masks.from_bits(bits, self.shapes, **{**{name: getattr(self, name) for name in known}, **changes})

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Masks):
            return NotImplemented
        if self.shapes != other.shapes or self.shardings != other.shardings:
            return False
        equal = all(torch.equal(self._bits[name], other._bits[name]) for name in self)
        mesh = next((sharding.mesh for sharding in self.shardings.values()), None)
        return bool(all_reduced(torch.tensor([int(equal)], device="cpu"), mesh, "MIN"))

    def checksum(self) -> str:
        """SHA-256 of names, shapes and bits, in hexadecimal; the same on every machine and in any order of names."""
        digest = hashlib.sha256()
        for name in sorted(self):
            digest.update(f"{name}\0{self.shapes[name]}\0".encode())
            digest.update(self.whole_bits(name).numpy().tobytes())
        return digest.hexdigest()

    def whole_bits(self, name: str) -> Tensor:
        """The packed mask of the whole parameter; all processes must ask for one that is divided among them."""
        sharding = self.sharding(name)
        return packing.pack(sharding.gathered(self.local(name))).cpu() if sharding.is_divided else self._bits[name]

    def whole(self, name: str) -> Tensor:
        """The mask of the whole parameter, on the CPU; all processes must ask for one that is divided among them."""
        return packing.unpack(self.whole_bits(name), self.shapes[name])

    def gathered(self) -> "Masks":
        """The whole masks in every process, packed, in the memory of the CPU."""
        whole = {name: self.whole_bits(name) for name in self}
        return self._with_bits(whole, shardings={})

    def divided(self, shardings: Mapping[str, Sharding]) -> "Masks":
        """What of these masks belongs to this process when parameters are divided as given.

        Raises:
            ValueError: if they are divided in another way already.
        """
        packed, new = masking.parts(self, shardings)
        return self._with_bits(packed, shardings={**self.shardings, **new}) if new else self

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values only, for a checkpoint; the tensors are not copies.

        Of divided masks the first process gets the whole ones, tensor by tensor, and the others get no bits.
        """
        return mask_files.state_of(self)

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> "Masks":
        """Masks from what :meth:`state_dict` gave.

        Raises:
            ValueError: if the state is of another version, or its bytes and shapes do not fit together.
        """
        state = mask_files.checked_state(state)
        return cls._described(state["bits"], state)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write to a safetensors file with shapes and a format version; atomic.

        Divided masks are brought together tensor by tensor; all processes must call this, and the first one writes.
        """
        mask_files.save(self, path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Masks":
        """Read what :meth:`save` wrote.

        Raises:
            ValueError: if the file is damaged, of another kind, or of a newer version.
        """
        return cls._described(*mask_files.load(path))

    @classmethod
    def _described(cls, bits: Mapping[str, Tensor], description: Mapping[str, Any]) -> "Masks":
        known = {name: description.get(name) for name in ("unscored", "layouts")}
        return cls.from_bits(bits, description["shapes"], granularity=description["granularity"], **known)

    def report(self) -> str:
        """What is pruned where, as text: a table by kind of layer, and what is in danger.

        The table has the number of tensors, weights and pruned weights of each kind, its sparsity, and that of its tensor which
        loses least and of the one which loses most. Below it are tensors that lose more than 95 %, and of weights outputs that no
        input reaches any more and inputs that no output reads. All processes must ask for that of divided masks.

        Example:
            >>> print(Masks({"layers.0.up.weight": torch.ones(4, 8) > 0, "layers.1.up.weight": torch.zeros(4, 8) > 0}).report())
            total sparsity 50.00%: 32 of 64 weights pruned
              layers of layers.*   tensors   weights   pruned   sparsity   lowest   highest
             ───────────────────────────────────────────────────────────────────────────────
              up                         2        64       32     50.00%    0.00%   100.00%
            1 of 2 tensors lose more than 95 %, 1 of them all: layers.1.up.weight (100.0 %)
            4 of 8 outputs without any input: layers.*.up (4 of 8)
            8 of 16 inputs that nothing reads: layers.*.up (8 of 16)
        """
        from lrp_prune.pruning.report import report

        return report(self)

    def plot(self, path: str | os.PathLike[str] | None = None) -> "Figure":
        """A figure of each tensor's sparsity, in the order of the model, coloured by kind of layer; needs matplotlib.

        Args:
            path: a file to write it to; its ending says in which format. None writes none.
        """
        from lrp_prune.pruning.report import plot

        return plot(self, path)

    def __repr__(self) -> str:
        return (
            f"Masks({len(self)} parameters, {self.num_pruned:,} of {self.num_entries:,} entries pruned "
            f"({self.sparsity:.2%}), granularity {self.granularity!r}"
            f"{f', {len(self.unscored)} unscored' if self.unscored else ''})"
        )
