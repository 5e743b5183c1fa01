"""The LightningModule that carries patches: a correction that goes wherever its model goes."""

import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from typing import Any, cast

from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import nn
from torch.optim import Optimizer

from lrp_prune.correction.corrections import Corrections
from lrp_prune.correction.entries import check_strength
from lrp_prune.correction.folder import save_model, save_patches
from lrp_prune.correction.patch import Patch
from lrp_prune.correction.reading import patch_of
from lrp_prune.correction.verifying import awaited
from lrp_prune.distributed.sharding import at_rest, is_first, mesh_of
from lrp_prune.names import unwrap
from lrp_prune.wrapper.checkpointing import PATCHES, check_version, keys_of, packed, pretrained_in, unpacked
from lrp_prune.wrapper.delegation import Extended, MetricNames, PlainSteps, forward_all
from lrp_prune.wrapper.internals import set_metric_names


@forward_all
class CorrectedModule(LightningModule):
    """A model with named patches that are enabled, disabled and scaled at run time.

    It is used in place of the module inside, in ``fit``, ``validate``, ``test`` and ``predict``. Everything that
    Lightning defines (hooks, steps, ``trainer``, ``log``, ``hparams``, optimizers, data loaders, manual optimization) is
    the inner module's own, read and written through; so are attributes that only the inner module has. A plain model is
    run with its own loss, see :class:`~lrp_prune.wrapper.delegation.PlainSteps`.

    - **Weights** hold the corrected values; a few entries are stored for each patch, no copy of the model. Disabling
      brings back bit by bit what was there when the patch was enabled.
    - **Training** keeps patched entries frozen at their scaled value and trains all others.
    - **Overlapping patches** are refused while both are enabled: use their union (``a | b``) or difference (``a - b``).
    - **Conditional patches** (:class:`~lrp_prune.correction.ConditionalPatch`) are hooks, and neither write nor freeze weights.
    - **The state dict** has the uncorrected weights, under ``module.``, and all patches with strengths, in ``_extra_state``:
      loading one brings its patches, in place of those that there are. One without leaves them, applied to the loaded weights.
    - **On several processes** patches must be switched on all of them alike. Where the module inside shards itself in
      ``configure_model`` (``fully_shard``, under ``ModelParallelStrategy``), each process changes its own part; full and
      sharded checkpoints resume on any number of processes.

    A module that makes its layers in ``configure_model`` or ``setup``, or gives them values there, gets the patches that touch
    them right after; until then they are :attr:`pending`, and not applied.

    Args:
        module: a ``LightningModule``, a Hugging Face model, or any ``nn.Module``.
        patches: by name; all are enabled at full strength.
        strengths: of patches that are not to be enabled fully, by name; 0 for disabled.
        make_optimizer: for a plain model: from parameters to an optimizer.
        strict: see :meth:`lrp_prune.Patch.apply_`.

    Raises:
        KeyError: a patch touches parameters that the module has not.
        ValueError: a patch was made for another model, two enabled ones overlap, or a strength is outside [0, 1].
        TypeError: ``module`` is no module.

    Example:
        >>> import torch
        >>> from lrp_prune.correction import Patch
        >>> model = nn.Linear(2, 1, bias=False)
        >>> corrected = CorrectedModule(model, {"example": Patch.from_positions(model, {"weight": torch.tensor([0])})})
        >>> model.weight[0, 0].item(), corrected.strengths
        (0.0, {'example': 1.0})
        >>> corrected.disable("example")
        >>> model.weight[0, 0].item() != 0.0
        True
    """

    def __init__(
        self,
        module: nn.Module,
        patches: Mapping[str, Patch] | None = None,
        strengths: Mapping[str, float] | None = None,
        make_optimizer: Callable[[Iterable[nn.Parameter]], Optimizer] | None = None,
        strict: bool = True,
    ) -> None:
        super().__init__()
        if not isinstance(module, nn.Module):
            raise TypeError(f"module must be a LightningModule or another nn.Module, got {type(module).__name__}")
        if isinstance(module, CorrectedModule):
            raise TypeError("module is a CorrectedModule already: add patches to it with add()")
        inner = unwrap(module)
        if isinstance(inner, LightningModule) and make_optimizer is not None:
            raise ValueError(
                f"make_optimizer is for plain models: {type(inner).__name__} configures its own optimizers"
            )
        self.module = module
        delegate = inner if isinstance(inner, LightningModule) else PlainSteps(module, make_optimizer)
        set_metric_names(delegate, MetricNames(self))
        # Not as a child: the module inside is one already, and parameters must have one name.
        self.__dict__["_delegate"] = delegate
        self._corrections = Corrections(module)
        self._pending: dict[str, tuple[Patch, float, bool]] = {}
        self._loaded: dict[str, Any] | None = None
        # Functions, not bound methods: torch calls them with the module, so that a copy's are about the copy.
        self.register_state_dict_post_hook(CorrectedModule._without_corrections)  # type: ignore[no-untyped-call]  # torch's
        self.register_load_state_dict_pre_hook(CorrectedModule._before_load)  # type: ignore[no-untyped-call]  # torch's
        self.register_load_state_dict_post_hook(CorrectedModule._have_loaded)  # type: ignore[no-untyped-call]  # torch's
        strengths = dict(strengths or {})
        unknown = next((name for name in strengths if name not in (patches or {})), None)
        if unknown is not None:
            raise KeyError(f"strengths names a patch {unknown!r} that is not given")
        for name, patch in (patches or {}).items():
            check_strength(strengths.get(name, 1.0))
            self._pending[name] = (patch, strengths.get(name, 1.0), strict)
        self.settle(late=is_overridden("configure_model", delegate) or is_overridden("setup", delegate))

    @property
    def delegate(self) -> LightningModule:
        """What Lightning's hooks and attributes are of: the module inside, or the steps of a plain model."""
        return cast(LightningModule, self.__dict__["_delegate"])

    @property
    def patches(self) -> dict[str, Patch]:
        """All patches by name, enabled or not."""
        return {**self._corrections.patches, **{name: patch for name, (patch, _, _) in self._pending.items()}}

    @property
    def strengths(self) -> dict[str, float]:
        """How strongly each patch is applied, 0 for disabled ones and for those that are :attr:`pending`."""
        return {**self._corrections.strengths, **dict.fromkeys(self._pending, 0.0)}

    @property
    def pending(self) -> dict[str, float]:
        """Of the patches whose parameters are still to come: how strongly each will be applied."""
        return {name: strength for name, (_, strength, _) in self._pending.items()}

    def add(self, name: str, patch: Patch, strength: float = 1.0, *, strict: bool = True) -> None:
        """Take in a patch and enable it; with strength 0 it stays disabled.

        Raises:
            KeyError: it touches parameters that the module has not.
            ValueError: the name is taken, the patch is of another model, overlaps an enabled one, or the strength is
                outside [0, 1]. Nothing has changed then.
        """
        check_strength(strength)
        if name in self._pending:
            raise ValueError(f"there is a patch {name!r} already: remove it first, or take another name")
        self._corrections.add(name, patch, strict=strict)
        try:
            self._corrections.enable(name, strength)
        except BaseException:
            self._corrections.remove(name)
            raise

    def remove(self, name: str) -> Patch:
        """Disable a patch and forget it, also if it is pending.

        Raises:
            KeyError: there is none of that name.
        """
        if name in self._pending:
            return self._pending.pop(name)[0]
        return self._corrections.remove(name)

    def enable(self, name: str, strength: float = 1.0) -> None:
        """Apply a patch, or change how strongly it is applied: 0 as before, 1 removed; a pending one, once it can be.

        Raises:
            KeyError: there is none of that name.
            ValueError: it overlaps another enabled one, or the strength is outside [0, 1].
        """
        if name in self._pending:
            check_strength(strength)
            patch, _, strict = self._pending[name]
            self._pending[name] = (patch, strength, strict)
            return
        self._corrections.enable(name, strength)

    def disable(self, name: str) -> None:
        """Bring back, bit by bit, what was there when the patch was enabled; a pending one stays disabled.

        Raises:
            KeyError: there is none of that name.
        """
        if name in self._pending:
            self.enable(name, 0.0)
            return
        self._corrections.disable(name)

    def uncorrected(self) -> AbstractContextManager[None]:
        """A context in which the model is as it is without any patch; not for training steps.

        Contexts may be nested. What is enabled within one is applied when the outermost is left; a copy that is made
        within one has all patches disabled. What is done to the weights within one stays: prune a corrected model by
        ``with corrected.uncorrected(): masks.apply_(corrected)``, and no patch brings back what was pruned.
        """
        return self._corrections.suspended()

    def attach(self, optimizers: Iterable[Optimizer]) -> None:
        """Keep patched entries through the steps of these optimizers; a ``Trainer`` run does it by itself."""
        self._corrections.attach(optimizers)

    def release(self) -> None:
        """Let go of the optimizers of :meth:`attach`; gradients of patched entries stay masked."""
        self._corrections.release()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module inside, called."""
        return self.module(*args, **kwargs)

    def save_pretrained(self, path: str | os.PathLike[str], *, merged: bool = True, **options: Any) -> None:
        """Write the Hugging Face model inside, for plain ``from_pretrained``.

        A sharded model is brought together weight by weight and written by the first process; all must call this.

        Args:
            path: a folder.
            merged: write the corrected weights. Otherwise the uncorrected ones, each patch to ``patches/`` and ``patches.json``
                with files and strengths; :func:`lrp_prune.correction.load_patches` reads them. Patches get the values that the
                written weights have, so that they apply to them also after further training.
            **options: of the model's own ``save_pretrained``.

        Raises:
            ValueError: there is no Hugging Face model inside, or an enabled patch acts under a condition, not in the weights.
        """
        model: Any = pretrained_in(self.module)
        if not hasattr(model, "save_pretrained"):
            raise ValueError(
                f"{type(model).__name__} has no save_pretrained: save state_dict() or a checkpoint instead"
            )
        if merged:
            self._corrections.check_mergeable()
            save_model(model, path, **options)
            return
        with self.uncorrected():
            save_model(model, path, **options)
        current = {name: self._corrections.current(name) for name in self.patches}
        if is_first(mesh_of(model)):
            save_patches(path, current, self.strengths)

    def get_extra_state(self) -> dict[str, Any]:
        """All patches and strengths, as tensors and plain values; packed into one value if the model is sharded."""
        patches = {name: patch.state_dict() for name, patch in self.patches.items()}
        state = {"version": 1, "patches": patches, "strengths": {**self.strengths, **self.pending}}
        return state if mesh_of(self.module) is None else packed(state)

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Have these patches once the weights are loaded."""
        check_version(state)
        self._loaded = unpacked(state)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "_delegate" not in self.__dict__:
                raise
        delegate = self.delegate
        return getattr(unwrap(self.module) if isinstance(delegate, PlainSteps) else delegate, name)

    def __setattr__(self, name: str, value: Any) -> None:
        # Tuners and callbacks set what the module inside reads.
        own = "_delegate" not in self.__dict__ or name in self.__dict__ or hasattr(type(self), name)
        if own or name in self._modules or not hasattr(self.delegate, name):
            super().__setattr__(name, value)
        else:
            setattr(self.delegate, name, value)

    def settle(self, late: bool = False) -> None:
        """Apply the patches that wait; ``late``: those whose parameters are missing or without values may wait on.

        Raises:
            KeyError: a patch touches parameters that the module has not.
            ValueError: a patch was made for another model, or overlaps an enabled one. Nothing has changed then.
        """
        ready = {
            name: (patch, strength, strict)
            for name, (patch, strength, strict) in self._pending.items()
            if not (late and isinstance(patch, Patch) and awaited(patch, self.module))
        }
        added: list[str] = []
        try:
            for name, (patch, _, strict) in ready.items():
                self._corrections.add(name, patch, strict=strict)
                added.append(name)
            for name, (_, strength, _) in ready.items():
                self._corrections.enable(name, strength)
        except BaseException:
            for name in added:
                self._corrections.remove(name)
            raise
        self._pending = {name: entry for name, entry in self._pending.items() if name not in ready}

    @Extended
    def setup(self, method: Callable[..., Any], stage: str) -> None:
        """Patches that wait for parameters are applied once those are made, here or in ``configure_model``."""
        method(stage)
        self.settle(late=is_overridden("configure_model", self.delegate))

    @Extended
    def configure_model(self, method: Callable[..., Any]) -> None:
        """Patches that wait for parameters are applied once those are made."""
        method()
        self.settle()

    @Extended
    def on_train_start(self, method: Callable[..., Any]) -> None:
        """Optimizers are watched from the start of training."""
        self.attach(self.trainer.optimizers)
        method()

    @Extended
    def on_train_end(self, method: Callable[..., Any]) -> None:
        """Optimizers are left alone at its end."""
        self.release()
        method()

    @Extended
    def on_save_checkpoint(self, method: Callable[..., Any], checkpoint: dict[str, Any]) -> None:
        """Checkpoints have the patches outside of the state dict too: a strategy may load the weights alone, by itself."""
        checkpoint[PATCHES] = self.get_extra_state()
        method(checkpoint)

    @Extended
    def on_load_checkpoint(self, method: Callable[..., Any], checkpoint: dict[str, Any]) -> None:
        """Where a strategy has loaded the weights already, the patches follow them, or those there are stay."""
        if "state_dict" not in checkpoint:
            self._corrections.suspend(untouched=True)
            state = checkpoint.get(PATCHES)
            if state is not None:
                self.set_extra_state(state)
            self._have_loaded()
        method(checkpoint)

    def _without_corrections(self, state: dict[str, Any], prefix: str, metadata: Any) -> None:
        """State dicts have uncorrected weights."""
        at_rest(self)
        self._corrections.without(state, keys_of(self.named_parameters(remove_duplicate=False), prefix))

    def _before_load(self, state: dict[str, Any], prefix: str, *_: Any) -> None:
        """Weights are loaded into an uncorrected model."""
        check_version(state.get(f"{prefix}_extra_state"))
        # What is not loaded must be uncorrected too when everything is corrected again.
        self._corrections.suspend()
        state.setdefault(f"{prefix}_extra_state", self.get_extra_state())

    def _have_loaded(self, incompatible_keys: Any = None) -> None:
        """Loaded weights are corrected by the patches that came with them, else by those that there are."""
        state, self._loaded = self._loaded, None
        if state is None:
            self._corrections.renew()
            return
        self._pending = {}
        patches = {name: patch_of(patch) for name, patch in state["patches"].items()}
        self._corrections.replace(patches, state["strengths"])
