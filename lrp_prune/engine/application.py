"""Applying a composite: one path from a call to its result, whatever the operation, observed or not."""

from collections.abc import Callable, Hashable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from lrp_prune.engine.composed import PARTS
from lrp_prune.engine.composites import Composite
from lrp_prune.engine.forms import as_in_the_model
from lrp_prune.engine.functional import replaced
from lrp_prune.engine.origins import marked
from lrp_prune.engine.resolving import resolved
from lrp_prune.engine.roots import Roots
from lrp_prune.engine.rules import Call, Rule, Terms, detached, gradient, is_activation, norm_pool
from lrp_prune.engine.rules.folding import forget_parts, note_joined
from lrp_prune.engine.rules.softmax import without_masked_rows
from lrp_prune.engine.tracing import UnitTracer
from lrp_prune.engine.uses import WeightUses
from lrp_prune.engine.where import LAYER, LAYERS

_CONCATENATIONS = frozenset({"cat", "concat", "concatenate"})


class Depths:
    """How many layers have run an operation of a kind, or of some kinds, before a layer first did."""

    def __init__(self) -> None:
        self._first: dict[str, dict[Hashable, int]] = {}

    def of(self, call: Call, among: str) -> int:
        """The depth of the layer that makes a call, its weight or the module that runs, among those of a kind."""
        known = self._first.setdefault(among, {})
        origins = (marked(value) for value in call._constants())
        layer = next((origin.name for origin in origins if origin is not None), call.name)
        return known.setdefault(layer, len(known))


def folds(composite: Composite) -> bool:
    """Whether rules of layers ask for batch normalisation to be folded into them."""
    return any(isinstance(rule, Terms) for kind in LAYERS for rule in composite.rules_of(kind))


class Application:
    """Gives each call the rule that a composite has for it, and computes its result.

    Args:
        composite: the rules.
        roots: where relevance ends; what enters as data is added to it.
        uses: what is to be observed where weights are used.
        tracer: follows units, or None.
        is_own: whether a parameter is one of the module that runs.
        seeing: gives what makes the rules see the operations inside, while it is entered.
    """

    def __init__(
        self,
        composite: Composite,
        roots: Roots,
        uses: WeightUses,
        tracer: UnitTracer | None,
        is_own: Callable[[Any], bool],
        seeing: Callable[[], AbstractContextManager[Any] | None],
    ) -> None:
        self._composite, self._roots, self._uses, self._tracer = composite, roots, uses, tracer
        self._is_own, self._seeing = is_own, seeing
        self._placed, self._depths = composite.is_placed, Depths()
        self.folding = folds(composite)
        self._rules_sums = any(rule != gradient for rule in composite.rules_of("sum"))
        self._rules: dict[Hashable, Rule] = {}

    def apply(self, call: Call) -> Any:
        """The result of a call, by its rule."""
        if call.operation.data:
            call = self._roots.with_data(call)
        elif call.operation.added:
            self._roots.note_bias(call)
        call = resolved(call)
        way = _WAYS.get(call.operation.kind)
        if way is not None:
            return way(self, call)
        if not any(map(is_activation, call.operands())):
            return call.run()
        return self._by_rule(call)

    def _by_rule(self, call: Call) -> Any:
        if not self._placed:  # which is most of all calls, and a call less takes less time
            return self._rule(call.operation.kind)(call)
        return self.ruled(call).ruled()

    def ruled(self, call: Call, kind: str | None = None) -> Call:
        """The call with the rule that it has; of another kind than its own if one is given."""
        kind = call.operation.kind if kind is None else kind
        if not self._placed:
            return call._replace(rule=self._rule(kind))
        depth = self._depths.of(call, call.operation.kind)
        layer_depth = self._depths.of(call, LAYER) if call.operation.kind in LAYERS else None
        return call._replace(depth=depth, rule=self._rule(kind, call.name, call.module, depth, layer_depth))

    def _rule(self, kind: str, name: str = "", module: nn.Module | None = None, *depths: int | None) -> Rule:
        key = (kind, name, type(module), *depths) if self._placed else kind
        rule = self._rules.get(key)
        if rule is None:
            rule = self._rules[key] = self._composite.rule(kind, name, module, *depths)
        return rule

    def _contracted(self, call: Call) -> Any:
        call = self.ruled(call)
        result = self._uses.observed(call)
        if result is not None:
            return result
        operands = call.operands()
        active = [index for index, value in enumerate(operands) if is_activation(value)]
        if not active:  # but what their product is added to may be one
            return call.run() if len(operands) != 2 or call.has_activations else _of_constants(call)
        if len(active) == 1 and len(operands) == 2 and call.rule == gradient:
            return _as_in_the_model(call, active[0]).run()
        return call.ruled()

    def shares(self, call: Call) -> bool:
        """Whether a call is a sum of activations that may have a rule."""
        return self._rules_sums and call.operation.adds and all(map(is_activation, call.operands()))

    def _normalized(self, call: Call) -> Any:
        if not any(map(is_activation, call.operands())):
            return call.run()
        result = self._by_rule(call)
        if not self.folding:
            forget_parts(result)  # which hold the input, and nobody will ask for them
        return result

    def _softmaxed(self, call: Call) -> Any:
        if not any(map(is_activation, call.operands())):
            return call.run()
        result = self._by_rule(call)
        dim = call.argument(1, "dim")
        if dim is not None and "softm" in call.function.__name__:
            without_masked_rows(result, dim)
        return result

    def _summed(self, call: Call) -> Any:
        return self._by_rule(call) if self.shares(call) else call.run()

    def taken(self, call: Call) -> Any:
        """The result of a function without a rule, with a parameter among its arguments: rows may be looked up in that."""
        lookup = self._roots.ids.lookup(call)
        return call.run() if lookup is None else self._looked_up(lookup)

    def _looked_up(self, call: Call) -> Any:
        return self._roots.embedding(call, self._is_own(marked(call.operand(0))))

    def _factors(self, call: Call) -> Any:
        rule = self.ruled(call, "product").rule
        active = any(map(is_activation, call.operands()))
        return rule.of_factors(call) if active and rule is not None else call.run()

    def _composed(self, call: Call) -> Any:
        """The value of the one operation, and the relevance of those that it stands for."""
        if not call.has_activations:
            return call.run()
        seeing = self._seeing()
        assert seeing is not None
        with seeing:
            stand_in = PARTS[call.function.__name__](*call.args, **call.kwargs)
        constant = call._replace(
            args=tuple(map(detached, call.args)), kwargs={name: detached(value) for name, value in call.kwargs.items()}
        )
        result = replaced(stand_in, constant.run)
        if self._tracer is not None:
            self._tracer.carry(stand_in, result)
        return result

    def leaves(self, call: Call) -> bool:
        """Whether a call keeps the plain gradient."""
        return self.ruled(call).rule == gradient


def _as_in_the_model(call: Call, place: int) -> Call:
    operands = call.operands()
    operands[1 - place] = as_in_the_model(operands[place], operands[1 - place], place)
    return call.with_operands(operands)


@torch.no_grad()
def _of_constants(call: Call) -> Any:
    first, second = call.operands()
    return _as_in_the_model(call, 0 if first.dim() >= second.dim() else 1).run()


def _run(application: Application, call: Call) -> Any:
    return call.run()


def _joined(application: Application, call: Call) -> Any:
    result = call.run()
    if application.folding and call.function.__name__ in _CONCATENATIONS:
        note_joined(call.operand(0), call.argument(1, "dim") or 0, result)
    return result


def _norm_pooled(application: Application, call: Call) -> Any:
    return norm_pool(call)


_WAYS: Mapping[str, Callable[[Application, Call], Any]] = {
    "plain": _run,
    "sum": Application._summed,
    "normalization": Application._normalized,
    "softmax": Application._softmaxed,
    "join": _joined,
    **dict.fromkeys(("linear", "convolution", "matmul"), Application._contracted),
    "embedding": Application._looked_up,
    "dropout": Application._by_rule,  # whatever it gets, so that no random number is drawn
    "norm_pool": _norm_pooled,
    "composed": Application._composed,
    "factors": Application._factors,
}
"""Kinds of operation that have a way of their own, by what they are once their operands are known."""
