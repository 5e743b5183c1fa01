"""What there is to choose from: rules by depth, softmax variants, and rankings."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, get_args

from torch import nn

from lrp_prune.engine.call import Call
from lrp_prune.engine.composites import Composite, CompositeLike, composite_of
from lrp_prune.engine.entries import RuleLike, entry_of
from lrp_prune.engine.propagation import attributing
from lrp_prune.engine.rule_text import described
from lrp_prune.engine.rules import Rule
from lrp_prune.engine.where import LAYERS, Where
from lrp_prune.models import run, subject_of, to_device
from lrp_prune.models.states import undisturbed
from lrp_prune.selection.keys import ORDERS, Order

ATTENTION: dict[str, dict[str, str]] = {
    "gradient": {},
    "stop": {"softmax": "stop", "matmul": "uniform", "attention": "attention_to_values"},
    "uniform": {"matmul": "uniform", "attention": "attention_uniform"},
}
"""Softmax variants: the plain gradient, a constant pattern (CP-LRP), and AttnLRP's Taylor expansion with products shared."""

RULES = ("gradient", "gamma(0.25)", "gamma(0.05)", "alpha_beta", "z_plus")
"""Rules of layers that are tried: the plain gradient (LRP-epsilon with epsilon -> 0), and those of Pruning by eXplaining."""

_ATTENTION, _ORDER = "attention", "order"


@dataclass(frozen=True)
class SearchSpace:
    """What a composite for pruning is put together of, by one choice on each axis.

    Args:
        rules: for layers, tried in each group; or ``{group: rules}``. Rules that say nothing of the relevance of weights are
            refused.
        groups: ``{name: Where}``, which layers get a rule together; None for four by depth, see :func:`depth_groups`.
        attention: softmax variants of :data:`ATTENTION`; None for all of them if the model has attention.
        orders: ``"absolute"`` and ``"signed"``: whether what is near zero or what is most negative is pruned first.
        base: the composite that has the rules of everything else, and is what results are compared with.

    Raises:
        ValueError: for an axis without a choice, or a rule, variant or order that there is not.

    Example:
        >>> SearchSpace(rules=("gradient", "z_plus"), groups={"all": Where("layer")}, attention=("gradient",)).size
        4
    """

    rules: Sequence[RuleLike] | Mapping[str, Sequence[RuleLike]] = RULES
    groups: Mapping[str, Where] | None = None
    attention: Sequence[str] | None = None
    orders: Sequence[Order] = get_args(Order)
    base: CompositeLike = "epsilon"

    def __post_init__(self) -> None:
        for name, given, known in (("orders", self.orders, ORDERS), ("attention", self.attention, ATTENTION)):
            wrong = [entry for entry in given or () if entry not in known]
            if wrong or isinstance(given, str) or (given is not None and not given):
                raise ValueError(f"{name} must be some of {tuple(known)}, got {given!r}")
        composite_of(self.base)
        for group, rules in self._by_group().items():
            if isinstance(rules, str | Rule) or not rules:
                raise ValueError(f"rules must be several, for {group or 'layers'}, got {rules!r}")
            for rule in rules:
                _check_rule(rule)
        if self.groups is not None and isinstance(self.rules, Mapping) and set(self.rules) != set(self.groups):
            raise ValueError(f"rules are for the groups {sorted(self.rules)}, and there are {sorted(self.groups)}")

    def _by_group(self) -> Mapping[str, Sequence[RuleLike]]:
        if isinstance(self.rules, Mapping):
            return self.rules
        return dict.fromkeys(self.groups or ("",), self.rules)

    def settled(self, model: nn.Module, batches: Sequence[Any]) -> "SearchSpace":
        """The space with groups, and with attention only where the model has any: looked up with the first batch."""
        if self.groups is not None and self.attention is not None:
            return self
        layers, attends = _seen(model, batches)
        groups = _grouped(layers) if self.groups is None else self.groups
        attention = (tuple(ATTENTION) if attends else ("gradient",)) if self.attention is None else self.attention
        return replace(self, groups=groups, attention=attention)

    @property
    def axes(self) -> dict[str, tuple[str, ...]]:
        """The names of the choices, by axis; those with one choice are none."""
        axes = {f"rule of {group}": tuple(self._rules(group)) for group in self.groups or ()}
        axes |= {_ATTENTION: tuple(self.attention or ()), _ORDER: tuple(self.orders)}
        return {name: choices for name, choices in axes.items() if len(choices) > 1}

    @property
    def size(self) -> int:
        """How many combinations there are."""
        size = 1
        for choices in self.axes.values():
            size *= len(choices)
        return size

    def starts(self) -> Iterator[dict[str, str]]:
        """What is tried first: the plain base, with the usual ranking; then one rule everywhere, and the other orders with it."""
        plain = {axis: choices[0] for axis, choices in self.axes.items()}
        yield plain
        for order in self.axes.get(_ORDER, ())[1:]:
            yield {**plain, _ORDER: order}
        rules = {axis: choices for axis, choices in self.axes.items() if axis.startswith("rule of ")}
        for number in range(1, min(map(len, rules.values()), default=0)):
            yield {**plain, **{axis: choices[number] for axis, choices in rules.items()}}

    def composite(self, chosen: Mapping[str, str], name: str = "searched") -> Composite:
        """The composite of a choice on each axis."""
        entries: dict[str | type[nn.Module] | Where, RuleLike] = {}
        for group, where in (self.groups or {}).items():
            rules = self._rules(group)
            entries[where] = rules[chosen.get(f"rule of {group}", next(iter(rules)))]
        variant = chosen.get(_ATTENTION, next(iter(self.attention or ("gradient",))))
        entries |= {Where(kind): rule for kind, rule in ATTENTION[variant].items()}
        return Composite(name, entries, base=composite_of(self.base))

    def order(self, chosen: Mapping[str, str]) -> Order:
        """What is pruned first."""
        return next(order for order in self.orders if order == chosen.get(_ORDER, self.orders[0]))

    def _rules(self, group: str) -> dict[str, Rule]:
        by_group = self._by_group()
        made = [entry_of("layer", rule)[1] for rule in by_group[group]]
        written = [
            rule if isinstance(rule, str) else described(entry)
            for rule, entry in zip(by_group[group], made, strict=True)
        ]
        return dict(zip(written, made, strict=True))

    def described(self) -> dict[str, Any]:
        """Plain values that tell this space from others."""
        groups = {name: repr(where) for name, where in (self.groups or {}).items()}
        rules = {name: [described(rule) for rule in self._rules(name).values()] for name in groups}
        base = composite_of(self.base).description
        return {"groups": groups, "rules": rules, "attention": self.attention, "orders": self.orders, "base": base}


def _check_rule(rule: RuleLike) -> None:
    _, made = entry_of("layer", rule)
    Composite("", {"layer": made}).check_scores_weights()


def depth_groups(model: nn.Module, batches: Iterable[Any]) -> dict[str, Where]:
    """Four groups of layers by depth, as in Pruning by eXplaining (arXiv 2408.12568).

    The first quarter, the middle half and the last quarter; and, of a network with at least three convolutions, those quarters of
    its convolutions, and ``"dense"``, all its other layers; else ``"head"``, the last layer of all.

    Args:
        model: any module.
        batches: of which the first is run, without a trace.

    Example:
        >>> model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(5)))
        >>> import torch
        >>> {name: where.depth for name, where in depth_groups(model, [torch.ones(1, 4)]).items()}
        {'low': range(0, 1), 'middle': range(1, 3), 'high': range(3, 4), 'head': range(4, 5)}
    """
    return _grouped(_seen(model, batches)[0])


def _seen(model: nn.Module, batches: Iterable[Any]) -> tuple[list[str], bool]:
    """The kind of each layer, in the order in which they first run, and whether there is attention."""
    module = subject_of(model).module
    layers: dict[str, str] = {}
    attends: list[Call] = []

    def layer(call: Call) -> Any:
        layers.setdefault(call.parameter or call.name, call.operation.kind)
        return call.run()

    def attention(call: Call) -> Any:
        attends.append(call._replace(args=(), kwargs={}))
        return call.run()

    rules: dict[str | type[nn.Module] | Where, RuleLike] = {
        **{Where(kind): layer for kind in LAYERS},
        **{Where(kind): attention for kind in ("softmax", "attention")},
    }
    batch, parameter = next(iter(batches)), next(module.parameters(), None)
    if parameter is not None:
        with undisturbed(module), attributing(module, Composite("seen", rules), unruled="ignore"):
            run(module, to_device(batch, parameter.device))
    if not layers:
        raise ValueError(f"{type(module).__name__} has no layer with a weight that rules could be searched for")
    return list(layers.values()), bool(attends)


def _grouped(layers: Sequence[str]) -> dict[str, Where]:
    kinds = {kind: layers.count(kind) for kind in LAYERS}
    convolutional = kinds["convolution"] >= 3
    count = kinds["convolution"] if convolutional else len(layers) - 1
    kind = "convolution" if convolutional else "layer"
    quarter = min(max(round(count / 4), 1), count)
    first, last = quarter, max(count - quarter, quarter)
    ranges = {"low": range(first), "middle": range(first, last), "high": range(last, count)}
    groups = {name: Where(kind, depth=depth) for name, depth in ranges.items() if depth}
    if not convolutional:
        return groups | {"head": Where("layer", depth=range(len(layers) - 1, len(layers)))}
    return groups | ({"dense": Where("linear")} if kinds["linear"] else {})
