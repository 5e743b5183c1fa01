"""Scorers: one interface for relevance and for what it is compared with."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from lrp_prune.attribution.candidates import candidates
from lrp_prune.attribution.collect import RelevanceAccumulator
from lrp_prune.attribution.composites import Composite
from lrp_prune.attribution.defaults import best_for
from lrp_prune.attribution.observers import fingerprint
from lrp_prune.attribution.parametrized import parametrized
from lrp_prune.attribution.sharded import shardings_of
from lrp_prune.members import Member
from lrp_prune.models.subject import subject_of
from lrp_prune.pruning.checking import explaining_nothing
from lrp_prune.pruning.floors import resolved_floor
from lrp_prune.pruning.units import weight_norms
from lrp_prune.relevance import Relevance, granularities_of
from lrp_prune.sharding import local_part, sharding_of
from lrp_prune.targets import Inferred, Target


class Defaults(NamedTuple):
    """What a method is best used with, as measured; each is an option."""

    composite: str | None
    statistic: str
    scope: str
    normalize: str | None
    needs_data: bool


METHODS: dict[str, Defaults] = {
    "lrp": Defaults(*best_for("weight"), "global", None, True),
    "gradient": Defaults("gradient", "geometric", "global", None, True),
    "wanda": Defaults(None, "input_norm", "row", None, True),
    "magnitude": Defaults(None, "magnitude", "layer", None, False),
    "random": Defaults(None, "random", "layer", None, False),
}
"""Methods and their defaults for weights."""
PROPAGATING: tuple[str, ...] = ("lrp", "gradient")
"""The methods that have a composite and a statistic."""


def defaults_of(method: str, granularity: str | Sequence[str] = "weight") -> Defaults:
    """The defaults of a method.

    Raises:
        ValueError: if there is no such method, or granularity.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {tuple(METHODS)}, got {method!r}")
    kinds, best = granularities_of(granularity), METHODS[method]
    if kinds == ("weight",):
        return best
    # Which units there are is seen in a forward only; rows of embeddings are known without.
    needs_data = best.needs_data or kinds != ("embedding",)
    if method not in PROPAGATING:
        return best._replace(scope="layer", needs_data=needs_data)
    composite, statistic = best_for(granularity)
    return Defaults(composite if method == "lrp" else best.composite, statistic, "global", None, needs_data)


def selection_options(
    method: str,
    granularity: str | Sequence[str],
    scope: str | None,
    ranking: str,
    normalize: str | None,
    floor: float | None = None,
) -> dict[str, Any]:
    """Arguments of :func:`~lrp_prune.pruning.select`, with the method's best in place of ``None`` and ``"auto"``.

    Raises:
        ValueError: if there is no such method or granularity, or the floor fits neither scope nor granularity.
    """
    best = defaults_of(method, granularity)
    return {
        "scope": scope or best.scope,
        "ranking": ranking,
        "normalize": best.normalize if normalize == "auto" else normalize,
        "floor": resolved_floor(floor, scope or best.scope, ",".join(granularities_of(granularity))),
    }


class Scorer(Protocol):
    """Scores weights or units: fed with batches, read once."""

    @property
    def num_samples(self) -> int:
        """Samples that it was fed with."""

    @property
    def needs_data(self) -> bool:
        """Whether it has to be fed at all."""

    @property
    def parameters(self) -> Mapping[str, Tensor]:
        """The weights that are scored (or that make what is scored), by canonical name."""

    def update(self, batch: Any) -> None:
        """Add one batch."""

    def compute(self) -> Relevance:
        """The scores."""


class _DataFree:
    """Magnitude :math:`|W|` of the weights as they are used (or the root mean square of rows of embeddings), or uniform random
    numbers that depend on the seed and the name only."""

    needs_data = False

    def __init__(
        self,
        model: nn.Module,
        method: str,
        granularity: str,
        seed: int,
        include: Any,
        exclude: Any,
        trainable_only: bool,
    ) -> None:
        self._model, self._method, self._seed = subject_of(model).module, method, seed
        self._rows = granularity == "embedding"
        self._parameters = candidates(self._model, include, exclude, trainable_only, self._rows)
        self._used, self._refused = ({}, {}) if self._rows else parametrized(self._model)
        self.num_samples = 0

    @property
    def parameters(self) -> Mapping[str, Tensor]:
        """The weights that are scored, by canonical name."""
        return self._parameters

    def update(self, batch: Any) -> None:
        """Nothing is needed."""

    def compute(self) -> Relevance:
        """The scores."""
        scored = {name: entry for name, entry in self._parameters.items() if name not in self._refused}
        shapes = {name: tuple(parameter.shape) for name, parameter in self._parameters.items()}
        rows = {name: (Member.of_slices(name, shape, 0, shape[0]),) for name, shape in shapes.items()}
        score = self._row_scores if self._rows else self._score
        return Relevance(
            {name: score(name, parameter) for name, parameter in scored.items()},
            granularity="embedding" if self._rows else "weight",
            statistic=self._method,
            composite="",
            target="",
            model=fingerprint(self._model),
            parameter_shapes=shapes,
            members=rows if self._rows else None,
            unscored={name: self._refused[name] for name in self._parameters if name in self._refused},
            shardings=shardings_of(self._model),
        )

    def _score(self, name: str, parameter: Tensor) -> Tensor:
        if self._method == "magnitude":
            used = self._used.get(name)
            return (local_part(parameter) if used is None else used()).abs()
        whole, sharding = random_values(name, parameter.shape, self._seed), sharding_of(parameter, name)
        return (whole if sharding is None else sharding.part(whole).clone()).to(local_part(parameter).device)

    def _row_scores(self, name: str, parameter: Tensor) -> Tensor:
        if self._method == "random":
            return random_values(name, parameter.shape[:1], self._seed)
        rows = int(parameter.shape[0])
        return weight_norms(self._model, [Member.of_slices(name, parameter.shape, 0, rows)], rows)


def random_values(name: str, shape: Sequence[int], seed: int) -> Tensor:
    """Uniform in [0, 1), by seed and name only."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + sum(ord(c) * (i + 1) for i, c in enumerate(name)))
    return torch.rand(tuple(shape), generator=generator)


class _OfUnits:
    """Units by the root mean square of all weights that they own, or at random; a batch shows which units there are."""

    needs_data = True

    def __init__(self, structure: RelevanceAccumulator, model: nn.Module, method: str, seed: int) -> None:
        self._structure, self._method, self._seed = structure, method, seed
        self._model = subject_of(model).module

    @property
    def num_samples(self) -> int:
        """Samples that were seen."""
        return self._structure.num_samples

    @property
    def parameters(self) -> Mapping[str, Tensor]:
        """The weights that make the units, by canonical name."""
        return self._structure.parameters

    def update(self, batch: Any) -> None:
        """See which units there are; the first batch tells."""
        if self.num_samples == 0:
            self._structure.update(batch)

    def compute(self) -> Relevance:
        """The scores."""
        units = self._structure.compute()
        if self._method == "random":
            values = {name: random_values(name, units[name].shape, self._seed) for name in units}
        else:
            values = {name: weight_norms(self._model, units.members[name], len(units[name])) for name in units}
        return units.with_values(values, self._method)


def scorer(
    method: str,
    model: nn.Module,
    *,
    target: str | Target | Callable[[nn.Module, Any], Tensor] | Inferred | None = None,
    composite: str | Composite | None = None,
    statistic: str | None = None,
    granularity: str | Sequence[str] = "weight",
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
    seed: int = 0,
    trainable_only: bool = False,
    accumulate_on: str | None = None,
    matmul_dtype: str | None = "auto",
    skip_first: int = 0,
    unruled: str = "warn",
    forward_context: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> Scorer:
    r"""The scorer of a method, with the method's defaults where None is given.

    Args:
        method: ``"lrp"``; ``"gradient"`` (gradient x weight); ``"wanda"`` (arXiv 2306.11695); ``"magnitude"``; ``"random"``.
        model: what is scored.
        target: see :func:`lrp_prune.attribute`.
        composite: rules, for ``lrp``.
        statistic: see :func:`lrp_prune.attribute`, for ``lrp`` and ``gradient``.
        granularity: weights, or kinds of units. Of units, ``wanda`` is the norm of what a unit contributes to the layers that
            read it, :math:`(\sum_{c \in u} \|w_c\|^2 \|a_c\|^2)^{1/2}`, and ``magnitude`` the root mean square of all
            weights that it owns.
        include: patterns of parameters to score.
        exclude: patterns of parameters to leave out.
        seed: of ``random``.
        trainable_only: leave out frozen weights unless included by name.
        accumulate_on: device of the sums.
        matmul_dtype: see :class:`~lrp_prune.attribution.RelevanceAccumulator`.
        skip_first: see :class:`~lrp_prune.attribution.RelevanceAccumulator`.
        unruled: see :func:`lrp_prune.attributing`.
        forward_context: a context manager for the forward.

    Raises:
        ValueError: for an unknown method, or an argument that the method does not have.
    """
    defaults = defaults_of(method, granularity)
    if method not in PROPAGATING:
        given = {"composite": composite, "statistic": statistic}
        for name, value in given.items():
            if value is not None:
                raise ValueError(f"method {method!r} has no {name}, got {value!r}")
    if method == "gradient" and composite not in (None, "gradient"):
        raise ValueError(f"method 'gradient' has no composite, got {composite!r}: use method='lrp'")
    kinds = granularities_of(granularity)
    data_free = method in ("magnitude", "random")
    if data_free and kinds in (("weight",), ("embedding",)):
        return _DataFree(model, method, kinds[0], seed, include, exclude, trainable_only)
    accumulator = RelevanceAccumulator(
        model,
        target=target if method in PROPAGATING else explaining_nothing(model, target),
        composite=composite or defaults.composite or "gradient",
        statistic="structure" if data_free else statistic or defaults.statistic,
        granularity=granularity,
        include=include,
        exclude=exclude,
        trainable_only=trainable_only,
        accumulate_on=accumulate_on,
        matmul_dtype=matmul_dtype,
        skip_first=skip_first,
        unruled=unruled,
        forward_context=forward_context,
    )
    return _OfUnits(accumulator, model, method, seed) if data_free else accumulator
