"""Several named patches on one model, switched and scaled while it runs and trains."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from lrp_prune.correction import gating
from lrp_prune.correction.conditional import ConditionalPatch
from lrp_prune.correction.entries import check_strength, locate, read, same_bits, scaled, write_together
from lrp_prune.correction.freezing import Frozen
from lrp_prune.correction.patch import Patch
from lrp_prune.correction.verifying import resolve_entries


class Corrections:
    """The patches of one model: which there are, and how strongly each is applied now.

    What is applied is written into the parameters; what they held at that moment is stored (``[entries]`` for each
    patch, no copy of the model) and comes back bit by bit when the patch is disabled. While a patch is enabled its
    entries are frozen at their scaled value: their gradients are zeroed as they are accumulated, and after each step of
    an attached optimizer the values are written again.

    Patches that are enabled together must not overlap: which of them an entry's value comes from would depend on the
    order in which they are switched. Overlapping ones may be kept side by side and enabled in turn.

    Conditional patches write nothing: they are hooks of the model while they are enabled. They overlap with no other, since they
    scale what the weights hold, and freeze nothing.

    Of a model that ``fully_shard`` has divided, each process writes its own part, and all must switch alike.

    Args:
        model: the model; wrapped or not.

    Example:
        >>> import torch
        >>> model = nn.Linear(2, 1, bias=False)
        >>> patch = Patch.from_positions(model, {"weight": torch.tensor([0])})
        >>> corrections = Corrections(model)
        >>> corrections.add("example", patch)
        >>> corrections.enable("example")
        >>> model.weight[0, 0].item(), corrections.strengths
        (0.0, {'example': 1.0})
        >>> corrections.disable("example")
        >>> corrections.strengths
        {'example': 0.0}
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._patches: dict[str, Patch] = {}
        self._strengths: dict[str, float] = {}
        self._stored: dict[str, dict[str, Tensor]] = {}
        self._frozen = Frozen()
        self._suspended = 0

    @property
    def patches(self) -> dict[str, Patch]:
        """All patches by name, enabled or not."""
        return dict(self._patches)

    @property
    def strengths(self) -> dict[str, float]:
        """How strongly each patch is applied, 0 for disabled ones."""
        return {name: self._strengths.get(name, 0.0) for name in self._patches}

    def add(self, name: str, patch: Patch, *, strict: bool = True) -> None:
        """Take in a patch, disabled.

        Args:
            name: what to call it.
            patch: made for this model.
            strict: compare whole parameters by their checksums, with what other patches changed put back.

        Raises:
            KeyError: the model has not the patch's parameters.
            ValueError: the name is taken, or the patch was made for another model.
        """
        if not isinstance(name, str) or not name:
            raise ValueError(f"a patch needs a name, got {name!r}")
        if name in self._patches:
            raise ValueError(f"there is a patch {name!r} already: remove it first, or take another name")
        if not isinstance(patch, Patch):
            raise ValueError(f"patch {name!r} must be a Patch (Patch.load reads one), got {type(patch).__name__}")
        with self.suspended():
            patch.verify(self._model, strict=strict)
        self._patches[name] = patch

    def remove(self, name: str) -> Patch:
        """Disable a patch and forget it.

        Raises:
            KeyError: there is none of that name.
        """
        self.disable(name)
        return self._patches.pop(name)

    def enable(self, name: str, strength: float = 1.0) -> None:
        """Apply a patch, or change how strongly it is applied; within :meth:`suspended`, once it is left.

        Raises:
            KeyError: there is none of that name.
            ValueError: the strength is outside [0, 1], or another enabled patch touches the same entries (of conditional
                ones: is the same).
        """
        patch = self._patch(name)
        check_strength(strength)
        if strength == 0:
            self.disable(name)
            return
        if isinstance(patch, ConditionalPatch):
            same = next((other for other in self._strengths if other != name and self._patches[other] == patch), None)
            if same is not None:
                raise ValueError(f"patches {name!r} and {same!r} are the same: disable {same!r} first")
            if not self._suspended:
                gating.switch(patch, self._model, strength)
            self._strengths[name] = strength
            return
        for other in self._written:
            shared = patch.overlap(self._patches[other], self._model) if other != name else {}
            if shared:
                where, count = next(iter(shared.items()))
                raise ValueError(
                    f"patches {name!r} and {other!r} overlap in {sum(shared.values()):,} entries ({count:,} of {where}): "
                    f"disable {other!r} first, or enable their union (a | b) or difference (a - b)"
                )
        parameters = resolve_entries(patch, self._model)
        if name not in self._stored:
            self._stored[name] = self._read(name, parameters)
        self._strengths[name] = strength
        if not self._suspended:
            self._write(name, parameters, strength)
        self._freeze()

    def disable(self, name: str) -> None:
        """Put back what the entries held when the patch was enabled; nothing happens if it is not.

        Raises:
            KeyError: there is none of that name.
        """
        patch = self._patch(name)
        if isinstance(patch, ConditionalPatch):
            if name in self._strengths:
                gating.switch(patch, self._model, 0.0)
                del self._strengths[name]
        elif name in self._stored:
            self._write(name, resolve_entries(patch, self._model), 0.0)
            del self._stored[name], self._strengths[name]
            self._freeze()

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """The model as it is without corrections, inside the context; what is enabled comes back after the outermost.

        What happened to the weights meanwhile (pruning, say) stays: it is what disabling puts back.
        """
        if not self._suspended:
            self.suspend()
        self._suspended += 1
        try:
            yield
        finally:
            self._suspended -= 1
            if not self._suspended and self._strengths:
                self._switch(self._strengths)
                for name, strength in self._written.items():
                    parameters = resolve_entries(self._patches[name], self._model)
                    self._stored[name] = self._read(name, parameters)
                    self._write(name, parameters, strength)
                self._freeze()

    def suspend(self, untouched: bool = False) -> None:
        """Put back what the entries held, with all patches still listed as enabled: :meth:`renew` enables them again.

        Args:
            untouched: only in parameters whose entries hold what was written; what was loaded into others since stays.
        """
        self._switch(dict.fromkeys(self._strengths, 0.0))
        for name, strength in self._written.items():
            parameters: dict[str, nn.Parameter] = resolve_entries(self._patches[name], self._model)
            if untouched:
                parameters = {
                    entry: parameter
                    for entry, parameter in parameters.items()
                    if self._holds(parameter, name, entry, strength)
                }
            self._write(name, parameters, 0.0)

    def attach(self, optimizers: Iterable[Optimizer]) -> None:
        """Keep frozen entries at their values through the steps of these optimizers, and of no others.

        Also finds parameters again that were replaced since (by ``to_empty``, by sharding, by a copy of the model).

        Raises:
            TypeError: for an object that has no hooks for its steps.
        """
        self._freeze()
        self._frozen.attach(optimizers)

    def release(self) -> None:
        """Take off the hooks of :meth:`attach`; gradients stay masked."""
        self._frozen.attach(())

    def without(self, state: dict[str, Any], keys: Mapping[int, list[str]]) -> None:
        """Replace, in a state dict, what is corrected by what is stored for it; the model's tensors stay as they are.

        Args:
            state: tensors by key; changed tensors are copied.
            keys: the keys of a parameter by its ``id``.
        """
        copies: dict[str, Tensor] = {}
        for name in self._written:
            patch = self._patches[name]
            for entry, parameter in resolve_entries(patch, self._model).items():
                for key in keys.get(id(parameter), []):
                    if key not in state:
                        continue
                    if key not in copies:
                        copies[key] = state[key] = state[key].detach().clone()
                    locate(copies[key], patch[entry].positions).write_(self._stored[name][entry])

    def renew(self) -> None:
        """Take the parameters' values as uncorrected ones, after a load: store them, and apply what is enabled."""
        enabled, self._strengths, self._stored = self._strengths, {}, {}
        for name, strength in enabled.items():
            self.enable(name, strength)
        self._freeze()

    def replace(self, patches: Mapping[str, Patch], strengths: Mapping[str, float]) -> None:
        """Have these patches and no others, on parameters that hold uncorrected values."""
        self._switch(dict.fromkeys(self._patches, 0.0))
        self._patches, self._stored = dict(patches), {}
        self._strengths = {name: strength for name, strength in strengths.items() if strength and name in patches}
        self.renew()

    def current(self, name: str) -> Patch:
        """A patch with the values and checksums that the uncorrected model has now, after further training say.

        Raises:
            KeyError: there is none of that name.
        """
        patch = self._patch(name)
        with self.suspended():
            return patch.renewed(self._model)

    def check_mergeable(self) -> None:
        """Refuse to write corrected weights where a correction is not in the weights.

        Raises:
            ValueError: a conditional patch is enabled.
        """
        for name in self._strengths:
            if name not in self._written:
                raise ValueError(
                    f"patch {name!r} acts under a condition and cannot be merged into weights: disable it, or write it beside "
                    "uncorrected weights by merged=False"
                )

    def __getstate__(self) -> dict[str, Any]:
        if not self._suspended:
            return self.__dict__
        # A copy of the uncorrected model leaves no context that would correct it again.
        return {**self.__dict__, "_strengths": {}, "_stored": {}, "_suspended": 0}

    @property
    def _written(self) -> dict[str, float]:
        """Of the enabled patches those that are in the weights."""
        return {
            name: strength
            for name, strength in self._strengths.items()
            if not isinstance(self._patches[name], ConditionalPatch)
        }

    def _switch(self, strengths: Mapping[str, float]) -> None:
        """Put the hooks of conditional patches where they belong, or take them off."""
        for name, strength in strengths.items():
            patch = self._patches[name]
            if isinstance(patch, ConditionalPatch):
                gating.switch(patch, self._model, strength)

    def _patch(self, name: str) -> Patch:
        if name not in self._patches:
            known = ", ".join(map(repr, self._patches)) or "none"
            raise KeyError(f"there is no patch {name!r}; there is {known}")
        return self._patches[name]

    def _holds(self, parameter: Tensor, name: str, entry: str, strength: float) -> bool:
        written = scaled(self._stored[name][entry].to(parameter.dtype), strength)
        return bool(same_bits(read(parameter, self._patches[name][entry].positions), written).all())

    def _read(self, name: str, parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
        return {entry: read(parameter, self._patches[name][entry].positions) for entry, parameter in parameters.items()}

    def _write(self, name: str, parameters: Mapping[str, nn.Parameter], strength: float) -> None:
        patch = self._patches[name]
        write_together(
            (
                locate(parameter, patch[entry].positions),
                scaled(self._stored[name][entry].to(parameter.dtype), strength),
            )
            for entry, parameter in parameters.items()
        )

    def _freeze(self) -> None:
        entries = []
        for name, strength in self._written.items():
            patch = self._patches[name]
            for entry, parameter in resolve_entries(patch, self._model).items():
                values = scaled(self._stored[name][entry].to(parameter.dtype), strength)
                entries.append((parameter, patch[entry].positions, values))
        self._frozen.set(entries)
