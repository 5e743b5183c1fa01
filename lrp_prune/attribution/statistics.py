r"""Statistics: how relevance at the uses of weights is reduced over tokens and samples, and where the sums are kept.

With the activation ``a`` ``[tokens, in]`` and the propagated gradient ``d`` ``[tokens, out]`` of a use, the relevance of a
weight at a token is :math:`R_{ji} = W_{ji} \, a_i \, d_j` (SparC3, arXiv 2506.13727, eq. 8, in gradient form). Summed are

=================  ==========================================================================
``signed``         :math:`W \cdot (d^T a)`
``abs_sample``     :math:`\sum_\mathrm{samples} |W \cdot (d^T a)|`
``abs_token``      :math:`|W| \cdot (|d|^T |a|)`
``squared_token``  :math:`W^2 \cdot ((d^2)^T a^2)`, of which the square root is read
``geometric``      :math:`|W|^3 \cdot ((d^2)^T a^2)`, read together with the sums of :math:`a^2`
=================  ==========================================================================

``geometric`` is the weighted geometric mean :math:`R^{2/3} C^{1/3}` of relevance as in ``squared_token`` and of what
a weight contributes to its layer's output, :math:`|W_{ji}| \, \|a_i\|_2` (all that Wanda looks at), as a share of the
mean contribution in its tensor. Relevance vanishes where a softmax or a gate is saturated, although removing the
weights would end the saturation; a contribution does not, but says nothing of what becomes of it.

The factor ``W`` is applied once, when the sums are read. It is the weight that is *used*: of ``weight * mask`` or
``weight / sigma`` these values, though the sums are in the parameter's shape.
"""

from collections.abc import Callable, Hashable

import torch
from torch import Tensor

from lrp_prune.attribution.operands import Latest, energy_of, power_of
from lrp_prune.attribution.seen import Seen
from lrp_prune.attribution.uses import Use
from lrp_prune.unscored import SEVERAL


class BatchLayout:
    """How the batch at hand is laid out in samples and tokens."""

    def __init__(self) -> None:
        self.samples = 1
        self.counted: Tensor | None = None
        """``[samples, tokens]``: which tokens enter statistics; None for all."""
        self._latest, self._latest_counted = Latest(), Latest()

    def by_sample(self, tensor: Tensor, name: str) -> Tensor:
        """The tensor with the samples as its first dimension.

        Raises:
            ValueError: if the rows cannot be told apart by sample.
        """
        if tensor.shape[0] == self.samples:
            return tensor
        if tensor.dim() == 2 and tensor.shape[0] % self.samples == 0:
            return tensor.reshape(self.samples, -1, tensor.shape[-1])
        raise ValueError(
            f"statistic 'abs_sample' needs to tell samples apart, but {name} is used with {tensor.shape[0]} rows for "
            f"{self.samples} samples: use 'abs_token' or 'squared_token', or batches of one sample"
        )

    def shared(self, what: Hashable, activation: Tensor, make: Callable[[Tensor], Tensor]) -> Tensor:
        """``make(activation)``, made once for all uses of an activation that follow each other."""
        return self._latest.made(what, activation, make)

    def counted_activation(self, activation: Tensor) -> Tensor:
        """As :meth:`only_counted`, made once for all uses of an activation that follow each other."""
        return self._latest_counted.made("counted", activation, self.only_counted)

    def finish(self) -> None:
        """Let go of the batch."""
        self.counted = None
        self._latest.forget()
        self._latest_counted.forget()

    def only_counted(self, tensor: Tensor) -> Tensor:
        """The tensor with zeros at tokens that do not count; as it is where it has other rows than tokens."""
        mask = self.counted
        if mask is None:
            return tensor
        if tensor.shape[:2] == mask.shape:
            return tensor * mask.reshape(*mask.shape, *(1,) * (tensor.dim() - 2)).to(tensor.dtype)
        if tensor.dim() == 2 and tensor.shape[0] == mask.numel():
            return tensor * mask.reshape(-1, 1).to(tensor.dtype)
        return tensor


_POWERS = {
    "signed": (0, 0),
    "abs_token": (1, 1),
    "squared_token": (2, 2),
    "geometric": (2, 2),
    "input_norm": (2, 0),
}
"""The powers of absolute values of activation and gradient that are contracted; 0 for the values themselves."""


MAGNITUDES = ("abs_token", "squared_token", "geometric")
"""Statistics in which nothing cancels: rounding the gradients changes them no more than rounding what is multiplied."""


class WeightStatistic:
    """Sums of one weight, in its shape.

    Args:
        name: canonical name.
        parameter: the weight. Only its layout is used until :meth:`finish`.
        statistic: see the module's docstring.
        batch: tells samples and tokens apart.
        matmul_dtype: dtype in which the contraction is multiplied, and in the statistics of magnitudes the gradient
            that goes on; None for the operands' own.
        device: where the sums are kept; None for the weight's own.
        used: the values of the weight as it is used, where that is not seen at its uses (with an adapter beside it).
    """

    backward_needed = True

    def __init__(
        self,
        name: str,
        parameter: Tensor,
        statistic: str,
        batch: BatchLayout,
        matmul_dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        used: Callable[[], Tensor] | None = None,
    ) -> None:
        self.name, self.statistic, self._batch, self.operand_dtype = name, statistic, batch, matmul_dtype
        self.propagated_dtype = matmul_dtype if statistic in MAGNITUDES else None
        self._parameter, self._device = parameter, device
        self.sums: Tensor | None = None
        self.inputs: Tensor | None = None
        self.unscored: str | None = None
        """Why the sums mean nothing, if so."""
        self._given, self._seen = used, Seen(parameter)
        self._room: Tensor | None = None
        self._passed = False

    def forward(self, use: Use, activation: Tensor) -> None:
        """Nothing is known yet."""

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
        elif activation.numel() <= d.numel() or self.statistic == "geometric":
            activation = self._batch.counted_activation(activation)
        else:
            d = self._batch.only_counted(d)
        if self.statistic == "geometric":
            self._add_inputs(use, activation)
        if self.statistic == "abs_sample":
            samples = zip(
                self._batch.by_sample(activation, self.name), self._batch.by_sample(d, self.name), strict=True
            )
            contributions = [
                use.form.contract(a[None].to(dtype), gradient[None].to(dtype), use.weight).abs_()
                for a, gradient in samples
            ]
            contribution = torch.stack(contributions).sum(0) if len(contributions) > 1 else contributions[0]
        else:
            of_activation, of_gradient = _POWERS[self.statistic]
            a = self._batch.shared((of_activation, dtype), activation, lambda a: power_of(a, of_activation, dtype))
            contribution = use.form.contract(a, power_of(d, of_gradient, dtype), use.weight)
        self.add(contribution, use)

    def add_rows(self, ids: Tensor, d: Tensor) -> None:
        """Add the lookup of rows ``ids`` with propagated gradient ``d`` ``[..., features]``: an activation of one."""
        if self.statistic == "abs_sample":
            raise ValueError(
                f"{self.name} is an embedding: statistic 'abs_sample' is not defined for lookups, use 'abs_token'"
            )
        rows = power_of(d.reshape(-1, d.shape[-1]), _POWERS[self.statistic][1], torch.float32)
        if self.statistic == "geometric":
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
        layout = use.origin.layout
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
        layout = use.origin.layout
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
        weight = self._weight().to(sums.device, sums.dtype)
        if self.statistic == "signed":
            return sums.mul_(weight)
        squared = _POWERS.get(self.statistic, (1, 1))[0] == 2
        if self.statistic == "geometric":
            sums.mul_(weight.abs())
        return sums.mul_(weight.square() if squared else weight.abs())


class InputNorm(WeightStatistic):
    r"""Wanda (arXiv 2306.11695): :math:`|W_{ji}| \cdot \|a_i\|_2`, from the forward alone, over attended tokens."""

    backward_needed = False

    def forward(self, use: Use, activation: Tensor) -> None:
        """Add the squares of one use's activations."""
        with torch.no_grad():
            activation = activation.detach()
            self.add(input_energy(use, activation if use.all_tokens else self._batch.only_counted(activation)), use)


def input_energy(use: Use, activation: Tensor) -> Tensor:
    """Sum over tokens of the squares of what each weight multiplies, in the shape of the weight as it is used."""
    activation = activation.to(torch.float32)
    if use.form.channel_dim == -1:
        energy = activation.reshape(-1, activation.shape[-1]).square().sum(0)
        return energy.reshape([-1 if axis == use.form.in_axis else 1 for axis in range(2)]).expand(use.weight.shape)
    ones = torch.ones_like(use.form.in_one_precision(activation, use.weight))
    return use.form.contract(activation.square(), ones, use.weight)


class RowStatistic:
    """Sums of the rows of an embedding: the relevance of each entry of a vocabulary."""

    def __init__(self, name: str, rows: int, statistic: str) -> None:
        self.name, self.statistic = name, statistic
        self.sums = torch.zeros(rows, dtype=torch.float32)

    def add_rows(self, ids: Tensor, relevance: Tensor) -> None:
        """Add the relevance ``[..., features]`` of the rows that were looked up; of ``input_norm`` the rows themselves."""
        if self.statistic == "structure":
            return
        if self.statistic == "input_norm":
            relevance = relevance.to(torch.float32).square()
        values = relevance.to(torch.float32).sum(-1)
        if self.statistic == "abs_sample":
            samples = torch.zeros(ids.shape[0], self.sums.shape[0]).scatter_add_(
                1, ids.reshape(ids.shape[0], -1).cpu(), values.reshape(ids.shape[0], -1).cpu()
            )
            self.sums += samples.abs().sum(0)
            return
        power = 0 if self.statistic == "input_norm" else _POWERS[self.statistic][1]
        values = power_of(values, power, torch.float32)
        self.sums.index_add_(0, ids.reshape(-1).cpu(), values.reshape(-1).cpu())

    def finish(self) -> Tensor | None:
        """The sums."""
        return self.sums
