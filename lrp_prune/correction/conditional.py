"""A patch that acts only where a condition holds, and leaves everything else bit for bit as it is."""

import os
from collections.abc import Mapping
from typing import Any, NoReturn

from torch import Tensor, nn

from lrp_prune.correction import combining, gating
from lrp_prune.correction.conditions.condition import Condition, restored
from lrp_prune.correction.patch import Patch
from lrp_prune.correction.verifying import resolve_entries
from lrp_prune.distributed.sharding import is_sharded
from lrp_prune.storage import load_tensors, save_tensors

KIND = "conditional_patch"
"""Of its files: what reads plain patches refuses them."""
_CONDITION = "condition:"


class ConditionalPatch(Patch):
    r"""A patch under a condition: where it holds, entries are :math:`(1 - s)\, w`; elsewhere nothing has changed.

    No weight is written. Forward hooks take away, at the tokens (or samples) at which the condition holds, what the entries have
    added to the outputs of their layers. Where it holds nowhere, outputs are those of the model without the patch, bit
    for bit, so side effects are confined to texts in which it holds somewhere; and what could not be spared everywhere (neurons,
    heads, many weights at full strength) can be taken away.

    It is saved, applied, scaled, undone, measured, and refused by other models as any :class:`~lrp_prune.Patch`, and works in
    generation with a cache: a condition looks at nothing but the call under way. Layers must be linear, and run after the module
    that the condition looks at. Weights are not frozen in a training: gradients are those of the scaled entries. With activation
    checkpointing a backward must follow its own forward, since the condition is that of the last one. Several patches add up.

    Args:
        patch: what acts.
        condition: where.

    Raises:
        TypeError: if ``condition`` is none.

    Example:
        >>> import torch
        >>> from lrp_prune.correction.conditions import ActivationAbove
        >>> model = nn.Sequential(nn.Identity(), nn.Linear(2, 1, bias=False))
        >>> inputs = torch.tensor([[3.0, 1.0], [-3.0, 1.0]])
        >>> before = model(inputs)
        >>> patch = Patch.from_positions(model, {"1.weight": torch.tensor([0, 1])})
        >>> conditional = ConditionalPatch(patch, ActivationAbove("0", 0.0, torch.tensor([1.0, 0.0])))
        >>> conditional.apply_(model)
        >>> model(inputs)[0].item(), bool(model(inputs)[1] == before[1])
        (0.0, True)
        >>> conditional.revert_(model)
        >>> torch.equal(model(inputs), before)
        True
    """

    def __init__(self, patch: Patch, condition: Condition) -> None:
        if not isinstance(condition, Condition):
            raise TypeError(f"condition must be a Condition, got {type(condition).__name__}")
        super().__init__(dict(patch), patch.provenance)
        self.condition = condition

    @classmethod
    def from_positions(cls, model: nn.Module, positions: Mapping[str, Tensor], **provenance: Any) -> NoReturn:
        """Not without a condition: make a :class:`Patch`, by any of its ways, and give it one."""
        raise TypeError("a conditional patch is made of a patch and a condition: ConditionalPatch(patch, condition)")

    def unconditional(self) -> Patch:
        """The patch by itself, which acts everywhere."""
        return Patch(dict(self), self.provenance)

    def strength_in(self, model: nn.Module) -> float | None:
        """How strongly the patch is applied in a model, 0 for not at all."""
        gate = gating.gate_of(self, model)
        return 0.0 if gate is None else gate.strength

    def verify(self, model: nn.Module, *, strict: bool = True) -> None:
        """Raise what :meth:`apply_` would raise, and change nothing."""
        applied = self.strength_in(model)
        if applied:
            raise ValueError(f"the patch is applied to this model already, at strength {applied:g}: revert it first")
        super().verify(model, strict=strict)
        for name, parameter in resolve_entries(self, model).items():
            if is_sharded(parameter):
                raise ValueError(f"{name} is sharded: conditional patches are for whole weights, as under DDP")
        gating.check(self, model)

    def revert_(self, model: nn.Module, *, strict: bool = True) -> None:
        """Take the patch off a model, whose weights are its own all the time.

        Raises:
            ValueError: if it is not applied, and ``strict`` is set.
        """
        if not gating.detach(self, model) and strict:
            raise ValueError("the patch is not applied to this model")

    def _write_(self, model: nn.Module, strength: float) -> None:
        if strength:
            gating.attach(self, model, strength)

    def renewed(self, model: nn.Module) -> "ConditionalPatch":
        """The same entries and condition, with the values and checksums that a model has now."""
        return ConditionalPatch(self.unconditional().renewed(model), self.condition)

    def __or__(self, other: "Patch") -> "ConditionalPatch":
        """Both patches in one, of the same condition.

        Raises:
            ValueError: if the other one acts elsewhere, or was made for another model.
        """
        return ConditionalPatch(self.unconditional() | self._alike(other), self.condition)

    def __sub__(self, other: "Patch") -> "ConditionalPatch":
        """The entries that another patch of the same condition does not touch.

        Raises:
            ValueError: if the other one acts elsewhere, was made for another model, or nothing is left.
        """
        return ConditionalPatch(self.unconditional() - self._alike(other), self.condition)

    # Python asks a subclass first: what is plain is not united with what acts elsewhere either.
    __ror__, __rsub__ = __or__, __sub__

    def _alike(self, other: "Patch") -> Patch:
        if not isinstance(other, ConditionalPatch) or other.condition != self.condition:
            raise ValueError(
                "patches that act under different conditions cannot be one: enable both in a CorrectedModule, or take "
                "unconditional() of each and give the result a condition"
            )
        return other.unconditional()

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ConditionalPatch):
            return False if isinstance(other, Patch) else NotImplemented
        return combining.equal(self, other) and self.condition == other.condition

    __hash__ = None  # as of any mapping that compares by value

    def __repr__(self) -> str:
        return f"Conditional{super().__repr__()[:-1]} where {self.condition})"

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values only, for a checkpoint; the tensors are not copies."""
        state, condition = super().state_dict(), self.condition.state()
        tensors = {_CONDITION + key: tensor for key, tensor in condition.pop("tensors").items()}
        return {
            "tensors": {**state["tensors"], **tensors},
            "description": {**state["description"], "condition": condition},
        }

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> "ConditionalPatch":
        """A patch from what :meth:`state_dict` gave.

        Raises:
            ValueError: if the class of its condition is not defined.
        """
        tensors = {
            key.removeprefix(_CONDITION): tensor
            for key, tensor in state["tensors"].items()
            if key.startswith(_CONDITION)
        }
        condition = restored({**state["description"]["condition"], "tensors": tensors})
        return cls(Patch.from_state_dict(state), condition)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write to one safetensors file; atomic."""
        state = self.state_dict()
        save_tensors(path, KIND, state["tensors"], state["description"])

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "ConditionalPatch":
        """Read what :meth:`save` wrote; nothing in the file is executed.

        Raises:
            ValueError: if the file is damaged, of another kind, of a newer version, or of a condition whose class is not defined.
        """
        tensors, description = load_tensors(path, KIND)
        try:
            return cls.from_state_dict({"tensors": tensors, "description": description})
        except (KeyError, TypeError) as error:
            raise ValueError(f"{path} is damaged: {error}") from error
