"""What a choice is worth: one attribution on the reference part, then the metric at each rate on the part that judges."""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import nn

from lrp_prune.attribution import attribute
from lrp_prune.engine.composites import Composite
from lrp_prune.metrics.pruning import pruning_area, top_pruning_rate
from lrp_prune.pruning.comparing import evaluated
from lrp_prune.pruning.emptied import EmptiedWeightsWarning
from lrp_prune.pruning.restoring import restored
from lrp_prune.pruning.scope import Scope
from lrp_prune.pruning.select import select
from lrp_prune.relevance import Relevance
from lrp_prune.search.parts import Parts
from lrp_prune.search.space import SearchSpace
from lrp_prune.selection.keys import Order

Evaluate = Callable[[nn.Module, Sequence[Any]], float]
Metric = str | Callable[[Mapping[float, float]], float]
METRICS: tuple[str, ...] = ("area", "top_rate")


@dataclass(frozen=True)
class Setting:
    """What is the same for all trials of a search.

    Args:
        evaluate: from a model and batches to a number.
        rates: what is pruned, in rising order from 0.
        granularity: of what.
        statistic: of relevance where order is ``"absolute"``.
        scope: what is compared; its order is chosen.
        metric: of the values by rate; see :func:`~lrp_prune.search_composite`.
        higher_is_better: of the evaluated number.
        options: of :func:`~lrp_prune.attribute`.
    """

    evaluate: Evaluate
    rates: tuple[float, ...]
    granularity: Any
    statistic: Any
    scope: Scope
    metric: Metric
    higher_is_better: bool
    options: Mapping[str, Any]

    @property
    def metric_name(self) -> str:
        """What the metric is called."""
        return self.metric if isinstance(self.metric, str) else getattr(self.metric, "__name__", "metric")

    def value(self, curve: Mapping[float, float]) -> float:
        """The metric of a curve."""
        if callable(self.metric):
            return float(self.metric(dict(curve)))
        rates, values = list(curve), list(curve.values())
        if self.metric == "top_rate":
            return top_pruning_rate(rates, values, curve[0.0], higher_is_better=self.higher_is_better)
        return pruning_area(rates, values)

    @property
    def maximized(self) -> bool:
        """Whether more of the metric is better."""
        return self.metric == "top_rate" or self.higher_is_better

    def so_far(self, curve: Mapping[float, float]) -> float:
        """What tells a bad trial before its curve is complete: the mean value up to here, in the direction of the metric."""
        area = pruning_area(list(curve), list(curve.values()))
        return area if self.maximized == self.higher_is_better else -area


class Judge:
    """Gives choices their curves; the model is as it was after each.

    Args:
        model: the model.
        parts: of the data.
        space: that the choices are of, settled.
        setting: of the search.
    """

    def __init__(self, model: nn.Module, parts: Parts, space: SearchSpace, setting: Setting) -> None:
        self.model, self.parts, self.space, self.setting = model, parts, space, setting
        self._dense: dict[str, float] = {}
        self._told = False

    def curve(self, composite: Composite, order: Order, part: str = "selection") -> Iterator[dict[float, float]]:
        """The values by rate, as far as they are known, after each rate; the model is pruned only between two of them."""
        setting, model = self.setting, self.model
        relevance = self._collected(composite, order)
        scope = replace(setting.scope, order=order)
        evaluate = partial(self._evaluated, part)
        if part not in self._dense:
            self._dense[part] = evaluate()
        values = {0.0: self._dense[part]}
        with restored(model) as restore:
            for rate in setting.rates[1:]:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", EmptiedWeightsWarning)  # what that costs is what is measured
                    masks = select(relevance, rate, scope)
                masks.apply_(model)
                values[rate] = evaluate()
                restore()
                yield dict(values)

    def judged(self, composite: Composite, order: Order, part: str = "selection") -> dict[float, float]:
        """The whole curve."""
        *_, last = self.curve(composite, order, part)
        return last

    def _collected(self, composite: Composite, order: Order) -> Relevance:
        with warnings.catch_warnings():
            if self._told:  # what holds of the model holds in every trial
                warnings.simplefilter("ignore", UserWarning)
            self._told = True
            return attribute(
                self.model,
                self.parts.reference,
                composite=composite,
                statistic="signed" if order == "signed" else self.setting.statistic,
                granularity=self.setting.granularity,
                **self.setting.options,
            )

    def _evaluated(self, part: str) -> float:
        batches = getattr(self.parts, part)
        return evaluated(self.model, lambda model: self.setting.evaluate(model, batches))
