"""Keeping pruned weights at exactly zero through any training, at one byte per weight."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from itertools import compress
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.weak import TensorWeakRef

from lrp_prune.distributed.sharding import is_sharded, local_part
from lrp_prune.names import resolve
from lrp_prune.training.hooks import Hooks, check_optimizers, owned_by
from lrp_prune.training.optimizers import COUNTERS, SECOND_MOMENTS, keeps_zeros
from lrp_prune.training.zeroing import (
    any_of,
    as_bits,
    flat,
    is_dense,
    part_of,
    some_pruned,
    without_pruned,
    zero_pruned_,
)

_SECOND_MOMENT = 1e-6
_SECOND_MOMENT_EVERY = 200  # steps; it decays, by 0.9 in a step to 1e-15 in that time
_EVERYTHING_EVERY = 100  # steps
_KEPT = "pruned weights cannot be kept at zero"


class MaskKeeper:
    """Zeroes what the masks prune, and keeps it at exactly zero while the model trains.

    What happens when:

    - **Once, in the constructor and in** :meth:`update`: pruned weights, their ``.grad`` and their optimizer moments
      become zero. All masks are checked before the first weight changes.
    - **In each backward**: the gradient of pruned weights is zeroed as soon as it is accumulated, hence before gradient
      clipping, before DDP reduces it, and in manual optimization as well. Left in, it inflates the norm that clipping
      divides by, and optimizers that mix entries (Muon) change the kept weights by it.
    - **In each optimizer step**: nothing is left to do for optimizers that keep zeros
      (:func:`~lrp_prune.training.optimizers.keeps_zeros`). After a step of any other, weights and moments are zeroed again.
      Gradients that were assigned (``p.grad = ...``) or changed after the backward pass (by noise, say; clipping leaves
      zeros) are zeroed before the step, after its closure if it has one. On the CPU some entries tell whether they were
      changed: what a change of few entries of a large gradient brings back is zeroed within a hundred steps. On other
      devices, and in gradients that are laid out otherwise, so are changes through ``.data``.
    - **When an optimizer loads its state**: the loaded moments are zeroed.
    - **Where somebody looks** (:meth:`look`): what else has written to pruned weights is zeroed, and named.

    Second moments (averages of squared gradients) are the exception: of optimizers that keep zeros they stay
    positive where the first moment is zero, which makes the same update, exactly zero. On the CPU they are even kept
    from reaching zero, since the square root of a tensor with zeros in it takes ten times as long there (MKL; it made a
    whole training step a fifth slower).

    No parameter is renamed, wrapped or replaced, so state dicts are those of the plain model. Zeroing is a bitwise
    "and" with 0 or -1: it also turns NaN and infinity into zero, which a product would not.

    Args:
        model: the model; may be wrapped (see :func:`lrp_prune.names.resolve`).
        masks: canonical parameter name to a bool tensor of the parameter's shape, True where the weight is kept.
        optimizers: see :meth:`attach`.

    Raises:
        KeyError: a name is no parameter of the model.
        ValueError: a mask has another shape than its parameter, or another type than bool.

    Example:
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> optimizer = torch.optim.AdamW(model.parameters())
        >>> keeper = MaskKeeper(model, {"weight": torch.tensor([[True, False]])}, [optimizer])
        >>> model(torch.ones(1, 2)).sum().backward()
        >>> optimizer.step()
        >>> model.weight[0, 1].item(), model.weight.grad[0].tolist()
        (0.0, [1.0, 0.0])
        >>> keeper.remove()
    """

    def __init__(self, model: nn.Module, masks: Mapping[str, Tensor], optimizers: Iterable[Optimizer] = ()) -> None:
        self._model = model
        self._parameters: dict[str, nn.Parameter] = {}
        self._kept: dict[str, Tensor] = {}
        self._samples: dict[str, Tensor] = {}
        self._zeroed: dict[str, tuple[TensorWeakRef, int]] = {}
        self._versions: dict[str, int] = {}
        """Of each weight how often it had been written to when it was known to be zero where it has to be."""
        self._steps: Counter[int] = Counter()  # of each optimizer, by its id
        self._optimizers: list[Optimizer] = []
        self._parameter_hooks, self._optimizer_hooks = Hooks(), Hooks()
        optimizers = list(optimizers)
        check_optimizers(optimizers, _KEPT)
        self.update(masks)
        self.attach(optimizers)

    @property
    def nbytes(self) -> int:
        """Bytes held for the masks: one for each weight of the masked parameters."""
        return sum(kept.nbytes for kept in self._kept.values())

    def update(self, masks: Mapping[str, Tensor]) -> None:
        """Replace the masks by these and zero what they prune; raises as the constructor does."""
        parameters = resolve(masks, self._model) if len(masks) else {}
        kept = {}
        for name, parameter in parameters.items():
            mask = masks[name]
            if mask.dtype != torch.bool or mask.shape != parameter.shape:
                raise ValueError(
                    f"the mask of {name!r} must be a bool tensor of shape {tuple(parameter.shape)}, "
                    f"got {mask.dtype} of shape {tuple(mask.shape)}"
                )
            here = part_of(mask, parameter, name)
            if not here.all():
                kept[name] = as_bits(here, local_part(parameter))
        self._kept, self._samples = kept, {name: some_pruned(bits) for name, bits in kept.items()}
        self._parameters = {name: parameters[name] for name in kept}
        self._hook_parameters()
        self.enforce()

    def attach(self, optimizers: Iterable[Optimizer]) -> None:
        """Watch these optimizers, and no others, and zero the moments they hold.

        Also finds parameters again that were replaced since (by ``to_empty``, a parametrization, a new layer).
        Cheap enough to be called at each epoch.

        Raises:
            TypeError: for an object that has no hooks for its steps, since its updates cannot be followed.
            KeyError: a parameter is there no more.
            ValueError: one was replaced by one of another shape.
        """
        optimizers = list(optimizers)
        check_optimizers(optimizers, _KEPT)
        current = self._current()
        replaced = any(current[name] is not parameter for name, parameter in self._parameters.items())
        if replaced or not len(self._parameter_hooks):
            self._parameters = current
            self._hook_parameters()
        self._optimizer_hooks.clear()
        self._optimizers = optimizers
        for optimizer in optimizers:
            self._optimizer_hooks.on_step(optimizer, self._after_step, self._before_step, self._zero_moments)
        self.enforce()

    def enforce(self) -> None:
        """Zero pruned weights, their gradients and their moments now, whatever has happened to them."""
        for name, parameter in self._parameters.items():
            self._zero_weight(name, parameter)
            self._zero_gradient(name, parameter)
        for optimizer in self._optimizers:
            self._zero_moments(optimizer)

    def look(self, closely: bool = True) -> list[str]:
        """Zero the pruned weights that something else than an optimizer has brought back since the last step, and name them.

        A constraint that is applied after a step, say. It takes little time where nothing has written to them.

        Args:
            closely: look at some entries on the CPU as well, which tell of what is done through ``.data``; torch counts only what
                is done in place.
        """
        sampled: dict[str, Tensor] = {}
        found = [
            name for name, parameter in self._parameters.items() if not self._is_zero(name, parameter, closely, sampled)
        ]
        if any_of(sampled.values()):
            found += [name for name, entries in sampled.items() if bool(entries.any())]
        for name in found:
            self._zero_weight(name, self._parameters[name])
        return found

    def brought_back(self) -> list[str]:
        """The names of weights that are pruned and not zero in every place, as something else than an optimizer wrote to them.

        Raises:
            KeyError, ValueError: see :meth:`attach`.
        """
        return [
            name
            for name, parameter in self._current().items()
            if bool(local_part(parameter).detach()[self._bits(name, parameter) == 0].any())
        ]

    def remove(self) -> None:
        """Take off every hook. The weights stay as they are; the next step may change pruned ones again."""
        self._parameter_hooks.clear()
        self._optimizer_hooks.clear()
        self._optimizers = []

    def __getstate__(self) -> dict[str, Any]:
        # What a gradient was is looked at anew in a copy: weak references cannot be pickled.
        return {**self.__dict__, "_zeroed": {}}

    def _current(self) -> dict[str, nn.Parameter]:
        """The parameters that are masked, whatever has been put in their place."""
        current = resolve(self._kept, self._model) if self._kept else {}
        for name, parameter in current.items():
            here, masked = tuple(local_part(parameter).shape), tuple(self._kept[name].shape)
            if here != masked:
                raise ValueError(
                    f"{name} has shape {here} now, and its mask {masked}: it was replaced after it had been pruned. Replace it "
                    "before the first round, or by one of the same shape, or leave it out by exclude="
                )
        return current

    def _bits(self, name: str, parameter: Tensor) -> Tensor:
        kept = self._kept[name]
        if kept.device != parameter.device:
            kept = self._kept[name] = kept.to(parameter.device)
        return kept

    def _hook_parameters(self) -> None:
        self._parameter_hooks.clear()
        self._zeroed = {}
        for name, parameter in self._parameters.items():
            self._parameter_hooks.on_gradient(parameter, partial(self._zero_gradient, name))

    def _zero_weight(self, name: str, parameter: Tensor) -> None:
        zero_pruned_(parameter, self._bits(name, parameter))
        self._note_zero(name, parameter)

    def _note_zero(self, name: str, parameter: Tensor) -> None:
        self._versions[name] = local_part(parameter)._version

    def _is_zero(self, name: str, parameter: Tensor, closely: bool, sampled: dict[str, Tensor]) -> bool:
        counted = local_part(parameter) if is_sharded(parameter) else parameter
        unchanged = counted._version == self._versions.get(name)
        if unchanged and not closely:
            return True
        here, kept = local_part(parameter), self._bits(name, parameter)
        if unchanged:
            if here.device.type == "cpu" and here.stride() == kept.stride() and is_dense(here):
                sampled[name] = flat(here.detach())[self._samples[name]]
            return True
        if bool(here[kept == 0].any()):
            return False
        self._note_zero(name, parameter)
        return True

    def _zero_gradient(self, name: str, parameter: Tensor) -> None:
        whole = parameter.grad
        if whole is None:
            return
        gradient = local_part(whole) if is_sharded(whole) else whole
        kept = self._bits(name, parameter)
        if gradient.is_sparse:
            parameter.grad = without_pruned(gradient, kept)
            return
        zero_pruned_(gradient, kept)
        self._zeroed[name] = TensorWeakRef(whole), gradient._version

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """Look at the gradients: where the step runs a closure, which makes and changes them, once that has run."""
        # The first argument is the optimizer itself.
        closure = kwargs["closure"] if "closure" in kwargs else args[1] if len(args) > 1 else None
        if closure is None:
            self._check_gradients(optimizer)
            return args, kwargs

        def checked() -> Any:
            loss = closure()
            self._check_gradients(optimizer)
            return loss

        if "closure" in kwargs:
            return args, {**kwargs, "closure": checked}
        return (args[0], checked, *args[2:]), kwargs

    def _check_gradients(self, optimizer: Optimizer) -> None:
        sampled: dict[str, Tensor] = {}
        for name, parameter in self._of(optimizer):
            if parameter.grad is not None and not self._is_zeroed(name, parameter.grad, sampled):
                self._zero_gradient(name, parameter)
        # One look at all of them: of many small tensors each would take longer than what it looks at.
        if any_of(sampled.values()):
            for name in sampled:
                self._zero_gradient(name, self._parameters[name])

    def _is_zeroed(self, name: str, gradient: Tensor, sampled: dict[str, Tensor]) -> bool:
        """Whether a gradient is zero where it has to be, as far as is known without looking at the sample that is put there:
        going through all of it costs as much as all the rest.

        Most changes are multiplications, as in clipping and unscaling, which leave zeros.
        """
        known, version = self._zeroed.get(name, (None, -1))
        if known is None or known() is not gradient:
            return False  # it was assigned
        here, kept = local_part(gradient), self._kept[name]
        if here.device.type != "cpu" or here.stride() != kept.stride() or not is_dense(here):
            return here._version == version
        sampled[name] = flat(here)[self._samples[name]]
        return True

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._steps[id(optimizer)] += 1
        if keeps_zeros(optimizer):
            self._keep_second_moments_positive(optimizer)
            if self._steps[id(optimizer)] % _EVERYTHING_EVERY:
                for name, parameter in self._of(optimizer):
                    self._note_zero(name, parameter)
                return
        for name, parameter in self._of(optimizer):
            self._zero_weight(name, parameter)
        self._zero_moments(optimizer)

    def _keep_second_moments_positive(self, optimizer: Optimizer) -> None:
        # By the optimizer's own count of steps, so that a resumed run does it at the same steps.
        for name, parameter in self._of(optimizer):
            state = optimizer.state.get(parameter, {})
            if parameter.device.type == "cpu" and "step" in state and int(state["step"]) % _SECOND_MOMENT_EVERY == 1:
                for key in SECOND_MOMENTS & state.keys():
                    local_part(state[key]).masked_fill_(self._bits(name, parameter) == 0, _SECOND_MOMENT)

    def _of(self, optimizer: Optimizer) -> Iterator[tuple[str, nn.Parameter]]:
        return compress(self._parameters.items(), owned_by(optimizer, self._parameters.values()))

    def _zero_moments(self, optimizer: Optimizer) -> None:
        if isinstance(optimizer, torch.optim.LBFGS):
            self._zero_history(optimizer)
            return
        left = COUNTERS | SECOND_MOMENTS if keeps_zeros(optimizer) else COUNTERS
        for name, parameter in self._of(optimizer):
            for key, value in list(optimizer.state.get(parameter, {}).items()):
                moment = isinstance(value, Tensor) and value.shape == parameter.shape and key not in left
                # Integer states are codes of a quantized optimizer, in which 0 need not mean zero.
                if not moment or not (value.is_floating_point() or value.is_complex()):
                    continue
                kept = self._bits(name, parameter).to(value.device)
                if value.is_sparse:
                    optimizer.state[parameter][key] = without_pruned(value, kept)
                else:
                    zero_pruned_(value, kept)

    def _zero_history(self, optimizer: torch.optim.LBFGS) -> None:
        """L-BFGS keeps past steps and gradients as vectors over all its parameters, in the state of the first."""
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        names = {id(parameter): name for name, parameter in self._parameters.items()}
        sizes = [parameter.numel() for parameter in parameters]
        for value in list(optimizer.state.get(parameters[0], {}).values()):
            for vector in value if isinstance(value, list) else [value]:
                if not isinstance(vector, Tensor) or vector.shape != (sum(sizes),):
                    continue
                for parameter, part in zip(parameters, torch.split(vector, sizes), strict=True):
                    if id(parameter) in names:
                        zero_pruned_(part, self._bits(names[id(parameter)], parameter).reshape(-1).to(part.device))
