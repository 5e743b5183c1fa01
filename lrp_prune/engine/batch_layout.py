"""How a batch is laid out in samples and tokens, and what is shared by all who look at its activations."""

import warnings
from collections.abc import Callable, Hashable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import GradientEdge

from lrp_prune.engine.forms import Convolution, Form
from lrp_prune.engine.operands import Latest
from lrp_prune.engine.rows import made_of_tokens, places_of, samples_of


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
            if samples is not None:
                return tensor[samples.argsort(stable=True)].reshape(self.samples, -1, tensor.shape[-1])
        raise ValueError(
            f"statistic 'abs_sample' needs to tell samples apart, but {name} is used with {tensor.shape[0]} rows for "
            f"{self.samples} samples: use 'abs_token' or 'squared_token', or batches of one sample"
        )

    def shared(self, what: Hashable, activation: Tensor, make: Callable[[Tensor], Tensor]) -> Tensor:
        """``make(activation)``, made once for all uses of an activation that follow each other."""
        return self._latest.made(what, activation, make)

    def counted_activation(self, activation: Tensor, name: str, edge: GradientEdge | None, form: Form) -> Tensor:
        """As :meth:`only_counted`, made once for all uses of an activation that follow each other."""
        return self._latest_counted.made("counted", activation, lambda own: self.only_counted(own, name, edge, form))

    def finish(self) -> None:
        """Let go of the batch."""
        self.counted = None
        self._latest.forget()
        self._latest_counted.forget()

    def only_counted(self, tensor: Tensor, name: str, edge: GradientEdge | None, form: Form | None = None) -> Tensor:
        """The tensor with zeros at tokens that do not count; as it is where it has other rows than tokens.

        Args:
            tensor: an activation, or something with its rows.
            name: the layer's that it enters.
            edge: the activation's, which tells the order of rows; None: sample by sample.
            form: how a weight meets the activation; None: row by row.
        """
        if isinstance(form, Convolution):
            places = counted_places(self.counted, tensor.shape)
            return tensor if places is None else tensor * places[:, None].to(tensor)
        rows = self.counted_rows(tensor.shape, name, edge)
        return (
            tensor
            if rows is None
            else tensor * rows.reshape(*rows.shape, *(1,) * (tensor.dim() - rows.dim())).to(tensor)
        )

    def counted_rows(self, shape: torch.Size, name: str, edge: GradientEdge | None) -> Tensor | None:
        """Which rows count, ``[rows]`` or of more than two dimensions the first two; None for all, or other rows than tokens.

        Args:
            shape: of an activation, or of something with its rows.
            name: the layer's that it enters.
            edge: the activation's, which tells the order of rows; None: sample by sample.
        """
        mask = self.counted
        if mask is None or len(shape) < 2:
            return None
        leading = shape[: 1 if len(shape) == 2 else 2]
        square = mask.shape[0] == mask.shape[1] and edge is not None  # where time may be first as well
        if leading == mask.shape and not square:
            return mask
        places = None if edge is None else places_of(edge, *mask.shape)
        if places is not None and len(places) == leading.numel():
            return mask.reshape(-1)[places.to(mask.device)].reshape(leading)
        if leading == mask.shape:
            return mask
        if edge is None:
            return mask.reshape(-1) if len(leading) == 1 and leading.numel() == mask.numel() else None
        if leading[0] != mask.shape[0] and made_of_tokens(edge, *mask.shape):
            self._tell(name)
        return None

    def _tell(self, name: str) -> None:
        """Say once that all rows of a layer count."""
        if name not in self._told:
            self._told.add(name)
            warnings.warn(
                f"which token each row of what enters {name} is cannot be told: all of its rows count, also those of padding, as "
                "far as relevance arrives there; use batches without padding, or of one length",
                stacklevel=2,
            )


def counted_places(counted: Tensor | None, shape: torch.Size) -> Tensor | None:
    """Which places ``[samples, places]`` count of what a convolution reads or gives; None for all, or where none are tokens.

    Args:
        counted: ``[samples, tokens]``.
        shape: ``[samples, channels, places]``; of more places than tokens those behind are cut off by the model.
    """
    if counted is None or len(shape) != 3 or shape[0] != counted.shape[0]:
        return None
    behind = shape[2] - counted.shape[1]
    return F.pad(counted, (0, behind)) if 0 <= behind < counted.shape[1] else None
