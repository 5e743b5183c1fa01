"""Scorers: one interface for relevance and for what it is compared with."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from lrp_prune.attribution.candidates import candidates
from lrp_prune.attribution.collect import RelevanceAccumulator
from lrp_prune.attribution.composites import Composite
from lrp_prune.attribution.observers import fingerprint
from lrp_prune.attribution.parametrized import parametrized
from lrp_prune.attribution.running import subject_of
from lrp_prune.attribution.sharded import shardings_of
from lrp_prune.attribution.targets import Target
from lrp_prune.pruning.checking import explaining_nothing
from lrp_prune.relevance import Relevance
from lrp_prune.sharding import local_part, sharding_of


class Defaults(NamedTuple):
    """What a method is best used with, as measured; each is an option."""

    composite: str | None
    statistic: str
    scope: str
    normalize: str | None
    needs_data: bool


METHODS: dict[str, Defaults] = {
    "lrp": Defaults("epsilon", "geometric", "global", None, True),
    "gradient": Defaults("gradient", "geometric", "global", None, True),
    "wanda": Defaults(None, "input_norm", "row", None, True),
    "magnitude": Defaults(None, "magnitude", "layer", None, False),
    "random": Defaults(None, "random", "layer", None, False),
}
"""Methods and their defaults for weights."""


def defaults_of(method: str, granularity: str = "weight") -> Defaults:
    """The defaults of a method.

    Raises:
        ValueError: if there is no such method.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {tuple(METHODS)}, got {method!r}")
    if granularity == "weight":
        return METHODS[method]
    composite = "attnlrp" if method == "lrp" else METHODS[method].composite
    return Defaults(composite, "abs_token", "global", None, METHODS[method].needs_data)


def selection_options(
    method: str, granularity: str, scope: str | None, ranking: str, normalize: str | None
) -> dict[str, Any]:
    """Arguments of :func:`~lrp_prune.pruning.select`, with the method's best in place of ``None`` and ``"auto"``."""
    best = defaults_of(method, granularity)
    return {
        "scope": scope or best.scope,
        "ranking": ranking,
        "normalize": best.normalize if normalize == "auto" else normalize,
    }


class Scorer(Protocol):
    """Scores weights or units: fed with batches, read once."""

    num_samples: int

    def update(self, batch: Any) -> None:
        """Add one batch."""

    def compute(self) -> Relevance:
        """The scores."""


class _DataFree:
    """Magnitude :math:`|W|` of the weights as they are used, or uniform random numbers by the seed and the weight's name."""

    def __init__(
        self, model: nn.Module, method: str, seed: int, include: Any, exclude: Any, trainable_only: bool
    ) -> None:
        self._model, self._method, self._seed = subject_of(model).module, method, seed
        self._parameters = candidates(self._model, include, exclude, trainable_only)
        self._used, self._refused = parametrized(self._model)
        self.num_samples = 0

    def update(self, batch: Any) -> None:
        """Nothing is needed."""

    def compute(self) -> Relevance:
        """The scores."""
        scored = {name: entry for name, entry in self._parameters.items() if name not in self._refused}
        values = {name: self._score(name, parameter) for name, parameter in scored.items()}
        return Relevance(
            values,
            statistic=self._method,
            composite="",
            target="",
            model=fingerprint(self._model),
            parameter_shapes={name: tuple(parameter.shape) for name, parameter in self._parameters.items()},
            unscored={name: self._refused[name] for name in self._parameters if name in self._refused},
            shardings=shardings_of(self._model),
        )

    def _score(self, name: str, parameter: Tensor) -> Tensor:
        if self._method == "magnitude":
            used = self._used.get(name)
            return (local_part(parameter) if used is None else used()).abs()
        generator = torch.Generator().manual_seed(
            self._seed * 1_000_003 + sum(ord(c) * (i + 1) for i, c in enumerate(name))
        )
        whole, sharding = torch.rand(parameter.shape, generator=generator), sharding_of(parameter, name)
        return (whole if sharding is None else sharding.part(whole).clone()).to(local_part(parameter).device)


def scorer(
    method: str,
    model: nn.Module,
    *,
    target: str | Target | Callable[[nn.Module, Any], Tensor] | None = None,
    composite: str | Composite | None = None,
    statistic: str | None = None,
    granularity: str = "weight",
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
    """The scorer of a method, with the method's defaults where None is given.

    Args:
        method: ``"lrp"``; ``"gradient"`` (gradient x weight); ``"wanda"`` (arXiv 2306.11695); ``"magnitude"``; ``"random"``.
        model: what is scored.
        target: see :func:`lrp_prune.attribute`.
        composite: rules, for ``lrp``.
        statistic: see :func:`lrp_prune.attribute`, for ``lrp`` and ``gradient``.
        granularity: units, for ``lrp`` and ``gradient``.
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
    if method not in ("lrp", "gradient"):
        given = {"composite": composite, "statistic": statistic}
        for name, value in given.items():
            if value is not None:
                raise ValueError(f"method {method!r} has no {name}, got {value!r}")
        if granularity != "weight":
            raise ValueError(f"method {method!r} scores weights, not {granularity}s: use 'lrp' or 'gradient'")
    if method == "gradient" and composite not in (None, "gradient"):
        raise ValueError(f"method 'gradient' has no composite, got {composite!r}: use method='lrp'")
    if method in ("magnitude", "random"):
        return _DataFree(model, method, seed, include, exclude, trainable_only)
    return RelevanceAccumulator(
        model,
        target=explaining_nothing(model, target) if method == "wanda" else target,
        composite=composite or defaults.composite or "gradient",
        statistic=statistic or defaults.statistic,
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
