r"""Statistics of units: what arrives at their channels in the layers that read them, reduced over tokens and samples.

With the activation ``a`` of a layer's input channels and the propagated gradient ``d`` of the same channels, the relevance of a
unit ``u`` at a token is :math:`R_u = \sum_{c \in u} a_c d_c`. Reduced over tokens and samples as weights are
(:mod:`lrp_prune.relevance.statistics`), and summed over the layers that read the unit. ``input_norm`` is
:math:`\sum_{c \in u} \|w_c\|^2 \|a_c\|^2` with the weights :math:`w_c` by which the channel is read: Wanda's
(arXiv 2306.11695) squared contributions, summed over a unit's.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from lrp_prune.attribution.conductance import Conductance
from lrp_prune.engine.batch_layout import BatchLayout
from lrp_prune.engine.channels import by_weight, channels_last
from lrp_prune.engine.forms import Convolution
from lrp_prune.engine.shadow import distinct
from lrp_prune.engine.uses import Use
from lrp_prune.relevance.statistics import Statistic, power_of
from lrp_prune.without_data import has_data


class ReadStatistic:
    """Sums of the units that one layer reads.

    Args:
        name: the layer's, in messages.
        statistic: what is summed.
        batch: tells samples and tokens apart.
        units: for a use, the number of the unit of each input channel; below 0 where there is none.
        path: sums up what flows while inputs come from zeros; None: they are what they are.
    """

    operand_dtype: torch.dtype | None = None
    propagated_dtype: torch.dtype | None = None

    def __init__(
        self,
        name: str,
        statistic: Statistic,
        batch: BatchLayout,
        units: Callable[[Use], Tensor],
        path: Conductance | None = None,
    ) -> None:
        self.name, self.statistic, self._batch, self._units = name, statistic, batch, units
        self.backward_needed = statistic.backward_needed
        self.path = path
        self._parts: list[tuple[Tensor, Tensor]] = []

    def forward(self, use: Use, activation: Tensor) -> None:
        """Add what the forward alone tells."""
        if self.backward_needed or not self.statistic.counted:
            return
        with torch.no_grad(), torch._C.DisableTorchFunction():
            counted = self._counted(use, _wide(activation.detach()))
            energy = counted.reshape(-1, counted.shape[-1]).square().sum(0)
            if not self.statistic.weighing:
                self._add(self._units(use).to(energy.device), energy)
                return
            weights = _wide(use.weight.detach()).square()
            read = weights * by_weight(use.form, use.weight, energy, reading=True)
            units = by_weight(use.form, use.weight, self._units(use).to(energy.device), reading=True)
            self._add(units.expand(read.shape).reshape(-1), read.reshape(-1))

    def backward(self, use: Use, activation: Tensor, d: Tensor, input_gradient: Tensor) -> None:
        """Add one use of one batch."""
        relevance = self._relevance(_wide(activation), _wide(input_gradient))
        if relevance is None:
            return
        relevance = self._counted(use, relevance)
        units = self._units(use).to(relevance.device)
        relevance, numbers = _by_unit(relevance, units)
        if self.statistic.by_map and isinstance(use.form, Convolution):
            maps = relevance if activation.dim() == use.weight.dim() else relevance[None]  # there may be no samples
            reduced = maps.reshape(maps.shape[0], -1, len(numbers)).sum(1).abs().sum(0)
        elif self.statistic.by_sample:
            samples = self._batch.by_sample(relevance, self.name, use.edge)
            reduced = samples.reshape(samples.shape[0], -1, len(numbers)).sum(1).abs().sum(0)
        else:
            reduced = power_of(relevance.reshape(-1, len(numbers)), self.statistic.power, relevance.dtype).sum(0)
        self._add(numbers, reduced)

    def _counted(self, use: Use, values: Tensor) -> Tensor:
        """What a layer reads ``[..., channels]``, with zeros at tokens that do not count."""
        if use.form.channel_dim is None:  # tokens may come after heads
            return self._batch.only_counted(channels_last(use.form, use.weight, values), self.name, use.edge)
        return channels_last(use.form, use.weight, self._batch.only_counted(values, self.name, use.edge, use.form))

    def _relevance(self, activation: Tensor, gradient: Tensor) -> Tensor | None:
        """Of each entry of an activation; None where the end of a path is still to come."""
        return activation * gradient if self.path is None else self.path.add(activation, gradient)

    def _add(self, numbers: Tensor, values: Tensor) -> None:
        if self._parts and has_data(numbers) and torch.equal(self._parts[-1][0], numbers):
            self._parts[-1] = numbers, self._parts[-1][1] + values
        else:
            self._parts.append((numbers, values))

    @property
    def reached(self) -> bool:
        """Whether it knows anything of the units: what nothing is propagated to is not known to be irrelevant."""
        return bool(self._parts) or not self.statistic.counted

    def finish(self) -> tuple[Tensor, Tensor]:
        """The numbers of the units, and their sums; handed over."""
        parts, self._parts = self._parts, []
        if not parts:
            return torch.empty(0, dtype=torch.int64, device="cpu"), torch.empty(0, device="cpu")
        numbers, values = (torch.cat([part[index].cpu() for part in parts]) for index in (0, 1))
        units, places = distinct(numbers[numbers >= 0])
        return units.long(), values.new_zeros(len(units)).index_add_(0, places, values[numbers >= 0])


def _by_unit(relevance: Tensor, units: Tensor) -> tuple[Tensor, Tensor]:
    """Relevance ``[..., channels]`` summed to ``[..., units]``, and the units' numbers."""
    numbers, places = distinct(units)
    if len(numbers) == len(units):
        return relevance, units
    width = len(units) // len(numbers)
    regular = torch.arange(len(numbers), device=units.device).repeat_interleave(width)
    if width * len(numbers) == len(units) and torch.equal(places, regular):
        return relevance.reshape(*relevance.shape[:-1], len(numbers), width).sum(-1), numbers
    summed = relevance.new_zeros(*relevance.shape[:-1], len(numbers))
    return summed.index_add_(-1, places, relevance), numbers


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
