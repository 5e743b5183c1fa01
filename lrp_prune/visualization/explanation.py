"""What :func:`lrp_prune.explain` returns: relevance to look at."""

import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lrp_prune.storage import load_tensors, save_tensors
from lrp_prune.visualization.parts import Pixels, Tokens

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SHOWN = 5


@dataclass(frozen=True)
class Explanation:
    """Relevance of the inputs of a batch, with what they are called; printing it names the most relevant.

    Args:
        inputs: name of the model's argument -> :class:`Tokens` or :class:`Pixels`; of an encoder-decoder there are two.
        values: the explained value of each sample ``[samples]``, or where the target knows the sum only ``[1]``.
        target: what is explained, in words.
        composite: the rules.
        elsewhere: name -> relevance of what is no input, summed over samples: learned positions, class tokens, constants.
        layers: module -> relevance of its output, summed over features: ``[samples, positions]`` (of images: channels).

    Example:
        >>> import lrp_prune
        >>> model = torch.nn.Linear(3, 2)
        >>> explanation = lrp_prune.explain(model, torch.ones(2, 3), target=1)
        >>> len(explanation), explanation.inputs["input"].relevance.shape
        (2, torch.Size([2, 3]))
    """

    inputs: Mapping[str, Tokens | Pixels]
    values: Tensor
    target: str
    composite: str
    elsewhere: Mapping[str, float] = field(default_factory=dict)
    layers: Mapping[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(next(iter(self.inputs.values())).relevance)

    def __getitem__(self, sample: int) -> "Explanation":
        """Of one sample."""
        samples = range(len(self))
        if not -len(self) <= sample < len(self):
            raise IndexError(f"there are {len(self)} samples, got {sample}")
        number = samples[sample]
        known = len(self.values) == len(self)
        return replace(
            self,
            inputs={name: part.picked([number]) for name, part in self.inputs.items()},
            values=self.values[[number]] if known else torch.full((1,), torch.nan, device="cpu"),
            elsewhere=self.elsewhere if len(self) == 1 else {},
            layers={name: values[[number]] for name, values in self.layers.items() if len(values) == len(self)},
        )

    def __iter__(self) -> Iterator["Explanation"]:
        return (self[sample] for sample in range(len(self)))

    def __sub__(self, other: "Explanation") -> "Explanation":
        """What speaks for the one target rather than for the other.

        Raises:
            ValueError: if they are of other inputs, or made by other rules.
        """
        same = self.inputs.keys() == other.inputs.keys() and all(
            part.same_as(other.inputs[name]) for name, part in self.inputs.items()
        )
        if not same:
            raise ValueError("explanations of other inputs cannot be subtracted: explain the same batch twice")
        if self.composite != other.composite:
            raise ValueError(f"explanations by other rules ({self.composite}, {other.composite}) cannot be subtracted")
        keys = dict.fromkeys((*self.elsewhere, *other.elsewhere))
        return replace(
            self,
            inputs={
                name: replace(part, relevance=part.relevance - other.inputs[name].relevance)
                for name, part in self.inputs.items()
            },
            values=self.values - other.values if len(self.values) == len(other.values) else self.values * torch.nan,
            target=f"{self.target} minus {other.target}",
            elsewhere={key: self.elsewhere.get(key, 0.0) - other.elsewhere.get(key, 0.0) for key in keys},
            layers={
                name: values - other.layers[name]
                for name, values in self.layers.items()
                if name in other.layers and other.layers[name].shape == values.shape
            },
        )

    def joined(self) -> "Explanation":
        """With the pieces of each word as one; relevance of layers, which is by token, is left out."""
        return replace(self, inputs={name: part.joined() for name, part in self.inputs.items()}, layers={})

    def largest(self, sample: int) -> float:
        """The largest relevance of a sample, whatever its sign, over all inputs: what its colours are relative to."""
        parts = (part.heat if isinstance(part, Pixels) else part.relevance for part in self.inputs.values())
        return max((float(part[sample].abs().max()) for part in parts if part[sample].numel()), default=0.0)

    def value_of(self, sample: int) -> float | None:
        """The explained value of a sample; None where only the sum over samples is known."""
        value = float(self.values[sample]) if len(self.values) == len(self) else math.nan
        return None if math.isnan(value) else value

    def __str__(self) -> str:
        lines = [f"explains {self.target}, by {self.composite}"]
        for sample in range(len(self)):
            known = self.value_of(sample)
            value = "" if known is None else f" = {known:.4g}"
            lines.append(f"sample {sample}{value}")
            for name, part in self.inputs.items():
                lines.append(f"  {name}: {_described(part, sample)}")
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        return self.html()

    def html(self, path: str | os.PathLike[str] | None = None) -> str:
        """A page of its own, with nothing fetched from elsewhere: text coloured by token, images under their heat maps.

        Args:
            path: a file to write it to; None writes none.

        Returns:
            The page.
        """
        from lrp_prune.visualization.page import page

        text = page(self)
        if path is not None:
            Path(path).write_text(text, encoding="utf-8")
        return text

    def plot(self, path: str | os.PathLike[str] | None = None, samples: int = 4) -> "Figure":
        """A figure: text coloured by token, heat maps over images, bars of features.

        Args:
            path: a file to write it to; its ending says in which format. None writes none.
            samples: how many samples are drawn; the figure says how many there are.

        Raises:
            ImportError: without matplotlib (the extra ``plots``).
        """
        from lrp_prune.visualization.drawing import plot_explanation

        return plot_explanation(self, path, samples)

    def plot_layers(self, path: str | os.PathLike[str] | None = None, sample: int = 0) -> "Figure":
        """A figure of the relevance of each position in each of the modules that ``latent=`` named.

        Raises:
            ValueError: if there are none.
            ImportError: without matplotlib.
        """
        from lrp_prune.visualization.drawing import plot_layers

        return plot_layers(self, path, sample)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it to a file in the safetensors format."""
        tensors, parts = {"values": self.values}, dict[str, dict[str, Any]]()
        for name, part in self.inputs.items():
            tensors[f"relevance:{name}"] = part.relevance
            if isinstance(part, Pixels):
                tensors[f"pixels:{name}"] = part.pixels
                parts[name] = {"kind": "pixels"}
            else:
                if part.given is not None:
                    tensors[f"given:{name}"] = part.given
                parts[name] = {
                    "kind": part.kind,
                    "labels": part.labels,
                    "positions": part.positions,
                    "begins": part.begins,
                }
        tensors |= {f"layer:{name}": values for name, values in self.layers.items()}
        description = {
            "target": self.target,
            "composite": self.composite,
            "elsewhere": dict(self.elsewhere),
            "inputs": parts,
            "layers": list(self.layers),
        }
        save_tensors(path, "explanation", tensors, description)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Explanation":
        """Read what :meth:`save` wrote.

        Raises:
            ValueError: if the file is damaged, or holds something else.
        """
        tensors, description = load_tensors(path, "explanation")
        inputs: dict[str, Tokens | Pixels] = {}
        for name, part in description["inputs"].items():
            relevance = tensors[f"relevance:{name}"]
            if part["kind"] == "pixels":
                inputs[name] = Pixels(relevance, tensors[f"pixels:{name}"])
            else:
                labels, positions, begins = (tuple(map(tuple, part[key])) for key in ("labels", "positions", "begins"))
                inputs[name] = Tokens(relevance, labels, positions, begins, part["kind"], tensors.get(f"given:{name}"))
        layers = {name: tensors[f"layer:{name}"] for name in description["layers"]}
        return cls(
            inputs,
            tensors["values"],
            description["target"],
            description["composite"],
            description["elsewhere"],
            layers,
        )


def _described(part: Tokens | Pixels, sample: int) -> str:
    """The most relevant of a sample."""
    if isinstance(part, Pixels):
        heat = part.heat[sample]
        row, column = divmod(int(heat.abs().argmax()), heat.shape[1])
        return f"most at row {row}, column {column} ({float(heat[row, column]):+.3g})"
    ordered = sorted(part.of(sample), key=lambda entry: -abs(entry[1]))[:_SHOWN]
    return ", ".join(f"{label.strip() or label!r} {value:+.3g}" for label, value in ordered)
