"""The observers of one collection: which weights and units are scored, and what comes of their sums."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lrp_prune.attribution.beside import Beside, tell_tables
from lrp_prune.attribution.candidates import candidates, taken_for_data
from lrp_prune.attribution.parametrized import parametrized
from lrp_prune.attribution.silent import silent_outputs
from lrp_prune.attribution.statistics import RowStatistic, WeightStatistic, auto_dtype
from lrp_prune.attribution.unit_observers import UNIT_KINDS, Choice, UnitObservers, Units, blocks_left
from lrp_prune.engine.batch_layout import BatchLayout
from lrp_prune.engine.channels import by_weight, channel_axis
from lrp_prune.engine.forms import Form
from lrp_prune.engine.roots import Root
from lrp_prune.engine.tracing import UnitTracer
from lrp_prune.engine.uses import Observer, Use, WeightUses
from lrp_prune.models.wording import listed
from lrp_prune.names import class_name, layer_of, named_parameters, unwrap
from lrp_prune.relevance import Relevance, granularities_of
from lrp_prune.relevance.members import Member
from lrp_prune.relevance.statistics import Statistic, statistic_of
from lrp_prune.relevance.unscored import (
    CONSTANTS,
    DATA,
    NO_PRODUCT,
    TRANSFORMED,
    UNREACHED,
    UNUSED,
    WITHOUT_GRADIENTS,
    described,
    patterns_of,
)


class NothingScoredError(ValueError):
    """There is nothing of the kind that was asked for, or no relevance reaches it."""


class ObserverTable:
    """Makes an observer for each scored weight or unit group at its first use, and the relevance in the end."""

    def __init__(
        self,
        model: nn.Module,
        *,
        statistic: str | Statistic,
        granularity: str | Sequence[str],
        include: Sequence[str] | None,
        exclude: Sequence[str] | None,
        trainable_only: bool,
        accumulate_on: str | torch.device | None,
        matmul_dtype: str | torch.dtype | None,
        on_path: bool = False,
    ) -> None:
        statistic = statistic_of(statistic)
        kinds = granularities_of(granularity)
        granularity = ",".join(kinds)
        statistic.check_suits(granularity)
        if isinstance(matmul_dtype, str) and matmul_dtype != "auto":
            matmul_dtype = getattr(torch, matmul_dtype)
        self._model, self._statistic, self._granularity = unwrap(model), statistic, granularity
        self._device, self._dtype = accumulate_on, matmul_dtype
        self.batch = BatchLayout()
        which = include, exclude, trainable_only
        self.parameters = candidates(self._model, *which, granularity == "embedding")
        self._all = named_parameters(self._model)
        self.beside = Beside(taken_for_data(self._model, *which) if granularity == "weight" else {})
        asked = {*self.parameters, *self.beside.parameters}
        self.parameters = {name: entry for name, entry in self._all.items() if name in asked}
        self._by_default = include is None and granularity == "weight"
        self.active: set[str] | None = None
        """The weights that are collected in this pass; None for all."""
        self._statistics: dict[str, WeightStatistic | RowStatistic] = {}
        self._members: dict[str, tuple[Member, ...]] = {}
        self._layouts: dict[str, str] = {}
        self.held: dict[str, Tensor] = {}
        """Of weights that made something that a rule held constant, which outputs did: bool ``[matrices, outputs]``."""
        self._units: UnitObservers | None = None
        if set(kinds) <= set(UNIT_KINDS):
            choice = Choice(self.parameters, include, exclude, trainable_only)
            self._units = UnitObservers(kinds, statistic, self.batch, self._all, choice, on_path)
        reasons = (DATA, CONSTANTS, TRANSFORMED, WITHOUT_GRADIENTS, NO_PRODUCT)
        self._noted: dict[str, set[str]] = {reason: set() for reason in reasons}
        """Parameters that something else is known of than relevance, by the reason that this is; the first says most."""
        self._used, self.refused = parametrized(self._model) if granularity == "weight" else ({}, {})
        """Of weights that are not used as they are: how, or why they cannot be scored."""

    @property
    def tracer(self) -> UnitTracer | None:
        """Follows units, if it is about any."""
        return None if self._units is None else self._units.tracer

    @property
    def backward_needed(self) -> bool:
        """Whether anything is propagated, or the forward tells all."""
        return self._statistic.backward_needed

    @property
    def kept(self) -> torch.dtype | None:
        """The precision in which rules may keep activations: that in which relevance passes all of the weights."""
        if self._granularity != "weight" or not self._statistic.of_magnitudes:
            return None
        named = (entry for name, entry in self.parameters.items() if name not in self.beside.parameters)
        wanted = {self._matmul_dtype(entry) for entry in named}
        return wanted.pop() if len(wanted) == 1 else None

    def begin(self, point: int, points: int) -> None:
        """Go to one of several points on the way from zeros to a batch."""
        if self._units is not None:
            self._units.begin(point, points)

    def end(self) -> None:
        """A pass at such a point is over."""
        if self._units is not None:
            self._units.end()

    def observers(self, use: Use) -> list[Observer]:
        """What observes a use."""
        if self._granularity == "weight":
            return self._weight_used(use)
        return [] if self._units is None else self._units.observers(use)

    def _collects(self, name: str) -> bool:
        return name in self.parameters and name not in self.refused and (self.active is None or name in self.active)

    def make_room(self) -> None:
        """Allocate the sums of all weights that the forward used, before the backward pass."""
        for statistic in self._weight_statistics():
            statistic.make_room()

    def passed(self) -> None:
        """The batch is over."""
        for statistic in self._weight_statistics():
            statistic.passed()
        self.batch.finish()

    def _weight_statistics(self) -> Iterator[WeightStatistic]:
        return (found for found in self._statistics.values() if isinstance(found, WeightStatistic))

    def park(self, names: Iterable[str], device: torch.device) -> None:
        """Move the sums of weights to a device where they only wait."""
        for name in names:
            statistic = self._statistics.get(name)
            if isinstance(statistic, WeightStatistic):
                statistic.park(device)

    def touched(self, uses: WeightUses, roots: Iterable[Root]) -> None:
        """Take note of parameters that a forward did anything with, and of those that are data."""
        self.refused.update(uses.left_out)
        self._noted[DATA].update(root.parameter for root in roots if root.parameter is not None and root.ids is None)
        if self._by_default:
            looked_up = {root.parameter for root in roots if root.ids is not None}
            self._leave_tables([name for name in self.parameters if name in looked_up])
        self._noted[CONSTANTS].update(uses.on_constants)
        self._noted[TRANSFORMED].update(uses.transformed)
        self._noted[NO_PRODUCT].update(uses.touched)
        self._noted[WITHOUT_GRADIENTS].update(uses.without_gradients)

    def _leave_tables(self, names: list[str]) -> None:
        """Leave tables that an index looks ids up in: like other embeddings, they are none of what is asked for by default."""
        for name in names:
            del self.parameters[name]
            self._statistics.pop(name, None)
        tell_tables(names)

    def no_weights(self) -> list[str]:
        """Of what is asked for, what looked like data and was not multiplied like a weight."""
        return [name for name in self.beside.left(self._noted[DATA]) if name in self.parameters]

    @property
    def tells_outputs(self) -> bool:
        """Whether it is about the outputs of weights as well, of which some may be silent."""
        return self._granularity == "weight" and self.backward_needed

    def note_held(self, made_by: Iterable[tuple[Use, Tensor]]) -> None:
        """Take note of outputs of weights that something constant was made of, by the gradients of what they wrote."""
        for use, gradient in made_by:
            name, layout = use.origin.name, self._layouts.get(use.origin.name)
            axis = channel_axis(use.form, use.weight, gradient)
            if axis is None or layout is None or use.origin.layout is None or name not in self.parameters:
                continue
            channels = (gradient != 0).movedim(axis, -1).flatten(0, -2).any(dim=0)
            if len(channels) == use.weight.shape[use.form.out_axis]:
                rows = by_weight(use.form, use.weight, channels.to(torch.uint8), reading=False)
                entries = torch.zeros_like(self.parameters[name], dtype=torch.uint8, requires_grad=False)
                use.origin.layout.add_to(entries, rows.expand(use.weight.shape))
                self.held[name] = self.held.get(name, False) | ~silent_outputs(entries, layout)

    def _weight_used(self, use: Use) -> list[Observer]:
        reason = use.origin.reason
        self.beside.used(use)
        if reason is not None and use.origin.product and type(use.form) is Form:
            # Scores of queries with positions that a layer has gone over, say: it is what was computed that is no weight.
            self._noted[CONSTANTS].update(use.origin.names)
        elif reason is not None:
            for name in use.origin.names:
                self.refused.setdefault(name, reason)
        if reason is not None or not self._collects(use.origin.name) or (use.constant and self.backward_needed):
            return []
        name, layout = use.origin.name, use.layout()
        if layout is not None:
            self._layouts.setdefault(name, layout)
        return [self._weight(name)]

    def _weight(self, name: str) -> WeightStatistic:
        found = self._statistics.get(name)
        if found is None:
            parameter = self.parameters[name]
            dtype = self._matmul_dtype(parameter)
            options = (self._statistic, self.batch, dtype, self._device, self._used.get(name))
            found = self._statistics[name] = WeightStatistic(name, parameter, *options)
        assert isinstance(found, WeightStatistic)
        return found

    def _matmul_dtype(self, parameter: Tensor) -> torch.dtype | None:
        dtype = auto_dtype(parameter) if self._dtype == "auto" else self._dtype
        assert not isinstance(dtype, str)
        return dtype

    def add_root(self, root: Root, gradient: Tensor) -> None:
        """Add what arrived at an embedding's output, if the embedding is scored."""
        name = root.parameter
        if root.ids is None or name is None or not self._collects(name):
            return
        if self._granularity == "weight":
            self._weight(name).add_rows(root.ids, gradient)
        elif self._granularity == "embedding":
            self._rows(name).add_rows(root.ids, root.leaf.detach() * gradient)

    def add_lookup(self, root: Root) -> None:
        """Add what the forward alone tells of an embedding's rows, if the embedding is scored."""
        name = root.parameter
        if self._granularity == "embedding" and root.ids is not None and name is not None and self._collects(name):
            self._rows(name).add_rows(root.ids, root.leaf.detach())

    def _rows(self, name: str) -> RowStatistic:
        found = self._statistics.get(name)
        if found is None:
            shape = self._all[name].shape
            found = self._statistics[name] = RowStatistic(name, int(shape[0]), self._statistic)
            self._members[name] = (Member.of_slices(name, shape, 0, int(shape[0])),)
        assert isinstance(found, RowStatistic)
        return found

    def _reason(self, name: str) -> str:
        """Why a weight has no relevance."""
        statistic = self._statistics.get(name)
        if name in self.refused:
            return self.refused[name]
        if isinstance(statistic, WeightStatistic):
            return statistic.unscored or UNREACHED
        return next((reason for reason, names in self._noted.items() if name in names), UNUSED)

    def finish(self, **description: Any) -> Relevance:
        """The relevance of everything scored, in the model's order.

        Raises:
            NothingScoredError: if nothing was scored.
            FloatingPointError: if a sum is not finite.
        """
        whole = self._granularity == "weight"
        left_alone = {name: DATA if name in self._noted[DATA] else self._reason(name) for name in self.no_weights()}
        self.beside.leave(left_alone, self.parameters, self._statistics)
        order = [name for name in self.parameters if name in self._statistics] if whole else []
        names = dict.fromkeys((*order, *self._statistics))
        sums: dict[str, Tensor] = {}
        inputs: dict[str, Tensor] = {}
        mean_weights: dict[str, Tensor] = {}
        for name in names:
            statistic = self._statistics[name]
            values = statistic.finish()
            if values is None or (whole and name in self.refused) or (name in self.held and not bool(values.any())):
                continue  # of what makes constants alone nothing is known
            if not bool(torch.isfinite(values.sum())) and not bool(torch.isfinite(values).all()):
                raise FloatingPointError(
                    f"the relevance of {name!r} is not finite: check the batches and the precision"
                )
            sums[name] = values
            if isinstance(statistic, WeightStatistic) and statistic.inputs is not None:
                weights = statistic.mean_weights()
                assert weights is not None
                # Where the values are: they are read together.
                inputs[name], mean_weights[name] = statistic.inputs.to(values.device), weights.to(values.device)
        left: dict[str, str] = {}
        cut: list[str] = []
        if self._units is not None:
            units = self._finished_units()
            sums, left, cut = units.sums, units.left, units.cut
            self._members = units.members
        unscored = {name: self._reason(name) for name in self.parameters if name not in sums} if whole else {}
        if not sums:
            raise NothingScoredError(self._nothing(left, cut, unscored))
        touched = {member.parameter for members in self._members.values() for member in members} or set(self.parameters)
        self._statistics = {}
        return Relevance(
            sums,
            granularity=self._granularity,
            statistic=self._statistic,
            model=fingerprint(self._model),
            members={name: members for name, members in self._members.items() if name in sums},
            parameter_shapes={name: tuple(self._all[name].shape) for name in self._all if name in touched},
            unscored=unscored,
            inputs=inputs,
            mean_weights=mean_weights,
            layouts={name: layout for name, layout in self._layouts.items() if name in sums},
            **description,
        )

    def _finished_units(self) -> Units:
        assert self._units is not None
        return self._units.finish()

    def _nothing(self, left: Mapping[str, str], cut: Sequence[str], unscored: Mapping[str, str]) -> str:
        """Why there is nothing to read."""
        model, what = type(self._model).__name__, self._granularity
        if self._units is None:
            why = described(unscored) or (
                "its weights are used in no operation that is observed, or the rules stop before them"
            )
            return f"no {what} received relevance in {model}: {why}"
        if cut:
            why = f"the explained value does not depend on {listed(patterns_of(cut))}, or the rules stop before"
            return f"no {what} received relevance in {model}: {why}"
        if what == "block":
            assert self._units.tracer.blocks is not None
            why = blocks_left(self._units.tracer.blocks)
            why = why or "none of its layers writes onto a residual stream (x + f(x))"
            return f"{model} has no block: {why}"
        if what == "head":
            return f"{model} has no head: no layer reads what an attention writes"
        asked: dict[str, list[str]] = {}
        for name, why in left.items():
            if name in self.parameters:
                asked.setdefault(why, []).append(layer_of(name))
        reasons = "; ".join(f"{listed(patterns_of(names), 3)}: {why}" for why, names in list(asked.items())[:3])
        return f"{model} has no {what} that could be removed" + (f" ({reasons})" if reasons else "")


def fingerprint(model: nn.Module) -> str:
    """The model's class and the number of its parameters: what relevance must agree in to be merged."""
    model = unwrap(model)
    return f"{class_name(model)}, {sum(parameter.numel() for parameter in model.parameters())} parameters"
