"""A correction as a small thing of its own: which entries go, what they were, and for which model."""

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lrp_prune.correction import combining
from lrp_prune.correction.contrast import Contrast
from lrp_prune.correction.entries import Entries, check_strength, checksum, locate, read, scaled, write_together
from lrp_prune.correction.guard import Guard, guard_of
from lrp_prune.correction.provenance import describe_model, describe_references
from lrp_prune.correction.several import General, united
from lrp_prune.correction.verifying import (
    applied_strength,
    flat_positions,
    marked_positions,
    refusal,
    refuse_together,
    resolve_entries,
    verify,
)
from lrp_prune.names import resolve
from lrp_prune.relevance import Relevance
from lrp_prune.storage import load_tensors, save_tensors


class Patch(Mapping[str, Entries]):
    r"""Entries of a model's parameters to remove, with their original values; reversible bit by bit.

    Applied at a strength :math:`s` an entry becomes :math:`(1 - s)\, w`: 0 is as before, 1 is removed. Names are
    canonical, so that a patch made in a Lightning run applies to the bare Hugging Face model and the other way round.
    A patch knows nothing about whether it is applied: that is seen in the model. It is a mapping from parameter names
    to :class:`Entries`.

    What a patch was made for is checked before anything changes: names, shapes, the values at its positions (bit by
    bit) and a checksum of each touched parameter as a whole. A model in another floating-point type is accepted if its
    entries are the rounded originals; checksums are of one type and are left out then.

    Of a model that ``fully_shard`` has divided, each process changes its own part, and a patch that is made of it is the
    same, whole, in each. All processes must make, apply, revert and verify alike; an error of one is raised in all.

    Args:
        entries: by canonical parameter name.
        provenance: plain values: what the patch is for and how it was made.

    Raises:
        ValueError: if entries are none, unsorted, repeated or outside of their parameter.

    Example:
        >>> model = nn.Linear(3, 1, bias=False)
        >>> before = model.weight.detach().clone()
        >>> patch = Patch.from_positions(model, {"weight": torch.tensor([0, 2])}, behaviour="example")
        >>> patch.apply_(model, strength=0.5)
        >>> bool(torch.equal(model.weight[0, 0], before[0, 0] / 2))
        True
        >>> patch.revert_(model)
        >>> bool(torch.equal(model.weight, before))
        True
    """

    def __init__(self, entries: Mapping[str, Entries], provenance: Mapping[str, Any] | None = None) -> None:
        for name, entry in entries.items():
            positions, size = entry.positions, math.prod(entry.shape)
            if positions.dtype != torch.int64 or positions.dim() != 1 or positions.shape != entry.originals.shape:
                raise ValueError(f"the patch of {name} needs int64 positions [entries] and as many original values")
            if not len(positions) or bool((positions.diff() <= 0).any()):
                raise ValueError(f"the positions of {name} must be ascending, without repetition, and at least one")
            if int(positions[0]) < 0 or int(positions[-1]) >= size:
                raise ValueError(f"the patch of {name} has positions outside of its {size} entries")
        try:
            json.dumps(dict(provenance or {}))
        except (TypeError, ValueError) as error:
            raise ValueError(f"a patch's provenance must be plain values (numbers, text, lists): {error}") from error
        self._entries = dict(entries)
        self.provenance: dict[str, Any] = dict(provenance or {})

    @classmethod
    def from_positions(cls, model: nn.Module, positions: Mapping[str, Tensor], **provenance: Any) -> "Patch":
        """A patch of given entries.

        Args:
            model: the model as it is before, wrapped or not.
            positions: canonical parameter name to int64 flat positions, or a bool tensor of the parameter's shape (a
                ``DTensor`` too) that is True where something is removed.
            **provenance: plain values to keep with it, such as ``behaviour="repetition"``.

        Raises:
            KeyError: for a name that is no parameter of the model.
            ValueError: for positions or masks that do not fit, and parameters that cannot be patched.
        """
        parameters = resolve(positions, model) if positions else {}
        entries = {}
        for name, parameter in parameters.items():
            flat = flat_positions(name, positions[name], parameter)
            problem = refusal(name, parameter, tuple(parameter.shape))
            if problem is not None:
                raise ValueError(problem)
            if len(flat):
                values = read(parameter, flat)
                entries[name] = Entries(flat, values, parameter.shape, checksum(parameter))
        if not entries:
            raise ValueError("a patch needs at least one entry, none is marked")
        return cls(entries, {**describe_model(model), **provenance})

    @classmethod
    def from_contrast(
        cls,
        model: nn.Module,
        general: General,
        undesired: Relevance,
        amount: float | int = 0.0003,
        *,
        normalize: str | None = "total",
        guard: float | Guard | None = 0.7,
        reverse: bool = False,
        include: Sequence[str] | None = None,
        exclude: Sequence[str] | None = None,
        removal: str = "contribution",
        behaviour: str = "",
        references: Mapping[str, Any] | None = None,
        extends: "Patch | None" = None,
        spared: "Mapping[str, Tensor] | None" = None,
    ) -> "Patch":
        """What serves an undesired behaviour and not the general one (see :class:`~lrp_prune.correction.Contrast`).

        Args:
            model: the model that both were collected on.
            general: relevance for what is to stay; or several sets by name, which count alike, and any of which
                spares what matters to it (:func:`lrp_prune.correction.together`).
            undesired: relevance for what is to go.
            amount: how much to remove: a fraction of all weights (or units) chosen from, or a count.
            normalize, guard, reverse, include, exclude: of the contrast; the paper's own is ``normalize=None, guard=None``.
            removal: of neurons and heads, ``"contribution"`` or ``"all"``: see :meth:`Contrast.masks`.
            behaviour: what is removed, in a word or two.
            references: plain values that say which samples were used.
            extends: a patch that was applied when both were collected, and still is: the next round of a correction. Its
                weights are not chosen again, ``amount`` is what comes to them, and the result is both, of the model as it
                was before; revert ``extends`` to apply it.
            spared: weights that are not chosen, flat positions by parameter name: those of other patches, say, that are
                to be enabled beside this one.

        Raises:
            KeyError: if the relevance is of another model.
            ValueError: for wrong arguments; see :class:`~lrp_prune.correction.Contrast`.

        Example:
            >>> from lrp_prune import Relevance
            >>> model = nn.Linear(4, 1, bias=False)
            >>> general = Relevance({"weight": torch.tensor([[8.0, 1.0, 1.0, 0.0]])})
            >>> undesired = Relevance({"weight": torch.tensor([[5.0, 4.0, 0.0, 1.0]])})
            >>> Patch.from_contrast(model, general, undesired, amount=1)["weight"].positions
            tensor([1])
        """
        sets = {} if isinstance(general, Relevance) else dict(general)
        general, guard = united(general, guard_of(guard), reverse)
        extended = {} if extends is None else {name: extends[name].positions for name in extends}
        contrast = Contrast(
            general,
            undesired,
            normalize=normalize,
            guard=guard,
            spared=combining.merged(spared or {}, extended),
            reverse=reverse,
            include=include,
            exclude=exclude,
        )
        masks = contrast.masks(amount, removal)
        positions = {name: marked_positions(~masks.local(name), masks.sharding(name)) for name in masks}
        provenance = {
            "behaviour": behaviour,
            "references": describe_references(
                general, undesired, None if guard is None else guard.by, references, sets
            ),
            "options": {
                "amount": amount,
                "normalize": normalize,
                "guard": None if guard is None else guard.share,
                "guard_scope": None if guard is None else guard.scope,
                "reverse": reverse,
                "include": None if include is None else list(include),
                "exclude": None if exclude is None else list(exclude),
                "removal": removal,
            },
        }
        if extends is None:
            return cls.from_positions(model, positions, **provenance)
        with combining.undone(extends, model):
            both = combining.with_positions(extends, positions)
            return cls.from_positions(model, both, **provenance, extends=extends.provenance)

    def __getitem__(self, name: str) -> Entries:
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def num_entries(self) -> int:
        """How many entries are patched."""
        return sum(len(entry.positions) for entry in self._entries.values())

    @property
    def behaviour(self) -> str:
        """What is removed."""
        return str(self.provenance.get("behaviour", ""))

    def strength_in(self, model: nn.Module) -> float | None:
        """How strongly the patch is applied in a model, 0 for not at all; None if its entries hold something else."""
        return applied_strength(self, model)

    def apply_(self, model: nn.Module, strength: float = 1.0, *, strict: bool = True) -> None:
        """Apply to a model in place.

        Args:
            model: the model, wrapped or not; nothing of it has changed if an error is raised.
            strength: 0 for as before, 1 for removed.
            strict: also compare whole parameters with what they were, by their checksums. Pass False where only the
                patched entries need to be the same: another patch is applied, or other entries were trained since.

        Raises:
            KeyError: if the model has not all parameters.
            ValueError: if it is not what the patch was made for (the message names the parameter), or the strength is
                outside [0, 1].
        """
        check_strength(strength)
        self.verify(model, strict=strict)
        self._write_(model, strength)

    def revert_(self, model: nn.Module, *, strict: bool = True) -> None:
        """Bring the original values back, bit by bit.

        Args:
            model: a model that the patch is applied to at any strength; nothing of it has changed if an error is raised.
            strict: refuse if the entries hold anything else than scaled originals; False writes the originals anyway.

        Raises:
            KeyError: if the model has not all parameters.
            ValueError: if the patch is not applied to it.
        """
        found = applied_strength(self, model)
        refuse_together(
            "the patch is not applied to this model: its entries hold neither the originals nor scaled ones; pass "
            "strict=False to write the originals anyway"
            if found is None and strict
            else None,
            resolve_entries(self, model).values(),
        )
        self._write_(model, 0.0)

    def verify(self, model: nn.Module, *, strict: bool = True) -> None:
        """Raise what :meth:`apply_` would raise, and change nothing."""
        verify(self, model, strict)

    def _write_(self, model: nn.Module, strength: float) -> None:
        write_together(
            (locate(parameter, self[name].positions), scaled(self[name].originals.to(parameter.dtype), strength))
            for name, parameter in resolve_entries(self, model).items()
        )

    def renewed(self, model: nn.Module) -> "Patch":
        """The same entries, with the values and checksums that a model has now; of a sharded one all processes must call this."""
        return type(self)(combining.renewed(self, model), self.provenance)

    def overlap(self, other: "Patch", model: nn.Module | None = None) -> dict[str, int]:
        """How many entries of each parameter both patches touch; parameters without any are left out.

        Args:
            other: the other patch.
            model: where names are looked up: a parameter has several if it is tied, or if one patch was made on a module
                around the other's. Without it names are compared.
        """
        return combining.overlap(self, other, model)

    def __or__(self, other: "Patch") -> "Patch":
        """Both patches in one.

        Raises:
            ValueError: if they were made for different models: they disagree in a parameter's shape, checksum or value.
        """
        return self._combined(other, "|", combining.union)

    def __and__(self, other: "Patch") -> "Patch":
        """The entries of this patch that the other one touches as well.

        Raises:
            ValueError: if they were made for different models, or touch nothing in common.
        """
        return self._combined(other, "&", combining.intersection)

    def __sub__(self, other: "Patch") -> "Patch":
        """The entries of this patch that the other one does not touch.

        Raises:
            ValueError: if they were made for different models, or nothing is left.
        """
        return self._combined(other, "-", combining.difference)

    def _combined(self, other: "Patch", operation: str, combine: Callable[..., dict[str, Entries]]) -> "Patch":
        if not isinstance(other, Patch):
            return NotImplemented
        provenance = combining.combined_provenance(self.provenance, other.provenance, operation)
        return Patch(combine(self, other), provenance)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Patch):
            return NotImplemented
        return combining.equal(self, other)

    __hash__ = None  # type: ignore[assignment]  # as of any mapping that compares by value

    def __repr__(self) -> str:
        what = f" against {self.behaviour!r}" if self.behaviour else ""
        return f"Patch({self.num_entries:,} entries of {len(self)} parameters of {self.provenance.get('model', '?')}{what})"

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values only, for a checkpoint; the tensors are not copies."""
        tensors, description = combining.pack(self, self.provenance)
        return {"tensors": tensors, "description": description}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> "Patch":
        """A patch from what :meth:`state_dict` gave."""
        return cls(*combining.unpack(state["tensors"], state["description"]))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write to one safetensors file, 8 bytes an entry at float32; atomic."""
        tensors, description = combining.pack(self, self.provenance)
        save_tensors(path, "patch", tensors, description)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Patch":
        """Read what :meth:`save` wrote; nothing in the file is executed.

        Raises:
            ValueError: if the file is damaged, of another kind, or of a newer version.
        """
        tensors, description = load_tensors(path, "patch")
        try:
            return cls.from_state_dict({"tensors": tensors, "description": description})
        except (KeyError, TypeError) as error:
            raise ValueError(f"{path} is damaged: {error}") from error
