"""Sums of one weight that is divided among processes: whole for the time of a pass through its module, else a part."""

import torch
from torch import Tensor

from lrp_prune.attribution.statistics import WeightStatistic
from lrp_prune.distributed.sharding import Sharding, all_reduced, device_of, local_part
from lrp_prune.engine.batch_layout import BatchLayout
from lrp_prune.engine.uses import Use
from lrp_prune.relevance.statistics import Statistic
from lrp_prune.relevance.unscored import DIVIDED


class DividedStatistic(WeightStatistic):
    """Sums of one sharded weight: whole and partial while a batch propagates, else this process's part.

    Args:
        name: canonical name.
        parameter: the sharded weight.
        sharding: how it is divided.
        statistic, batch, matmul_dtype, device: see :class:`WeightStatistic`.
    """

    def __init__(
        self,
        name: str,
        parameter: Tensor,
        sharding: Sharding,
        statistic: Statistic,
        batch: BatchLayout,
        matmul_dtype: torch.dtype | None,
        device: torch.device | str | None,
    ) -> None:
        # Of a weight that is not here only the layout is known; it takes no memory.
        stand_in = torch.empty((), dtype=parameter.dtype, device=device_of(sharding.mesh)).expand(sharding.shape)
        super().__init__(name, stand_in, statistic, batch, matmul_dtype, stand_in.device)
        self.sharding, self._sharded, self._kept_on = sharding, parameter, device
        self._part: Tensor | None = None
        self._inputs_sum: Tensor | None = None
        self.inputs_divided = False

    @property
    def code(self) -> int:
        """What waits to be summed: 0 nothing, 1 sums; more if ``inputs`` as well, by the dimension they run along."""
        if self.sums is None:
            return 0
        if self.inputs is None:
            return 1
        long = [dim for dim, size in enumerate(self.inputs.shape) if size > 1]
        return 2 + (long[0] if len(long) == 1 else self.inputs.dim() if long else 0)

    def make_room(self) -> None:
        """None: whole sums exist for the time of a module only."""

    def _note(self, use: Use) -> None:
        if use.origin.scaled:
            self.unscored = DIVIDED

    def sum_up(self, code: int) -> None:
        """Add what all processes have to the parts, and give up what is whole."""
        sums = self._allocated()
        self.sums = None
        part = self.sharding.summed(sums)
        del sums
        if self._part is None:
            self._part = torch.zeros(part.shape, dtype=part.dtype, device=self._kept_on or part.device)
        self._part.add_(part.to(self._part.device))
        if code > 1:
            self._sum_up_inputs(code - 2)

    def _sum_up_inputs(self, dim: int) -> None:
        inputs, self.inputs = self.inputs, None
        shape = self.sharding.shape
        full = dim == len(shape)
        wanted = shape if full else tuple(size if axis == dim else 1 for axis, size in enumerate(shape))
        partial = torch.zeros(wanted, dtype=torch.float32, device=self._parameter.device)
        if inputs is not None:
            partial += inputs
        # Vectors are small, and stay whole in every process.
        total = self.sharding.summed(partial) if full else all_reduced(partial, self.sharding.mesh)
        before = self._inputs_sum
        if before is not None and full and not self.inputs_divided:
            before = self.sharding.part(before)
        elif before is not None and not full and self.inputs_divided:
            total = self.sharding.part(total)
        self._inputs_sum = total if before is None else before + total
        self.inputs_divided |= full

    def park(self, device: torch.device) -> None:
        """Move this process's part to a device where it only waits."""
        self._part = None if self._part is None else self._part.to(device)

    def mean_weights(self) -> Tensor | None:
        """Mean absolute weight for each of the ``inputs``, in their shape."""
        if self.inputs is None:
            return None
        weight = local_part(self._sharded).to(device=self.inputs.device, dtype=torch.float32).abs()
        if self.inputs_divided:
            return weight
        shared = [dim for dim, size in enumerate(self.inputs.shape) if size == 1]
        number = 1
        for dim in shared:
            number *= self.sharding.shape[dim]
        total = torch.zeros_like(self.inputs)
        self.sharding.part(total).copy_(weight.sum(shared, keepdim=True) if shared else weight)
        return self.sharding.all_reduced(total).div_(max(number, 1))

    def finish(self) -> Tensor | None:
        """This process's part of the sums with the factor ``W``, handed over; None if no relevance arrived anywhere."""
        self.sums, self._part = self._part, None
        self.inputs, self._inputs_sum = self._inputs_sum, None
        self._parameter = local_part(self._sharded)
        return super().finish()
