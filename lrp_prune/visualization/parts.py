"""The parts of an explanation: relevance of tokens (or features, or steps), and of pixels."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lrp_prune.visualization.subwords import words


@dataclass(frozen=True)
class Tokens:
    """Relevance of what stands in a row: tokens of a text, features, steps in time.

    Args:
        relevance: ``[samples, positions]``; 0 where there is padding.
        labels: of each sample what its positions are called, without padding.
        positions: of each sample which positions these are.
        begins: of each sample whether a position begins a word.
        kind: ``"tokens"``, ``"ids"`` (tokens without a tokenizer), ``"features"`` or ``"steps"``.
        given: what it is relevance of, ``[samples, positions, ...]``: ids, or values of features; None if that is not known.
    """

    relevance: Tensor
    labels: tuple[tuple[str, ...], ...]
    positions: tuple[tuple[int, ...], ...]
    begins: tuple[tuple[bool, ...], ...]
    kind: str = "tokens"
    given: Tensor | None = None

    def of(self, sample: int) -> list[tuple[str, float]]:
        """What a sample's positions are called, and their relevance."""
        values = self.relevance[sample, list(self.positions[sample])].tolist()
        return list(zip(self.labels[sample], values, strict=True))

    def joined(self) -> "Tokens":
        """With the pieces of each word as one, whose relevance is their sum."""
        rows, labels = [], []
        for sample, names in enumerate(self.labels):
            values = [value for _, value in self.of(sample)]
            groups = words(names, self.begins[sample])
            rows.append(torch.tensor([sum(values[place] for place in group) for group in groups], device="cpu"))
            labels.append(tuple("".join(names[place] for place in group) for group in groups))
        return replace(
            self,
            relevance=torch.nn.utils.rnn.pad_sequence(rows, batch_first=True),
            labels=tuple(labels),
            positions=tuple(tuple(range(len(row))) for row in rows),
            begins=tuple((True,) * len(row) for row in rows),
        )

    def picked(self, samples: Sequence[int]) -> "Tokens":
        """Of some samples."""
        return replace(
            self,
            relevance=self.relevance[list(samples)],
            labels=tuple(self.labels[sample] for sample in samples),
            positions=tuple(self.positions[sample] for sample in samples),
            begins=tuple(self.begins[sample] for sample in samples),
            given=None if self.given is None else self.given[list(samples)],
        )

    def same_as(self, other: object) -> bool:
        """Whether another is about the same."""
        if not isinstance(other, Tokens) or (self.labels, self.positions) != (other.labels, other.positions):
            return False
        return self.given is None or other.given is None or torch.equal(self.given, other.given)


@dataclass(frozen=True)
class Pixels:
    """Relevance of images.

    Args:
        relevance: ``[samples, channels, height, width]``.
        pixels: the images, of the same shape.
    """

    relevance: Tensor
    pixels: Tensor

    @property
    def heat(self) -> Tensor:
        """Summed over channels: ``[samples, height, width]``."""
        return self.relevance.sum(1)

    def images(self) -> Tensor:
        """The images as they are shown, from 0 to 1 in each sample, grey or red, green and blue: ``[samples, height, width, 3]``.

        Whatever they were normalised by is taken back by their range; of other than 3 channels the mean is shown.
        """
        shown = self.pixels.float()
        shown = shown if shown.shape[1] == 3 else shown.mean(1, keepdim=True).expand(-1, 3, -1, -1)
        low, high = shown.amin((1, 2, 3), keepdim=True), shown.amax((1, 2, 3), keepdim=True)
        return ((shown - low) / (high - low).clamp(min=1e-12)).permute(0, 2, 3, 1)

    def joined(self) -> "Pixels":
        """As it is: pixels are no words."""
        return self

    def picked(self, samples: Sequence[int]) -> "Pixels":
        """Of some samples."""
        return Pixels(self.relevance[list(samples)], self.pixels[list(samples)])

    def same_as(self, other: object) -> bool:
        """Whether another is about the same."""
        return isinstance(other, Pixels) and torch.equal(self.pixels, other.pixels)
