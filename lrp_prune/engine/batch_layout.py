"""How a batch is laid out in samples and tokens, and what is shared by all who look at its activations."""

from collections.abc import Callable, Hashable

from torch import Tensor

from lrp_prune.engine.operands import Latest


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
