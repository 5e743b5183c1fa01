"""Relevance: named tensors together with what they mean, so that only what fits together is merged or compared."""

import os
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from lrp_prune.distributed.sharding import Sharding
from lrp_prune.relevance import files
from lrp_prune.relevance.contributions import INPUTS, Contributions
from lrp_prune.relevance.granularity import granularities_of
from lrp_prune.relevance.members import Member
from lrp_prune.relevance.merging import check_rules, check_same_entries, check_shapes, summed
from lrp_prune.relevance.statistics import Statistic
from lrp_prune.relevance.unscored import together

NORMALIZATIONS: tuple[str, ...] = ("mean", "sum", "max", "total")


class Relevance(Mapping[str, Tensor]):
    r"""Relevance of weights or units, averaged over reference samples.

    Stored are additive sums over samples, so that batches and ranks add; reading gives
    :math:`\bar R = s \, (\mathrm{sums} / n)^{1/p}` with the number of samples ``n``, the statistic's root ``p`` (2 for
    ``squared_token``), and a scale ``s`` per tensor that normalisation sets (SparC3, arXiv 2506.13727, eq. 1, for
    ``signed``).

    At weight granularity the keys are canonical parameter names and each tensor has its parameter's shape; at any
    other the keys are groups of units and the tensors are ``[units]``, with ``members`` saying which entries of
    which parameters each unit owns.

    Relevance of the weights of a model that ``fully_shard`` has divided is divided as they are: each process holds the
    parts of its own, and reading a tensor gives a ``DTensor``. Reading needs no other process; :meth:`normalized` and
    :meth:`save` do, and must be called in all of them.

    Args:
        sums: the sums over samples, by name. Kept, not copied.
        granularity: what a value is about.
        statistic: how tokens and samples were reduced: a :class:`~lrp_prune.relevance.statistics.Statistic`, or the name of one.
        composite: the name of the rules that propagated it.
        rules: these rules themselves, all of them, as :attr:`lrp_prune.Composite.description` tells them and
            :meth:`lrp_prune.Composite.from_yaml` reads them; empty if they are not known.
        num_samples: samples in ``sums``.
        target: what was explained, in words.
        model: the model's description; only relevance of the same model is merged.
        members: the entries of each group's units.
        parameter_shapes: shapes of all parameters that a mask made from this may touch, and of those that were asked for and
            have no relevance.
        unscored: weights that were asked for and have no relevance, each with the reason (see
            :mod:`lrp_prune.relevance.unscored`): queries and keys under CP-LRP, experts that no token went to. What they
            matter is unknown, so that they are never pruned; but a sparsity is the share of everything that was asked for.
        layouts: what is a row of each weight, by what was seen of its use: ``"linear"`` ``[out, in]``, ``"transposed"``
            ``[in, out]``, ``"stacked"`` and ``"stacked_transposed"`` (one matrix per expert), ``"convolution"``,
            ``"transposed_convolution"``.
        inputs: of statistics with contributions (``geometric``), sums over samples and tokens of the squares of what each
            weight multiplies, in shapes that broadcast to the weights'.
        mean_weights: of the same, the mean absolute weight for each of the ``inputs``.
        derived: the values are no sums over samples any more (a difference); they are not merged.
        scales: a factor for each tensor, from normalisation or multiplication.
        shardings: how each parameter that is divided among processes is; the ``sums`` of these are this process's parts.
            For ``inputs`` that are as well, under the name with ``::inputs`` added.

    Example:
        >>> import torch
        >>> relevance = Relevance({"weight": torch.tensor([[2.0, -4.0]])}, statistic="signed", num_samples=2)
        >>> relevance["weight"]
        tensor([[ 1., -2.]])
        >>> (relevance + relevance).num_samples
        4
    """

    def __init__(
        self,
        sums: Mapping[str, Tensor],
        *,
        granularity: str = "weight",
        statistic: str | Statistic | Mapping[str, Any] = "abs_token",
        composite: str = "attnlrp",
        rules: str = "",
        num_samples: int = 1,
        target: str = "",
        model: str = "",
        members: Mapping[str, tuple[Member, ...]] | None = None,
        parameter_shapes: Mapping[str, tuple[int, ...]] | None = None,
        unscored: Mapping[str, str] | None = None,
        layouts: Mapping[str, str] | None = None,
        inputs: Mapping[str, Tensor] | None = None,
        mean_weights: Mapping[str, Tensor] | None = None,
        derived: bool = False,
        scales: Mapping[str, float] | None = None,
        shardings: Mapping[str, Sharding] | None = None,
    ) -> None:
        granularity = ",".join(granularities_of(granularity))
        if num_samples < 1:
            raise ValueError(f"num_samples must be at least 1, got {num_samples}")
        self._sums = dict(sums)
        self._scales = dict(scales or {})
        self.granularity = granularity
        self._reading = _statistic_of(statistic)
        self.statistic = self._reading.name
        self.composite, self.rules = composite, rules
        self.num_samples = num_samples
        self.target = target
        self.model = model
        self.members = {name: tuple(entries) for name, entries in (members or {}).items()}
        self.parameter_shapes = {name: tuple(shape) for name, shape in (parameter_shapes or {}).items()}
        if granularity == "weight" and not self.parameter_shapes:
            self.parameter_shapes = {name: tuple(tensor.shape) for name, tensor in self._sums.items()}
        self.unscored = dict(unscored or {})
        lacking = [name for name in self.unscored if name not in self.parameter_shapes]
        if lacking:
            raise ValueError(f"{lacking[0]!r} is unscored and has no shape: name it in parameter_shapes")
        self.layouts = dict(layouts or {})
        self.derived = derived
        known = {*self.parameter_shapes, *(name + INPUTS for name in inputs or ())}
        self.shardings = {
            key: entry for key, entry in (shardings or {}).items() if entry.mesh is not None and key in known
        }
        if self._reading.contributing and not derived and set(inputs or ()) != set(self._sums):
            raise ValueError(
                f"relevance of statistic {self.statistic!r} needs inputs and mean_weights for every tensor"
            )
        self._contributions = Contributions(inputs or {}, mean_weights or {}, num_samples, self.shardings)

    def kinds(self) -> dict[str, list[str]]:
        """The names by granularity, where units of several kinds are never compared with each other."""
        several = granularities_of(self.granularity)
        if len(several) == 1:
            return {self.granularity: list(self)}
        return {kind: [name for name in self if name.startswith(f"{kind}:")] for kind in several}

    def sharding(self, name: str) -> Sharding:
        """How the values of this name are divided among processes, which those of units are not."""
        known = self.shardings.get(name) if self.granularity == "weight" else None
        return known or Sharding(tuple(self._sums[name].shape))

    def sharding_of(self, parameter: str) -> Sharding:
        """How a parameter is divided among processes: its scores as well, or what units own of it."""
        return self.shardings.get(parameter) or Sharding(tuple(self.parameter_shapes[parameter]))

    def __contains__(self, name: object) -> bool:
        return name in self._sums  # a mapping of its own would compute the values to tell

    def __getitem__(self, name: str) -> Tensor:
        return self.sharding(name).tensor(self.local(name))

    def local(self, name: str) -> Tensor:
        """The values that are in this process: all of the tensor, unless it is divided among processes."""
        return self._values(name, self._sums[name], slice(None))

    def read(self, name: str, index: slice) -> Tensor:
        """The values of a slice of the flattened :meth:`local` tensor: selection goes through large ones in pieces."""
        return self._values(name, self._sums[name].reshape(-1)[index], index)

    @property
    def sums(self) -> Mapping[str, Tensor]:
        """Everything that is additive over samples, as it is kept: what is reduced over processes."""
        return {**self._sums, **{name + INPUTS: tensor for name, tensor in self._contributions.inputs.items()}}

    def with_sums(self, sums: Mapping[str, Tensor], num_samples: int) -> "Relevance":
        """The same kind of relevance from other :attr:`sums`: those of all processes, say."""
        inputs = {name.removesuffix(INPUTS): tensor for name, tensor in sums.items() if name.endswith(INPUTS)}
        own = {name: tensor for name, tensor in sums.items() if not name.endswith(INPUTS)}
        unscored = {name: reason for name, reason in self.unscored.items() if name not in own}
        return self._replace(own, num_samples=num_samples, unscored=unscored, inputs=inputs)

    def with_values(
        self,
        values: Mapping[str, Tensor],
        statistic: str,
        *,
        composite: str = "",
        target: str = "",
        num_samples: int = 1,
    ) -> "Relevance":
        """Other scores of the same tensors or units, that were found in another way, and are read as they are."""
        described = {"statistic": statistic, "composite": composite, "target": target, "num_samples": num_samples}
        rules = self.rules if composite == self.composite else ""
        return self._replace(values, **described, rules=rules, derived=True, scales={}, inputs={}, mean_weights={})

    def with_members(self, members: Mapping[str, tuple[Member, ...]]) -> "Relevance":
        """The same scores of units that own other entries."""
        return self._replace(self._sums, members=dict(members))

    def _values(self, name: str, sums: Tensor, index: slice) -> Tensor:
        values = sums.to(torch.float32)
        if not self.derived:
            shape, shares = self._sums[name].shape, None
            if self._reading.contributing:
                shares = self._contributions.shares(name, shape, None if sums.shape == shape else index)
            values = self._reading.read(values, self.num_samples, shares)
        scale = self._scales.get(name, 1.0)
        return values if scale == 1.0 else values * scale

    def __iter__(self) -> Iterator[str]:
        return iter(self._sums)

    def __len__(self) -> int:
        return len(self._sums)

    def __repr__(self) -> str:
        return (
            f"Relevance({len(self)} tensors of {sum(tensor.numel() for tensor in self._sums.values()):,} {self.granularity} "
            f"values, {self.composite} {self.statistic}, {self.num_samples} samples"
            f"{f', {len(self.unscored)} tensors unscored' if self.unscored else ''})"
        )

    def description(self) -> dict[str, Any]:
        """All that is known beside the sums: the arguments that make another of it."""
        return {
            "granularity": self.granularity,
            "statistic": self._reading.to_plain(),
            "composite": self.composite,
            "rules": self.rules,
            "num_samples": self.num_samples,
            "target": self.target,
            "model": self.model,
            "members": self.members,
            "parameter_shapes": {name: list(shape) for name, shape in self.parameter_shapes.items()},
            "unscored": self.unscored,
            "layouts": self.layouts,
            "inputs": self._contributions.inputs,
            "mean_weights": self._contributions.mean_weights,
            "derived": self.derived,
            "scales": self._scales,
            "shardings": self.shardings,
        }

    def _replace(self, sums: Mapping[str, Tensor], **changes: Any) -> "Relevance":
        return Relevance(sums, **{**self.description(), **changes})

    def __add__(self, other: "Relevance") -> "Relevance":
        """Merge two sets of reference samples: as if collected in one run.

        Raises:
            ValueError: if they differ in granularity, statistic, composite, target, model or tensors, or if one of
                them is normalised or a difference.
        """
        if not isinstance(other, Relevance):
            return NotImplemented
        for what in ("statistic", "composite", "target", "model"):
            mine, theirs = getattr(self, what), getattr(other, what)
            if mine != theirs:
                raise ValueError(f"cannot merge relevance with {what} {mine!r} and {theirs!r}")
        check_rules(self, other, "merge")
        if self._reading != other._reading:
            raise ValueError(f"cannot merge relevance with statistic {self._reading} and {other._reading}")
        if self.derived or other.derived or self._scales or other._scales:
            raise ValueError("cannot merge normalised, scaled or subtracted relevance: merge first, normalise then")
        # A tensor that only some batches reach (a mixture's expert) is in one of the two: absent means a sum of zero.
        if set(self) | set(self.unscored) != set(other) | set(other.unscored):
            check_same_entries(self, other, "merge")
        check_shapes(self, other, "merge")
        names = list(dict.fromkeys((*self, *other)))
        sums = {name: summed(self._sums.get(name), other._sums.get(name)) for name in names}
        mine, theirs = self._contributions, other._contributions
        inputs = {name: summed(mine.inputs.get(name), theirs.inputs.get(name)) for name in names if mine.inputs}
        reasons = together(self.unscored, other.unscored)
        unscored = {name: reason for name, reason in reasons.items() if name not in sums}
        return self._replace(
            sums,
            rules=self.rules if other.rules else "",
            num_samples=self.num_samples + other.num_samples,
            parameter_shapes={**self.parameter_shapes, **other.parameter_shapes},
            unscored=unscored,
            inputs=inputs,
            mean_weights={**theirs.mean_weights, **mine.mean_weights},
        )

    def __sub__(self, other: "Relevance") -> "Relevance":
        """The difference of the two values, as in contrastive relevance (SparC3, eq. 7)."""
        if not isinstance(other, Relevance):
            return NotImplemented
        check_same_entries(self, other, "subtract")
        values = {}
        for name in self:
            mine = self.local(name)
            values[name] = mine - other.local(name).to(mine.device)
        samples = self.num_samples + other.num_samples
        return self._replace(
            values,
            num_samples=samples,
            derived=True,
            scales={},
            inputs={},
            mean_weights={},
            target=f"{self.target} - {other.target}",
        )

    def __mul__(self, factor: float) -> "Relevance":
        """Scale all values by a number."""
        if isinstance(factor, bool) or not isinstance(factor, int | float):
            return NotImplemented
        return self._replace(self._sums, scales={name: self._scales.get(name, 1.0) * factor for name in self})

    __rmul__ = __mul__

    def normalized(self, by: str = "mean") -> "Relevance":
        """Divide each tensor by its mean, sum or maximum of absolute values; ``"total"``: all by their common sum.

        LRP's scale drifts with depth (on a 30-layer model the mean relevance of a weight grew fivefold to
        twentyfold from the first to the last layer), so a ranking across tensors needs this. A tensor of zeros stays.

        Example:
            >>> import torch
            >>> Relevance({"weight": torch.tensor([1.0, 3.0])}).normalized()["weight"]
            tensor([0.5000, 1.5000])
        """
        if by not in NORMALIZATIONS:
            raise ValueError(f"normalize must be one of {NORMALIZATIONS}, got {by!r}")
        sizes: dict[str, float] = {}
        for name in self:
            magnitude, sharding = self.local(name).abs(), self.sharding(name)
            if by == "max":
                largest = magnitude.max() if magnitude.numel() else magnitude.new_zeros(())
                sizes[name] = float(sharding.all_reduced(largest, "MAX"))
            else:
                total = float(sharding.all_reduced(magnitude.sum(dtype=torch.float64)))
                sizes[name] = total / max(sharding.numel, 1) if by == "mean" else total
        if by == "total":
            sizes = dict.fromkeys(self, sum(sizes.values()))
        scales = {name: self._scales.get(name, 1.0) / sizes[name] if sizes[name] else 1.0 for name in self}
        return self._replace(self._sums, scales=scales)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write to a safetensors file, with its description; atomic.

        What is divided among processes is brought together tensor by tensor, and written by the first process as it
        comes. All processes must call this, and return when the file is there.
        """
        files.save(path, self.description(), self.sums)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Relevance":
        """Read what :meth:`save` wrote.

        Raises:
            ValueError: if the file is damaged, of another kind, or of a newer version.
        """
        sums, description = files.load(path)
        return cls(sums, **description)


def _statistic_of(given: str | Statistic | Mapping[str, Any]) -> Statistic:
    """A statistic by its name, by its fields as files hold them, or itself."""
    if isinstance(given, Statistic):
        return given
    return Statistic.named(given) if isinstance(given, str) else Statistic(**given)
