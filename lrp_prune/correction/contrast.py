"""Contrast: what a model computes with when it misbehaves and not otherwise."""

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from lrp_prune.arguments import check_flag, check_patterns
from lrp_prune.correction.guard import Guard, candidates, guard_of, unpack_slice, without
from lrp_prune.distributed.sharding import Sharding, counted
from lrp_prune.names import matches
from lrp_prune.pruning.masks import Masks
from lrp_prune.pruning.units import expand_units
from lrp_prune.relevance import NORMALIZATIONS, Relevance
from lrp_prune.relevance.merging import check_rules
from lrp_prune.selection import bits
from lrp_prune.selection.together import smallest_of
from lrp_prune.selection.values import Computed

REMOVALS: tuple[str, ...] = ("contribution", "all")
_LAST = torch.finfo(torch.float32).max


class NoEntryError(ValueError):
    """An amount is less than one entry."""


class Contrast:
    r"""The difference of two relevances of one model, computed where it is read, and the choice of what to remove.

    :math:`R^{\mathrm{diff}} = R^{\mathrm{general}} / s_g - R^{\mathrm{undesired}} / s_u` (SparC3, arXiv 2506.13727,
    eq. 7, where both scales are 1); the lowest values are removed first. Nothing of a model's size is held.

    What served well on a language model (``examples/correct_repetition.py``): as undesired target the margin of the tokens
    that show the behaviour (:class:`~lrp_prune.targets.RepetitionMargin`, :class:`~lrp_prune.targets.TokenMargin`),
    ``NextToken(odds=0)`` on general text, both ``signed`` by ``epsilon`` with ``skip_first=1``; a guard by the general set in
    ``squared_token``; a strength of a half on more entries instead of removing fewer; and a second round on the corrected
    model (``extends`` of :meth:`Patch.from_contrast`).

    Args:
        general: relevance for the behaviour to keep.
        undesired: relevance for the behaviour to remove.
        normalize: how the two sets are made comparable: ``"total"`` divides each by its total absolute relevance (the
            default: the paper states no scale, and the sets differ in samples, tokens and logits); ``"mean"``,
            ``"sum"`` and ``"max"`` divide tensor by tensor; None takes the values as they are.
        guard: the share of entries that may be removed at all: those whose absolute relevance for ``general`` is below
            this quantile; or a :class:`Guard`, which also says of what it is one. Without it (None, as in the paper) the few
            entries that everything depends on go first, and the model with them.
        spared: weights that are no candidates whatever they do, flat positions by parameter name: those that another patch
            has already.
        reverse: ask the reverse question, what serves the general behaviour only; the two sets change places, and with
            ``guard`` what matters to the undesired behaviour is spared.
        include: patterns of names (of parameters, or of groups of units) to choose from; all by default.
        exclude: patterns of names to leave out.

    Raises:
        ValueError: if the two do not belong together, one of them is zero everywhere, or an argument is out of range.

    Example:
        >>> general = Relevance({"weight": torch.tensor([8.0, 1.0, 1.0, 0.0])}, statistic="signed")
        >>> undesired = Relevance({"weight": torch.tensor([5.0, 4.0, 0.0, 1.0])}, statistic="signed")
        >>> contrast = Contrast(general, undesired, guard=None)
        >>> contrast.relevance()["weight"]
        tensor([ 0.3000, -0.3000,  0.1000, -0.1000])
        >>> contrast.lowest(1)["weight"]
        tensor([False,  True, False, False])
    """

    def __init__(
        self,
        general: Relevance,
        undesired: Relevance,
        *,
        normalize: str | None = "total",
        guard: float | Guard | None = 0.7,
        spared: Mapping[str, Tensor] | None = None,
        reverse: bool = False,
        include: Sequence[str] | None = None,
        exclude: Sequence[str] | None = None,
    ) -> None:
        if spared and general.granularity != "weight":
            raise ValueError(f"single weights can be spared among weights only, not among {general.granularity}s")
        if normalize is not None and normalize not in NORMALIZATIONS:
            raise ValueError(f"normalize must be None or one of {NORMALIZATIONS}, got {normalize!r}")
        _check_pair(general, undesired)
        check_flag("reverse", reverse)
        guard = guard_of(guard)
        self.general, self.undesired = general, undesired
        first, second = (undesired, general) if reverse else (general, undesired)
        self.names = _chosen_names([*first, *(name for name in second if name not in first)], include, exclude)
        self._shardings = {name: (first if name in first else second).sharding(name) for name in self.names}
        for role, relevance in (("general", general), ("undesired", undesired)):
            if not has_any(relevance, self._shardings):
                raise ValueError(
                    f"the {role} relevance is zero everywhere: was the reference set empty, or the target constant?"
                )
        self._first, self._second = (
            relevance.normalized(normalize) if normalize else relevance for relevance in (first, second)
        )
        self._candidates: dict[str, Tensor] | None = None
        if guard is not None:
            measure = guard.measured_by(self._first)
            if guard.by is not None:
                _check_entries(measure, first, "the guard's relevance")
            values = Computed(self._shardings, partial(_read, measure, self._shardings))
            self._candidates = candidates(values, self.names, guard)
        if spared:
            self._candidates = without(self._candidates, spared, self._shardings)
        self._num_candidates = self.num_entries
        if self._candidates is not None:
            counts = {name: bits.count(packed) for name, packed in self._candidates.items()}
            self._num_candidates = sum(counted(self._shardings, counts).values())

    @property
    def num_entries(self) -> int:
        """How many entries (of weights, or units) there are to choose from, guarded ones included."""
        return sum(sharding.numel for sharding in self._shardings.values())

    @property
    def num_candidates(self) -> int:
        """How many of them are not spared, by the guard or by themselves."""
        return self._num_candidates

    def read(self, name: str, index: slice) -> Tensor:
        """The contrast of a slice of a flattened tensor, or of the flattened part that is in this process."""
        first = _read(self._first, self._shardings, name, index)
        return first - _read(self._second, self._shardings, name, index).to(first.device)

    def relevance(self) -> Relevance:
        """All of the contrast as a :class:`~lrp_prune.Relevance`, guarded entries included."""
        some = self.general if self.names[0] in self.general else self.undesired
        values = Computed(self._shardings, self.read)
        return some._replace(
            {name: values.local(name) for name in self.names},
            num_samples=self.general.num_samples + self.undesired.num_samples,
            derived=True,
            scales={},
            target=f"{self._first.target} - {self._second.target}",
        )

    def count(self, amount: float | int) -> int:
        """The number of entries that an amount stands for: a fraction in (0, 1) of all of them, or a count.

        Raises:
            ValueError: if it is no such number, or more than the guard lets through.
        """
        total, allowed = self.num_entries, self.num_candidates
        if isinstance(amount, bool) or not isinstance(amount, int | float):
            raise ValueError(f"amount must be a fraction in (0, 1) or a count of entries, got {amount!r}")
        if isinstance(amount, float) and not 0 < amount < 1:
            raise ValueError(f"amount must be a fraction in (0, 1), or an integer for a count, got {amount!r}")
        count = round(amount * total) if isinstance(amount, float) else amount
        if count < 1:
            raise NoEntryError(f"amount {amount!r} of {total:,} entries is none: ask for more")
        if count > allowed:
            raise ValueError(
                f"amount {amount!r} is {count:,} entries, but only {allowed:,} of {total:,} may be removed: ask for less, "
                "or raise guard"
            )
        return count

    def lowest(self, amount: float | int) -> dict[str, Tensor]:
        """The candidates with the lowest contrast, exactly as many as asked for; ties by position.

        Args:
            amount: a fraction of all entries, or a count.

        Returns:
            Per tensor a bool tensor of its shape, True for what is chosen; tensors without any are left out. A
            ``DTensor`` where the relevance is one.

        Raises:
            ValueError: if the amount is not possible, or a value is infinite or NaN.
        """
        found = {}
        for name, kept in self._kept(amount).items():
            sharding = self._shardings[name]
            found[name] = sharding.tensor(~bits.unpack(kept, sharding.local_shape))
        return found

    def masks(self, amount: float | int, removal: str = "contribution") -> Masks:
        """What is left of the parameters when the lowest are removed.

        Args:
            amount: a fraction of all entries (units, at other granularities than weights), or a count.
            removal: which entries of a removed neuron or head go: ``"contribution"``, those that read its output, so
                that a strength scales what it contributes; or ``"all"`` that belong to it.

        Returns:
            Masks of the parameters that are touched; False where something is removed.
        """
        if removal not in REMOVALS:
            raise ValueError(f"removal must be one of {REMOVALS}, got {removal!r}")
        kept = self._kept(amount)
        if self.general.granularity == "weight":
            shapes = {name: self._shardings[name].shape for name in kept}
            return Masks.from_bits(kept, shapes, shardings=self._shardings)
        units = self.general
        if removal == "contribution" and units.granularity in ("neuron", "head"):
            reading = {name: tuple(member for member in found if member.reads) for name, found in units.members.items()}
            units = units.with_members(reading)
        shapes, packed = expand_units(units, kept, None)
        return Masks.from_bits(packed, shapes, granularity=units.granularity, shardings=units.shardings)

    def _kept(self, amount: float | int) -> dict[str, Tensor]:
        """Packed masks of what is here and not among the lowest, of tensors that have any of them in some process."""
        values = Computed(self._shardings, self._ranked)
        kept = smallest_of(values, self.names, self.count(amount), "signed").masks()
        here = {name: self._shardings[name].local_numel - bits.count(packed) for name, packed in kept.items()}
        return {name: kept[name] for name, count in counted(self._shardings, here).items() if count}

    def _ranked(self, name: str, index: slice) -> Tensor:
        values = self.read(name, index)
        if self._candidates is None:
            return values
        free = unpack_slice(self._candidates[name], self._shardings[name].local_numel, index).to(values.device)
        # Nothing finite comes after it, so that a guarded entry is chosen only after all candidates.
        return torch.where(free | ~values.isfinite(), values, _LAST)


def _read(relevance: Relevance, shardings: Mapping[str, Sharding], name: str, index: slice) -> Tensor:
    if name in relevance:
        return relevance.read(name, index)
    return torch.zeros(len(range(*index.indices(shardings[name].local_numel))), device="cpu")


def has_any(relevance: Relevance, shardings: Mapping[str, Sharding]) -> bool:
    """Whether there is anything but zeros in the tensors that are named, in any process."""
    here = {name: int(relevance.local(name).any()) for name in shardings if name in relevance}
    return any(counted(shardings, here).values())


def _chosen_names(names: list[str], include: Sequence[str] | None, exclude: Sequence[str] | None) -> list[str]:
    for kind, patterns in (("include", include), ("exclude", exclude)):
        check_patterns(kind, patterns)
        for pattern in patterns or ():
            if not any(matches(name, [pattern]) for name in names):
                raise ValueError(f"{kind} pattern {pattern!r} matches none of {', '.join(names[:3])}, ...")
    chosen = [name for name in names if (include is None or matches(name, include)) and not matches(name, exclude)]
    if not chosen:
        raise ValueError(f"nothing to choose from: include={include!r}, exclude={exclude!r} leave no tensor")
    return chosen


def _check_pair(general: Relevance, undesired: Relevance) -> None:
    for role, relevance in (("general", general), ("undesired", undesired)):
        if not isinstance(relevance, Relevance):
            raise ValueError(f"the {role} relevance must be a Relevance, got {type(relevance).__name__}")
        if not len(relevance):
            raise ValueError(f"the {role} relevance holds no tensor: was its reference set empty?")
    if len(general.kinds()) > 1:
        raise ValueError(
            f"units of several kinds ({general.granularity}) are not compared with each other: make a contrast of each kind"
        )
    for what in ("statistic", "composite", "model"):
        mine, theirs = getattr(general, what), getattr(undesired, what)
        if mine != theirs:
            raise ValueError(f"cannot contrast relevance with {what} {mine!r} and {theirs!r}: collect both alike")
    check_rules(general, undesired, "contrast")
    _check_entries(undesired, general, "the undesired relevance")


def _check_entries(relevance: Relevance, general: Relevance, role: str) -> None:
    if relevance.granularity != general.granularity:
        raise ValueError(f"{role} is about {relevance.granularity}s, the other one about {general.granularity}s")
    for name in {**dict.fromkeys(general), **dict.fromkeys(relevance)}:
        # A tensor that no sample of one set reached (a mixture's expert) has no relevance for it: that is known, and zero.
        missing = relevance if name not in relevance else general if name not in general else None
        if missing is not None:
            if name not in missing.unscored:
                raise ValueError(f"{role} and the other one are of different tensors: {name!r} is in one of them only")
        elif (mine := relevance.sharding(name)).shape != (theirs := general.sharding(name)).shape:
            raise ValueError(f"{role} has shape {mine.shape} for {name!r}, the other one {theirs.shape}")
        elif mine != theirs:
            raise ValueError(
                f"{role} and the other one are divided among processes in different ways at {name!r}: collect both on the "
                "same model"
            )
