"""Packed sequences, unpacked: samples of different lengths side by side, with what is padding kept out."""

import torch
from torch import Tensor


class Packing:
    """Where the rows of packed data, as ``torch.nn.utils.rnn.PackedSequence`` holds them, lie in a padded batch.

    Args:
        batch_sizes: how many samples have a first, second, ... token; on the CPU.
        device: of the data.

    Example:
        >>> packing = Packing(torch.tensor([2, 1]), torch.device("cpu"))
        >>> packing.padded(torch.tensor([[1.0], [2.0], [3.0]]))[..., 0]
        tensor([[1., 3.],
                [2., 0.]])
    """

    def __init__(self, batch_sizes: Tensor, device: torch.device) -> None:
        sizes = batch_sizes.to("cpu")
        tokens = torch.repeat_interleave(torch.arange(len(sizes), device="cpu"), sizes)
        before = sizes.cumsum(0) - sizes
        samples = torch.arange(int(sizes.sum()), device="cpu") - before[tokens]
        self._places = (samples.to(device), tokens.to(device))
        self.valid = torch.zeros(int(sizes[0]), len(sizes), dtype=torch.bool, device=device)
        """``[samples, tokens]``: what is no padding."""
        self.valid[self._places] = True

    def padded(self, data: Tensor) -> Tensor:
        """Rows ``[rows, features]`` as ``[samples, tokens, features]``, with zeros for padding."""
        return data.new_zeros(*self.valid.shape, data.shape[-1]).index_put(self._places, data)

    def packed(self, batch: Tensor) -> Tensor:
        """``[samples, tokens, features]`` as rows, without the padding."""
        return batch[self._places]
