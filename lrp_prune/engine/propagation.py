"""``attributing``: LRP for the time of a context, on any model, without a trace."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lrp_prune.engine.audit import Audit, Finding
from lrp_prune.engine.checkpoints import propagating_checkpoints
from lrp_prune.engine.composites import Composite, CompositeLike, composite_of
from lrp_prune.engine.constants import Constants
from lrp_prune.engine.endings import Endings
from lrp_prune.engine.entering import guard
from lrp_prune.engine.entries import check_places
from lrp_prune.engine.held import Held
from lrp_prune.engine.latent import latent_modules, recorded
from lrp_prune.engine.mode import PropagationMode
from lrp_prune.engine.modules import is_activation_module
from lrp_prune.engine.opened import opening
from lrp_prune.engine.places import Places
from lrp_prune.engine.precision import is_finite, without_autocast
from lrp_prune.engine.registry import MODULE_RULES, any_placed
from lrp_prune.engine.roots import Root, Roots
from lrp_prune.engine.rules import gradient as plain_gradient
from lrp_prune.engine.saved import Saving
from lrp_prune.engine.tracing import UnitTracer
from lrp_prune.engine.unsharding import unsharding
from lrp_prune.engine.uses import Use, WeightUses
from lrp_prune.engine.wrapping import replaced, whole
from lrp_prune.models.backends import traceable
from lrp_prune.models.scripted import refuse_scripted
from lrp_prune.models.states import eager, unchanged_state
from lrp_prune.names import class_name, named_modules, named_parameters, unwrap

UNRULED = ("warn", "error", "ignore")


class Propagation:
    """What :func:`attributing` yields: turns an explained value into relevance."""

    def __init__(self, mode: PropagationMode, roots: Roots, endings: Endings) -> None:
        self._mode, self._roots, self._endings = mode, roots, endings
        self._latent: list[tuple[str, Tensor]] = []
        self._explained = 0
        """Calls of the model up to the last whose relevance was given."""

    def relevance(self, target: Tensor) -> dict[str, Tensor]:
        r"""Relevance of every root and latent module for the value: :math:`R = x \cdot \partial\,\mathrm{target} / \partial x`.

        One backward pass; ``.grad`` of no parameter is touched.

        Args:
            target: a scalar computed from the model's output inside the context.

        Returns:
            Name -> tensor of its shape, in its dtype. Roots are

            * the outputs of embeddings, by the name of the module that looks up (where encoder and decoder share one, by the
              name that the caller has for it), and float inputs, by argument name;
            * parameters that enter as data, by parameter name: what is concatenated or put into some positions, and what
              is added and has two dimensions or more;
            * constants that enter so, by buffer name, or as ``module.constant`` (``module.detached`` if made of activations)
              by the module that returned or used them, where they have relevance; masks and scalars are none.

            What was met several times has further entries ``name#1``, ``name#2``, ... An input that the target does not
            depend on has relevance zero.

        Raises:
            ValueError: if the target is no scalar, does not depend on a forward inside this context, or relevance of that was
                given; says why.
            FloatingPointError: if the target or a relevance is not finite.
            UnruledOperationError: if it depends on an operation without a rule, and ``unruled`` is ``"error"``.
        """
        result: dict[str, Tensor] = {}
        for root, relevance in self.entries(target):
            repeats = sum(key == root.name or key.startswith(f"{root.name}#") for key in result)
            result[f"{root.name}#{repeats}" if repeats else root.name] = relevance
        return result

    def entries(self, target: Tensor) -> list[tuple[Root, Tensor]]:
        """What :meth:`relevance` names: roots in the order of the forward, then latent modules, each with its relevance."""
        roots, latent = self._roots.take(), self._latent
        self._latent = []
        entries = [*roots, *(Root(name, tensor, latent=True) for name, tensor in latent)]
        if not entries and 0 < self._endings.calls == self._explained:
            given = "relevance is given once for each forward, and that of the last one was given"
            raise ValueError(f"{given}: call the model again, or explain a sum of values at once")
        gradients = self.gradients(target, [root.leaf for root in entries])
        self.check_reached(target, gradients)
        result: list[tuple[Root, Tensor]] = []
        for root, gradient in zip(entries, gradients, strict=True):
            relevance = root.relevance(gradient)
            if root.constant and not relevance.is_meta and not bool(relevance.any()):
                continue
            if not is_finite(relevance):
                raise FloatingPointError(
                    f"the relevance of {root.name!r} is not finite: check the batch and the precision"
                )
            result.append((root, relevance))
        self._explained = self._endings.calls
        return result

    def note_latent(self, name: str, output: Tensor) -> None:
        """A module that was asked for has run."""
        self._latent.append((name, output))

    def noting_biases(self) -> dict[str, list[Tensor]]:
        """By module what it adds to activations that absorbs relevance, from now on; whatever it is called."""
        found: dict[str, list[Tensor]] = {}
        self._roots.biases = found
        return found

    def unruled(self, target: Tensor) -> list[Finding]:
        """The operations without a rule that a value depends on; they are not warned of any more."""
        return [] if self._mode.audit is None else self._mode.audit.take(target)

    def roots(self) -> list[Root]:
        """The roots of the forward that has just run, for those who reduce relevance themselves."""
        return self._roots.take()

    def gradients(self, target: Tensor, tensors: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
        """Run the backward pass under the rules, so that recomputed (checkpointed) layers see them as well."""
        self.check_target(target)
        if not tensors:
            raise ValueError(self._endings.reason(target))
        return self._backward(target.reshape(()), tensors)

    def made_by(self, held: Held) -> list[tuple[Use, Tensor]]:
        """The uses of weights that what rules hold constant was made by, each with the gradient of what it wrote."""
        return held.made_by(lambda value, tensors: self._backward(value, tensors, again=True))

    def _backward(self, value: Tensor, tensors: Sequence[Tensor], again: bool = False) -> tuple[Tensor | None, ...]:
        mode, audit = self._mode, self._mode.audit
        self._roots.recording, mode.audit = False, None
        try:
            with mode.acting(), without_autocast(value.device):
                return mode.backward(value, tensors, again)
        finally:
            self._roots.recording, mode.audit = True, audit

    def check_target(self, target: Any, propagated: bool = True) -> None:
        """Refuse what cannot be explained: more than one value, one that is not finite, or is cut off from the inputs.

        What it depends on without a rule is reported.

        Args:
            target: the explained value.
            propagated: whether relevance is to be propagated from it.
        """
        if not isinstance(target, Tensor) or target.numel() != 1:
            raise ValueError(
                f"the target must be a scalar tensor, got {_described(target)}: sum it, or explain one value at a time"
            )
        if not is_finite(target.detach()):
            raise FloatingPointError(
                f"the explained value is {target.item()}: the model's output is not finite on this batch"
            )
        if not propagated:
            return
        if not target.requires_grad:
            raise ValueError(self._endings.reason(target))
        if self._mode.audit is not None:
            self._mode.audit.report(target)

    def check_reached(self, target: Tensor, gradients: Sequence[Tensor | None]) -> None:
        """Refuse gradients that reached nothing, and say why."""
        if all(gradient is None for gradient in gradients):
            raise ValueError(self._endings.reason(target))


def _described(value: Any) -> str:
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


@contextmanager
def attributing(
    model: nn.Module,
    composite: CompositeLike = "attnlrp",
    latent: Sequence[str] | None = None,
    unruled: str = "warn",
) -> Iterator[Propagation]:
    """Propagate relevance through ``model`` by the rules of a composite, while the context lasts.

    Rules act inside the model's forward and in the backward pass of :meth:`Propagation.relevance`, and nowhere else: what is
    computed from the output (softmax, differences) seeds the outputs by its plain gradient. Dropout is off. When
    the context is left, also by an exception, everything is as before. Whether the model is in training or evaluation mode
    is the caller's choice.

    Args:
        model: any ``nn.Module``; parameters need not require grad.
        composite: ``"attnlrp"``, ``"cp_lrp"``, ``"gradient"``, a file such as ``"mine.yaml"``, or a
            :class:`~lrp_prune.attribution.Composite`.
        latent: patterns of module names whose outputs' relevance is wanted too.
        unruled: what to do where a nonlinear operation has no rule: ``"warn"``, ``"error"`` or ``"ignore"``.

    Raises:
        ValueError: for an unknown composite, or a latent pattern that matches no module.

    Example:
        >>> import torch, lrp_prune
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8, bias=False), torch.nn.ReLU(), torch.nn.Linear(8, 2, bias=False))
        >>> with lrp_prune.attributing(model, composite="cp_lrp") as propagation:
        ...     output = model(torch.ones(1, 4))
        ...     relevance = propagation.relevance(output[0, 0])
        >>> bool(torch.isclose(relevance["input"].sum(), output[0, 0], atol=1e-6))
        True
    """
    with propagating(model, composite_of(composite), latent, unruled, WeightUses(), constants=True) as propagation:
        yield propagation


@contextmanager
def propagating(
    model: nn.Module,
    composite: Composite,
    latent: Sequence[str] | None,
    unruled: str,
    uses: WeightUses,
    entries: Sequence[nn.Module] | None = None,
    tracer: UnitTracer | None = None,
    kept: torch.dtype | None = None,
    constants: bool = False,
    named: bool = True,
    share: float = 1.0,
    backward: bool = True,
) -> Iterator[Propagation]:
    """:func:`attributing` with observers of weights.

    Args:
        entries: the modules whose calls are "the model's forward"; by default the model itself, or where it is never called
            (a ``LightningModule`` that calls its children) its direct children.
        tracer: follows units.
        kept: the precision in which rules may keep activations for the backward pass; None for their own.
        constants: whether constants that enter as data are roots.
        share: of float inputs and outputs of embeddings, which come in as this much of what they are.
        named: whether messages, roots and rules know the module that runs; it costs time in each call of a module.
        backward: whether there may be a backward pass, for which activations are kept.
    """
    if unruled not in UNRULED:
        raise ValueError(f"unruled must be one of {UNRULED}, got {unruled!r}")
    running = eager(model)  # before it is unwrapped
    model, modules = unwrap(model), named_modules(model)
    refuse_scripted(model)
    check_places(composite.name, composite.entries, modules)
    wanted = latent_modules(modules, latent)
    # Where statistics are features, what keeps them from zero would have relevance as well.
    data = Constants(model, absorbing=composite.needs("statistics")) if constants else None
    roots, places, endings = Roots(data, share), Places(model), Endings(class_name(model), composite.name)
    uses.saving = Saving(everything=backward)
    audit = Audit(places, unruled, composite) if not composite.is_plain and unruled != "ignore" else None
    known = (composite, named_parameters(model), places, roots, uses, endings, tracer is not None or composite.traced)
    mode = PropagationMode(*known, tracer, audit, kept)
    propagation = Propagation(mode, roots, endings)
    with ExitStack() as stack:
        stack.enter_context(unsharding(model, mode))
        stack.enter_context(unchanged_state(model))
        stack.enter_context(traceable(model, experts=tracer is not None))
        stack.enter_context(propagating_checkpoints())
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(running)
        ruled = any(rule != plain_gradient for rule in composite.rules_of("activation"))
        for module in modules.values():
            if (ruled or tracer is not None) and is_activation_module(module):
                stack.enter_context(whole(module, mode))
            if type(module) in MODULE_RULES:
                stack.enter_context(replaced(module, mode, MODULE_RULES[type(module)]))
        if named or audit is not None or composite.is_placed or any_placed():
            stack.enter_context(_followed(places, mode, data))
        for name in wanted:
            handle = modules[name].register_forward_hook(recorded(name, roots, propagation.note_latent, mode.carry))
            stack.callback(handle.remove)
        guard(stack, model, entries or [model, *model.children()], mode, roots, endings, data, tracer, uses.saving)
        stack.enter_context(mode)
        if not composite.is_plain:
            stack.enter_context(opening(mode, lambda: mode.is_acting))
        yield propagation


@contextmanager
def _followed(places: Places, mode: PropagationMode, constants: Constants | None) -> Iterator[None]:
    """Follow the modules that run, and account for what goes into and comes out of them."""

    def before(arguments: Any) -> None:
        if mode.audit is not None and mode.is_acting:
            with torch._C.DisableTorchFunction():
                mode.audit.arrive(arguments)

    def after(output: Any) -> None:
        if mode.is_acting and (mode.audit is not None or constants is not None):
            with torch._C.DisableTorchFunction():
                if mode.audit is not None:
                    mode.audit.arrive(output)
                if constants is not None:
                    constants.returned(output, places.name)

    with places.following(before, after):
        yield
