"""Scorers: a method at work on a model, fed with batches and read once."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lrp_prune.attribution import chunks as passes
from lrp_prune.attribution.beside import tell_unseen
from lrp_prune.attribution.candidates import candidates
from lrp_prune.attribution.collect import RelevanceAccumulator
from lrp_prune.attribution.observers import fingerprint
from lrp_prune.attribution.parametrized import parametrized
from lrp_prune.attribution.sharded import shardings_of
from lrp_prune.distributed.sharding import Sharding, agreeing, local_part, sharding_of
from lrp_prune.models.subject import subject_of
from lrp_prune.pruning.checking import explaining_nothing
from lrp_prune.pruning.layouts import layouts_of
from lrp_prune.pruning.methods import (
    Collects,
    Method,
    Scorable,
    check_scores,
    collected_by,
    kinds_without_data,
    method_of,
)
from lrp_prune.pruning.units import weight_norms
from lrp_prune.relevance import Relevance, granularities_of
from lrp_prune.relevance.members import Member


class Scorer:
    """Scores weights or units by a method.

    What is collected adds, over batches and over processes; scores need not. Whoever has several processes sums what each has
    :meth:`collected`, and lets it be :meth:`scored` then; else :meth:`compute` does both.

    Args:
        method: by which.
        model: what is scored.
        kinds: weights, or kinds of units.
        **options: of :class:`~lrp_prune.attribution.RelevanceAccumulator`.
    """

    def __init__(self, method: Method, model: nn.Module, kinds: tuple[str, ...], **options: Any) -> None:
        self.method, self._model, self._kinds = method, subject_of(model).module, kinds
        self._which = {name: options[name] for name in ("include", "exclude", "trainable_only") if name in options}
        collected = collected_by(method, kinds)
        self._structure = collected is None  # whatever it is made of, only what there is to score is looked for
        self._scores_itself = self._structure or type(method).score is not Method.score
        self._accumulator: RelevanceAccumulator | None = None
        if collected is not None or not kinds_without_data(kinds):
            collected = collected or Collects("structure", explains=False)
            self._accumulator = RelevanceAccumulator(
                model,
                target=method.target if collected.explains else explaining_nothing(model, method.target),
                composite=collected.composite,
                statistic=collected.statistic,
                skip_first=collected.skip_first,
                steps=collected.steps,
                granularity=kinds,
                **options,
            )
            self._parameters = self._accumulator.parameters
        else:
            rows = kinds == ("embedding",)
            self._parameters = candidates(self._model, *self._which_in_order(), rows)
            if not rows:
                tell_unseen(self._model, *self._which_in_order())

    def _which_in_order(self) -> tuple[Any, Any, bool]:
        return self._which.get("include"), self._which.get("exclude"), self._which.get("trainable_only", False)

    @property
    def num_samples(self) -> int:
        """Samples that it was fed with."""
        return 0 if self._accumulator is None else self._accumulator.num_samples

    @property
    def needs_data(self) -> bool:
        """Whether it has to be fed at all."""
        return self._accumulator is not None

    @property
    def parameters(self) -> Mapping[str, Tensor]:
        """The weights that are scored (or that make what is scored), by canonical name."""
        return self._parameters

    def update(self, batch: Any) -> None:
        """Add one batch; where only units are looked for, the first one tells."""
        if self._accumulator is not None and not (self._structure and self.num_samples):
            self._accumulator.update(batch)

    def collect(self, batches: Iterable[Any], chunks: int = 1) -> None:
        """Add all batches, once for each chunk of the weights, see :func:`lrp_prune.attribute`."""
        if self._accumulator is not None:
            passes.collect(self if chunks == 1 else self._accumulator, batches, self._model, chunks)

    def collected(self) -> Relevance:
        """What was collected so far, which adds over processes; the scorer is empty afterwards."""
        return self._of_weights_alone() if self._accumulator is None else self._accumulator.compute()

    def scored(self, collected: Relevance) -> Relevance:
        """The scores, from what was collected.

        Raises:
            ValueError: the method gives something else than a number for each weight or unit.
        """
        if not self._scores_itself:
            return collected
        used = {} if collected.granularity != "weight" else parametrized(self._model).used
        mesh = next((sharding.mesh for sharding in collected.shardings.values()), None)
        with torch.no_grad(), agreeing(mesh, f"method {self.method.name!r}"):  # each may score parts of its own
            values = {name: self._score(name, collected, used) for name in collected}
        if self._structure:
            return collected.with_values(values, self.method.name)
        described = {name: getattr(collected, name) for name in ("composite", "target", "num_samples")}
        return collected.with_values(values, self.method.name, **described)

    def compute(self) -> Relevance:
        """The scores of what one process was fed with."""
        return self.scored(self.collected())

    def _score(self, name: str, collected: Relevance, used: Mapping[str, Callable[[], Tensor]]) -> Tensor:
        values = None if self._structure else collected.local(name)
        if collected.granularity != "weight":
            units = len(collected.sums[name])
            weight: Callable[[], Tensor] = partial(weight_norms, self._model, collected.members[name], units)
            scorable = Scorable(name, (units,), values, weight)
        else:
            parameter = self._parameters[name]
            part = partial(_part, sharding_of(parameter, name))
            weight = used.get(name, partial(local_part, parameter))
            scorable = Scorable(name, tuple(parameter.shape), values, weight, part)
        scores = self.method.score(scorable)
        check_scores(self.method, name, scores, tuple(collected.sums[name].shape))
        return scores.detach().to(device=collected.sums[name].device)

    def _of_weights_alone(self) -> Relevance:
        """What there is to score where nothing is collected: weights as they are, or rows of embeddings."""
        rows = self._kinds == ("embedding",)
        refused = {} if rows else parametrized(self._model).refused
        shapes = {name: tuple(parameter.shape) for name, parameter in self._parameters.items()}
        members = {name: (Member.of_slices(name, shape, 0, shape[0]),) for name, shape in shapes.items()}
        scored = {name: local_part(entry) for name, entry in self._parameters.items() if name not in refused}
        return Relevance(
            {name: entry.new_empty(shapes[name][:1]) if rows else entry for name, entry in scored.items()},
            granularity="embedding" if rows else "weight",
            statistic=self.method.name,
            composite="",
            target="",
            model=fingerprint(self._model),
            parameter_shapes=shapes,
            members=members if rows else None,
            unscored={name: refused[name] for name in self._parameters if name in refused},
            shardings=shardings_of(self._model),
            layouts={} if rows else {name: kind for name, kind in layouts_of(self._model).items() if name in scored},
        )


def _part(sharding: Sharding, values: Tensor) -> Tensor:
    part = sharding.part(values)
    return part.clone() if sharding.is_divided else part  # so that what is not here is not kept


def scorer(
    method: str | Method,
    model: nn.Module,
    *,
    granularity: str | Sequence[str] = "weight",
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
    trainable_only: bool = False,
    accumulate_on: str | None = None,
    matmul_dtype: str | None = "auto",
    unruled: str = "warn",
    forward_context: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> Scorer:
    """The scorer of a method.

    Args:
        method: a name, or an object, see :mod:`lrp_prune.pruning.methods`.
        model: what is scored.
        granularity: weights, or kinds of units.
        include: patterns of parameters to score.
        exclude: patterns of parameters to leave out.
        trainable_only: leave out frozen weights unless included by name.
        accumulate_on: device of the sums.
        matmul_dtype: see :class:`~lrp_prune.attribution.RelevanceAccumulator`.
        unruled: see :func:`lrp_prune.attributing`.
        forward_context: a context manager for the forward.

    Raises:
        ValueError: for an unknown method, or an argument that is not possible.
    """
    return Scorer(
        method_of(method),
        model,
        granularities_of(granularity),
        include=include,
        exclude=exclude,
        trainable_only=trainable_only,
        accumulate_on=accumulate_on,
        matmul_dtype=matmul_dtype,
        unruled=unruled,
        forward_context=forward_context,
    )
