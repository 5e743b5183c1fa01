"""How a batch is laid out in samples and tokens, and what is shared by all who look at its activations."""

import warnings
from collections.abc import Callable, Hashable

from torch import Tensor
from torch.autograd.graph import GradientEdge

from lrp_prune.engine.operands import Latest
from lrp_prune.engine.rows import places_of, samples_of


class BatchLayout:
    """How the batch at hand is laid out in samples and tokens."""

    def __init__(self) -> None:
        self.samples = 1
        self.counted: Tensor | None = None
        """``[samples, tokens]``: which tokens enter statistics; None for all."""
        self._latest, self._latest_counted = Latest(), Latest()
        self._told: set[str] = set()

    def by_sample(self, tensor: Tensor, name: str, edge: GradientEdge | None = None) -> Tensor:
        """The tensor with the samples as its first dimension.

        Args:
            tensor: an activation, or something with its rows.
            name: the layer's that it enters.
            edge: the activation's, which tells the order of rows; None: sample by sample.

        Raises:
            ValueError: if the rows cannot be told apart by sample.
        """
        if tensor.dim() > 2 and tensor.shape[1] == self.samples and edge is not None:  # which may be time first
            samples = samples_of(edge, tensor.shape[0] * self.samples, self.samples)
            if samples is not None:
                order = samples.argsort(stable=True)
                return tensor.flatten(0, 1)[order].reshape(self.samples, -1, *tensor.shape[2:])
        if tensor.shape[0] == self.samples:
            return tensor
        if tensor.dim() == 2 and tensor.shape[0] % self.samples == 0:
            if edge is None or self.samples == 1:
                return tensor.reshape(self.samples, -1, tensor.shape[-1])
            samples = samples_of(edge, len(tensor), self.samples)
            even = samples is not None and bool((samples.bincount() == len(tensor) // self.samples).all())
            if samples is not None and even:
                return tensor[samples.argsort(stable=True)].reshape(self.samples, -1, tensor.shape[-1])
        raise ValueError(
            f"statistic 'abs_sample' needs to tell samples apart, but {name} is used with {tensor.shape[0]} rows for "
            f"{self.samples} samples: use 'abs_token' or 'squared_token', or batches of one sample"
        )

    def shared(self, what: Hashable, activation: Tensor, make: Callable[[Tensor], Tensor]) -> Tensor:
        """``make(activation)``, made once for all uses of an activation that follow each other."""
        return self._latest.made(what, activation, make)

    def counted_activation(self, activation: Tensor, name: str, edge: GradientEdge | None) -> Tensor:
        """As :meth:`only_counted`, made once for all uses of an activation that follow each other."""
        return self._latest_counted.made("counted", activation, lambda own: self.only_counted(own, name, edge))

    def finish(self) -> None:
        """Let go of the batch."""
        self.counted = None
        self._latest.forget()
        self._latest_counted.forget()

    def only_counted(self, tensor: Tensor, name: str, edge: GradientEdge | None) -> Tensor:
        """The tensor with zeros at tokens that do not count; as it is where it has other rows than tokens.

        Args:
            tensor: an activation, or something with its rows.
            name: the layer's that it enters.
            edge: the activation's, which tells the order of rows; None: sample by sample.
        """
        mask = self.counted
        if mask is None:
            return tensor
        if tensor.dim() > 2 and edge is not None and tensor.shape[:2] == mask.shape[::-1]:  # which may be time first
            places = places_of(edge, *mask.shape)
            if places is not None:
                rows = mask.reshape(-1)[places.to(mask.device)]
                return tensor * rows.reshape(*tensor.shape[:2], *(1,) * (tensor.dim() - 2)).to(tensor.dtype)
            if tensor.shape[:2] != mask.shape:
                self._tell(name)
        if tensor.shape[:2] == mask.shape:
            return tensor * mask.reshape(*mask.shape, *(1,) * (tensor.dim() - 2)).to(tensor.dtype)
        if tensor.dim() == 2 and tensor.shape[0] == mask.numel():
            places = None if edge is None else places_of(edge, *mask.shape)
            if edge is not None and places is None:
                self._tell(name)
                return tensor
            rows = mask.reshape(-1) if places is None else mask.reshape(-1)[places.to(mask.device)]
            return tensor * rows[:, None].to(tensor.dtype)
        return tensor

    def _tell(self, name: str) -> None:
        """Say once that all rows of a layer count."""
        if name not in self._told:
            self._told.add(name)
            warnings.warn(
                f"which token each row of what enters {name} is cannot be told: all of its rows count, also those of padding, as "
                "far as relevance arrives there; use batches without padding, or of one length",
                stacklevel=2,
            )
