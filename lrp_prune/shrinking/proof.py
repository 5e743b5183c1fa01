"""The proof: a model's outputs on reference batches, and how far those of another form of it are from them."""

import math
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lrp_prune.models.backends import eager_attention
from lrp_prune.models.batches import to_device
from lrp_prune.models.profile import profile_of
from lrp_prune.models.returned import tensors_within
from lrp_prune.models.states import eager, unchanged_configuration, unchanged_state, undisturbed
from lrp_prune.names import class_name

_ROUNDINGS = 1000
_LARGEST = 0.05

Run = Callable[[nn.Module, Any], Any]


def tolerance_for(dtype: torch.dtype) -> float:
    """How far outputs may be apart, as a share of the largest: 1000 roundings of the type, and 5 % in half precision.

    Example:
        >>> tolerance_for(torch.float32), tolerance_for(torch.bfloat16)
        (0.00011920928955078125, 0.05)
    """
    return min(_ROUNDINGS * torch.finfo(dtype).eps, _LARGEST)


@contextmanager
def unrecorded(module: nn.Module) -> Iterator[None]:
    """Passes that leave a model, its buffers and its configuration as they were."""
    with ExitStack() as stack:
        for context in (torch.inference_mode(False), undisturbed(module), unchanged_state(module), eager(module)):
            stack.enter_context(context)
        stack.enter_context(unchanged_configuration(profile_of(module).config))
        yield


def answers(module: nn.Module, batch: Any, run: Run) -> list[Tensor]:
    """All floating-point tensors of a model's output for a batch; the model is as it was."""
    parameter = next(module.parameters(), None)
    with unrecorded(module), torch.no_grad():
        output = run(module, batch if parameter is None else to_device(batch, parameter.device))
        return [value.detach().clone() for value in tensors_within(output) if value.is_floating_point()]


class Proof:
    """What a model puts out on batches, to be compared with.

    Args:
        module: the model.
        batches: reference samples.
        run: how it is run on one.

    Raises:
        ValueError: if there are none, or it puts out nothing that could be compared, what is not finite, or something else when
            it is run again.
    """

    def __init__(self, module: nn.Module, batches: Iterable[Any], run: Run) -> None:
        self.batches, self._run = list(batches), run
        if not self.batches:
            raise ValueError("there are no batches: shrink runs the model on some, to compare what it puts out")
        self._expected = [answers(module, batch, run) for batch in self.batches]
        self._eager: list[Tensor] = []
        for expected in self._expected:
            if not expected:
                raise ValueError(f"{class_name(module)} puts out no floating-point tensor that could be compared")
            if not all(bool(torch.isfinite(value).all()) for value in expected):
                raise ValueError(
                    f"{class_name(module)} under its masks puts out values that are not finite for these batches: "
                    "nothing could be proved with them"
                )
        dtypes = [value.dtype for expected in self._expected for value in expected]
        self.tolerance = max(map(tolerance_for, dtypes), default=0.0)
        apart = self.difference(module, batches=1)
        if apart > self.tolerance:
            raise ValueError(
                f"{class_name(module)} puts out something else when it is run on the same batch again (apart by {apart:.2g} of "
                "the largest): nothing could be proved by that. Random numbers of torch, NumPy and Python are the same in each "
                "run, those of generators of its own are not"
            )

    def draws(self, module: nn.Module) -> bool:
        """Whether outputs of a run depend on random numbers, as with a dropout that is on in evaluation.

        Args:
            module: the model as it is now.
        """
        expected = answers(module, self.batches[0], self._run)
        with undisturbed(module):
            torch.manual_seed(1 + torch.initial_seed() % 2**32)
            random.seed(0)
            np.random.seed(0)
            return _apart(answers(module, self.batches[0], self._run), expected) > self.tolerance

    def with_eager_attention(self, module: nn.Module) -> None:
        """Compare the first batch with plain attention as well: fused kernels do not read all numbers of a module.

        Args:
            module: the model under its masks.
        """
        try:
            with eager_attention(module) as other:
                self._eager = answers(module, self.batches[0], self._run) if other else []
        except (NotImplementedError, ValueError):  # it has no plain attention, and nothing will read its numbers there
            self._eager = []

    def difference(self, module: nn.Module, batches: int | None = None) -> float:
        """How far outputs are from the expected ones, at most, as a share of the largest of each tensor.

        Args:
            module: the model as it is now.
            batches: how many are run; None for all.

        Raises:
            Exception: what the model raises.
        """
        worst = 0.0
        for batch, expected in list(zip(self.batches, self._expected, strict=True))[:batches]:
            worst = max(worst, _apart(answers(module, batch, self._run), expected))
        if self._eager:
            with eager_attention(module):
                worst = max(worst, _apart(answers(module, self.batches[0], self._run), self._eager))
        return worst

    def check(self, module: nn.Module, when: str) -> float:
        """:meth:`difference` over all batches, which has to be rounding.

        Raises:
            RuntimeError: if it is more.
        """
        difference = self.difference(module)
        if difference > self.tolerance:
            raise RuntimeError(
                f"{when} the smaller model's outputs are not those of the masked one for all batches (apart by {difference:.2g} "
                f"of the largest, {self.tolerance:.2g} would be rounding): nothing was changed"
            )
        return difference


def _apart(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    if [value.shape for value in found] != [value.shape for value in expected]:
        return math.inf
    worst = 0.0
    for mine, theirs in zip(found, expected, strict=True):
        if theirs.numel():
            apart = (mine.double() - theirs.double()).abs().max() / theirs.double().abs().max().clamp(min=1e-30)
            worst = max(worst, math.inf if bool(torch.isnan(apart)) else float(apart))
    return worst
