"""Composites: which rule each kind of operation gets."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from lrp_prune.attribution import normalization, rules, scales
from lrp_prune.attribution.operations import KINDS
from lrp_prune.attribution.rules import Rule

RULES: dict[str, Rule] = {
    "gradient": rules.gradient,
    "identity": rules.identity,
    "uniform": rules.uniform,
    "stop": rules.stop,
    "stop_gate": rules.stop_gate,
    "scale": scales.scale,
    "stop_denominator": scales.stop_denominator,
    "constant_statistic": normalization.constant_statistic,
    "attention_uniform": rules.attention_uniform,
    "attention_to_values": rules.attention_to_values,
    "attention_gradient": rules.attention_gradient,
    "skip": rules.skip,
}
"""Rules by name, so that a composite can be written in a configuration file."""
_RULELESS = ("embedding", "sum", "join")
_PLAIN: dict[str, Rule] = {
    "attention": rules.attention_gradient,
    "dropout": rules.skip,
    "normalization": normalization.plain,
    "statistic": scales.plain,
}
"""What the plain gradient is of kinds of operation that have more to mind than their gradient."""


@dataclass(frozen=True)
class Composite:
    """A named choice of rules, by kind of operation; kinds that are left out keep the plain gradient.

    Args:
        name: what results are labelled with.
        rules: kind of operation -> rule, or the name of one. Kinds: ``activation``, ``product`` (of two activations),
            ``linear`` (products of an activation with a weight or constant, but for ``convolution``), ``matmul`` (of two
            activations), ``softmax``, ``attention`` (``scaled_dot_product_attention``), ``normalization``, ``statistic``
            (roots, reciprocals, norms, variances), ``division``, ``dropout``.

    Raises:
        ValueError: for an unknown kind or rule.

    Example:
        >>> Composite("activations", {"activation": "identity"}).name
        'activations'
    """

    name: str
    rules: Mapping[str, str | Rule] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for kind, rule in self.rules.items():
            if kind not in KINDS:
                why = (
                    ": it needs no rule, relevance of sums and lookups follows from the gradient"
                    if kind in _RULELESS
                    else ""
                )
                raise ValueError(
                    f"composite {self.name!r}: unknown kind of operation {kind!r}, expected one of {KINDS}{why}"
                )
            if isinstance(rule, str) and rule not in RULES:
                raise ValueError(f"composite {self.name!r}: unknown rule {rule!r}, expected one of {tuple(RULES)}")
        object.__setattr__(self, "rules", MappingProxyType(dict(self.rules)))

    def rule(self, kind: str) -> Rule:
        """The rule of a kind of operation."""
        rule = self._chosen(kind)
        return _PLAIN.get(kind, rule) if rule is rules.gradient else rule

    @property
    def is_plain(self) -> bool:
        """Whether every kind of operation keeps its plain gradient."""
        return all(self._chosen(kind) is rules.gradient for kind in self.rules)

    @property
    def has_own_rules(self) -> bool:
        """Whether a rule is a function of the user's."""
        return any(rule not in RULES.values() for rule in map(self._chosen, self.rules))

    def check_scores_weights(self) -> None:
        """Refuse a composite under which the relevance of weights is not known.

        Raises:
            ValueError: if it has a rule of its own for linear layers.
        """
        for kind in ("linear", "convolution"):
            rule = self._chosen(kind)
            if rule not in (rules.gradient, rules.uniform):  # which are one where there is one activation
                raise ValueError(
                    f"composite {self.name!r} has a rule of its own for {kind!r} ({getattr(rule, '__name__', rule)}), and what "
                    "relevance weights have then is not known: leave it out, or use lrp_prune.attributing for activations"
                )

    @property
    def scales(self) -> bool:
        """Whether statistics are told from features by their use."""
        return self._chosen("statistic") is scales.scale

    @property
    def traced(self) -> bool:
        """Whether a rule may ask where an activation comes from: the gate of a product."""
        return self._chosen("product") not in _TELL_NO_GATES

    def _chosen(self, kind: str) -> Rule:
        chosen = self.rules.get(kind, rules.gradient)
        return RULES[chosen] if isinstance(chosen, str) else chosen


_TELL_NO_GATES = (rules.gradient, rules.uniform, rules.stop)
"""Rules for products that need not know what is a gate; of rules that users write it is not known."""
_COMMON = {
    "activation": "identity",
    "normalization": "constant_statistic",
    "statistic": "scale",
    "division": "stop_denominator",
}

COMPOSITES: dict[str, Composite] = {
    composite.name: composite
    for composite in (
        Composite("attnlrp", {**_COMMON, "product": "uniform", "matmul": "uniform", "attention": "attention_uniform"}),
        Composite(
            "cp_lrp",
            {
                **_COMMON,
                "product": "stop_gate",
                "matmul": "uniform",
                "softmax": "stop",
                "attention": "attention_to_values",
            },
        ),
        Composite("epsilon", {"activation": "identity"}),
        Composite("gradient"),
    )
}
"""The presets: ``attnlrp`` (arXiv 2402.05602), ``cp_lrp`` (arXiv 2202.07304), ``epsilon`` (LRP-epsilon with epsilon -> 0 for
linear layers, activations hand relevance on, the rest by its Taylor expansion: no relevance is halved, so that its scale
is comparable between layers), ``gradient`` (gradient x input)."""


def composite_of(composite: str | Composite) -> Composite:
    """A preset by name, or the composite itself.

    Raises:
        ValueError: if there is no preset of that name.
    """
    if isinstance(composite, Composite):
        return composite
    if composite not in COMPOSITES:
        raise ValueError(f"composite must be one of {tuple(COMPOSITES)} or a Composite, got {composite!r}")
    return COMPOSITES[composite]
