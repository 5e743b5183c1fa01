"""Sums: where a statistic of relevance is kept for one weight, or for the rows of one embedding.

The factor ``W`` of the formulas (:mod:`lrp_prune.relevance.statistics`) is applied once, when the sums are read. It is the
weight that is *used*: of ``weight * mask`` or ``weight / sigma`` these values, though the sums are in the parameter's shape.
"""

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from lrp_prune.engine.batch_layout import BatchLayout
from lrp_prune.engine.forms import Convolution
from lrp_prune.engine.operands import energy_of
from lrp_prune.engine.rules.messages import Message
from lrp_prune.engine.rules.terms import power_of_part
from lrp_prune.engine.seen import Seen
from lrp_prune.engine.uses import Use
from lrp_prune.names import layer_of
from lrp_prune.relevance.statistics import Statistic, power_of
from lrp_prune.relevance.unscored import RULES_DIFFER, SEVERAL


def auto_dtype(parameter: Tensor) -> torch.dtype | None:
    """bfloat16 where the device multiplies it faster than float32, and has its range in place of float16's."""
    if parameter.dtype not in (torch.float32, torch.float16):
        return None
    if parameter.device.type == "cpu":
        return torch.bfloat16 if torch.ops.mkldnn._is_mkldnn_bf16_supported() else None
    return torch.bfloat16 if parameter.device.type == "cuda" and torch.cuda.is_bf16_supported() else None


class WeightStatistic:
    """Sums of one weight, in its shape.

    Args:
        name: canonical name.
        parameter: the weight. Only its layout is used until :meth:`finish`.
        statistic: what is summed.
        batch: tells samples and tokens apart.
        matmul_dtype: dtype in which the contraction is multiplied, and in the statistics of magnitudes the gradient
            that goes on; None for the operands' own.
        device: where the sums are kept; None for the weight's own.
        used: the values of the weight as it is used, where that is not seen at its uses (with an adapter beside it).
    """

    def __init__(
        self,
        name: str,
        parameter: Tensor,
        statistic: Statistic,
        batch: BatchLayout,
        matmul_dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        used: Callable[[], Tensor] | None = None,
    ) -> None:
        self.name, self.statistic, self._batch, self.operand_dtype = name, statistic, batch, matmul_dtype
        self.backward_needed = statistic.backward_needed
        self.propagated_dtype = matmul_dtype if statistic.of_magnitudes else None
        self._parameter, self._device = parameter, device
        self.sums: Tensor | None = None
        self.inputs: Tensor | None = None
        self.unscored: str | None = None
        """Why the sums mean nothing, if so."""
        self._given, self._seen = used, Seen(parameter)
        self._room: Tensor | None = None
        self._passed = False
        self._factored: bool | None = None
        """Whether the weight is a factor of what is summed, and left out of the sums; known from the first use on."""

    def forward(self, use: Use, activation: Tensor) -> None:
        """Of statistics that look at the forward alone, add the squares of one use's activations."""
        if self.backward_needed:
            return
        with torch.no_grad():
            activation = activation.detach()
            self.add(input_energy(use, activation if use.all_tokens else self._counted(use, activation)), use)

    def _counted(self, use: Use, tensor: Tensor) -> Tensor:
        return self._batch.only_counted(tensor, layer_of(self.name), use.edge, use.form)

    def make_room(self) -> None:
        """Allocate the sums ahead of the first backward pass.

        Made one by one in it, they would come to lie between activations, whose memory could then be used again in pieces only.
        """
        if self.sums is None and not self._passed:
            self._room = self._zeros()

    def passed(self) -> None:
        """Give up the room if no relevance arrived."""
        self._room, self._passed = None, True

    def backward(self, use: Use, activation: Tensor, d: Tensor, input_gradient: Tensor) -> None:
        """Add one use of one batch."""
        dtype = self.operand_dtype or d.dtype
        if dtype == torch.float16:  # squares of small gradients would be zero, those of large activations infinite
            dtype = torch.float32
        if use.all_tokens:
            pass
        elif use.messages is not None or activation.numel() <= d.numel() or self.statistic.contributing:
            activation = self._batch.counted_activation(activation, layer_of(self.name), use.edge, use.form)
        else:
            d = self._counted(use, d)
        if self.statistic.contributing:
            self._add_inputs(use, activation if use.scale is None else activation * _by_channel(use.scale, activation))
        self._note_factor(use.messages)
        contracted = self._by_sample if self._sums_first(use) else self._by_token
        self.add(contracted(use, activation, d, dtype), use)

    def _sums_first(self, use: Use) -> bool:
        """Whether tokens are summed before the absolute value is taken."""
        return self.statistic.by_sample or (self.statistic.by_map and isinstance(use.form, Convolution))

    def _apart(self, use: Use, tensor: Tensor) -> Tensor:
        """The tensor with what is summed by itself, a sample or the maps of an image, along its first dimension."""
        if not self.statistic.by_map:
            return self._batch.by_sample(tensor, self.name, use.edge)
        return tensor if tensor.dim() == use.weight.dim() else tensor[None]

    def _by_sample(self, use: Use, activation: Tensor, d: Tensor, dtype: torch.dtype) -> Tensor:
        if use.messages is not None:
            return self._by_sample_and_sign(use, self._arrived(use, use.messages, activation), dtype)
        samples = zip(self._apart(use, activation), self._apart(use, d), strict=True)
        contributions = [
            use.form.contract(a[None].to(dtype), gradient[None].to(dtype), use.weight).abs_() for a, gradient in samples
        ]
        return torch.stack(contributions).sum(0) if len(contributions) > 1 else contributions[0]

    def _by_token(self, use: Use, activation: Tensor, d: Tensor, dtype: torch.dtype) -> Tensor:
        power = self.statistic.power
        if use.messages is not None:
            return self._by_sign(use, self._arrived(use, use.messages, activation), power, dtype)
        a = self._batch.shared((power, dtype), activation, lambda a: power_of(a, power, dtype))
        return use.form.contract(a, power_of(d, power, dtype), use.weight)

    def _note_factor(self, found: list[Message] | None) -> None:
        """Take note of whether the weight is a factor of a use's relevance: not under a rule that gives zeros a share."""
        factored = found is None or all(message.power for message in found)
        if self._factored not in (None, factored):
            self.unscored = RULES_DIFFER
        self._factored = factored

    def _arrived(self, use: Use, found: list[Message], activation: Tensor) -> Iterator[tuple[Message, Tensor]]:
        """Messages, each with what the input contributes to it."""
        for message in found:
            a = message.of_input(activation)
            # Of a constant something is contributed by what does not count as well.
            yield message, a if use.all_tokens or message.constant is None else self._counted(use, a)

    def _by_sign(self, use: Use, arrived: Iterable[tuple[Message, Tensor]], power: int, dtype: torch.dtype) -> Tensor:
        """What is contracted under a rule with terms: each message by itself, at the entries that it is about.

        At a token, an entry of the weight is in one message only, so that powers of messages add. The weight is a factor that
        is left out, as far as it is one.
        """
        total = torch.zeros_like(use.weight, dtype=dtype)
        latest, values = None, total
        for message, a in arrived:
            if a is not latest:  # messages about the same entries come one after the other
                latest, values = a, power_of(a, power, dtype)
            contribution = use.form.contract(values, power_of(message.d, power, dtype), use.weight).to(dtype)
            left = message.power - 1 if self._factored else message.power
            if message.weight != "whole" or left:
                own = power_of_part(use.weight, message.weight, left)
                contribution *= power_of(own, power, dtype) if left else own.to(dtype)
            total += contribution
        return total

    def _by_sample_and_sign(self, use: Use, arrived: Iterable[tuple[Message, Tensor]], dtype: torch.dtype) -> Tensor:
        by_sample = [(message, self._apart(use, a), self._apart(use, message.d)) for message, a in arrived]
        total = torch.zeros_like(use.weight, dtype=dtype)
        for index in range(len(by_sample[0][1]) if by_sample else 0):
            own = [(message._replace(d=d[index][None]), a[index][None]) for message, a, d in by_sample]
            total += self._by_sign(use, own, 0, dtype).abs_()
        return total

    def add_rows(self, ids: Tensor, d: Tensor) -> None:
        """Add the lookup of rows ``ids`` with propagated gradient ``d`` ``[..., features]``: an activation of one."""
        if self.statistic.by_sample:
            raise ValueError(
                f"{self.name} is an embedding: statistic {self.statistic.name!r} is not defined for lookups, use 'abs_token'"
            )
        rows = power_of(d.reshape(-1, d.shape[-1]), self.statistic.power, torch.float32)
        if self.statistic.contributing:
            counts = torch.bincount(ids.reshape(-1), minlength=self._parameter.shape[0]).reshape(-1, 1).to(rows)
            self.inputs = counts if self.inputs is None else self.inputs + counts
        sums = self._allocated()
        sums.index_add_(0, ids.reshape(-1).to(sums.device), rows.to(sums.device, sums.dtype))

    def _allocated(self) -> Tensor:
        if self.sums is None:
            self.sums, self._room = self._zeros() if self._room is None else self._room, None
        return self.sums

    def _zeros(self) -> Tensor:
        dtype = torch.float64 if self._parameter.dtype == torch.float64 else torch.float32
        return torch.zeros_like(self._parameter, dtype=dtype, device=self._device, requires_grad=False)

    def add(self, contribution: Tensor, use: Use) -> None:
        """Add to the entries that the use's layout covers, in float32 (float64 for weights of that type)."""
        layout = use.origin.entries
        assert layout is not None
        self._note(use)
        layout.add_to(self._allocated(), contribution)

    def _note(self, use: Use) -> None:
        """Take note of the values that the weight has in a use."""
        if not self._seen.add(use):
            self.unscored = SEVERAL

    def _add_inputs(self, use: Use, activation: Tensor) -> None:
        """Add the squares of a use's activations, in a shape that broadcasts to the weight's."""
        dim = use.origin.dim(use.form.in_axis) if use.form.channel_dim == -1 else None
        if dim is not None:
            energy = self._batch.shared("energy", activation, energy_of).float()
            energy = energy.reshape([-1 if axis == dim else 1 for axis in range(self._parameter.dim())])
            # Queries, keys and values share one energy, but not the sums of it.
            self.inputs = energy.clone() if self.inputs is None else self.inputs + energy
            return
        if self.inputs is None:
            self.inputs = torch.zeros_like(self._parameter, dtype=torch.float32)
        layout = use.origin.entries
        assert layout is not None
        layout.add_to(self.inputs, input_energy(use, activation))

    def park(self, device: torch.device) -> None:
        """Move the sums to a device where they only wait."""
        self.sums = None if self.sums is None else self.sums.to(device)
        self.inputs = None if self.inputs is None else self.inputs.to(device)

    def mean_weights(self) -> Tensor | None:
        """Mean absolute weight for each of the ``inputs``, in their shape."""
        if self.inputs is None:
            return None
        shared = [dim for dim, size in enumerate(self.inputs.shape) if size == 1]
        weight = self._weight().to(torch.float32).abs()
        return weight.mean(shared, keepdim=True) if shared else weight

    def _weight(self) -> Tensor:
        """The values of the weight as it is used."""
        seen = self._seen.values()
        if seen is not None:
            return seen
        return self._parameter.detach() if self._given is None else self._given()

    def finish(self) -> Tensor | None:
        """The sums with the factor ``W``, handed over; None if no relevance arrived."""
        sums, self.sums = self.sums, None
        if sums is None or self.unscored is not None:
            return None
        return self.statistic.weighted(sums, self._weight().to(sums.device, sums.dtype), self._factored is not False)


def input_energy(use: Use, activation: Tensor) -> Tensor:
    """Sum over tokens of the squares of what each weight multiplies, in the shape of the weight as it is used."""
    activation = activation.to(torch.float32)
    if use.form.channel_dim == -1:
        energy = activation.reshape(-1, activation.shape[-1]).square().sum(0)
        return energy.reshape([-1 if axis == use.form.in_axis else 1 for axis in range(2)]).expand(use.weight.shape)
    ones = torch.ones_like(use.form.product(activation, use.weight))
    return use.form.contract(activation.square(), ones, use.weight)


def _by_channel(values: Tensor, like: Tensor) -> Tensor:
    return values.to(like.dtype).reshape(-1, *(1,) * (like.dim() - 2))


class RowStatistic:
    """Sums of the rows of an embedding: the relevance of each entry of a vocabulary."""

    def __init__(self, name: str, rows: int, statistic: Statistic) -> None:
        self.name, self.statistic = name, statistic
        self.sums = torch.zeros(rows, dtype=torch.float32, device="cpu")

    def add_rows(self, ids: Tensor, relevance: Tensor) -> None:
        """Add the relevance ``[..., features]`` of the rows that were looked up, or the rows alone."""
        if not self.statistic.counted:
            return
        power = self.statistic.power
        if not self.statistic.propagated:  # a row is as large as its entries are together
            relevance, power = power_of(relevance, power, torch.float32), 0
        values = relevance.to(torch.float32).sum(-1)
        if self.statistic.by_sample:
            samples = torch.zeros(ids.shape[0], self.sums.shape[0], device="cpu").scatter_add_(
                1, ids.reshape(ids.shape[0], -1).cpu(), values.reshape(ids.shape[0], -1).cpu()
            )
            self.sums += samples.abs().sum(0)
            return
        values = power_of(values, power, torch.float32)
        self.sums.index_add_(0, ids.reshape(-1).cpu(), values.reshape(-1).cpu())

    def finish(self) -> Tensor | None:
        """The sums."""
        return self.sums
