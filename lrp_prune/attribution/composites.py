"""Composites: which rule each kind of operation gets."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from lrp_prune.attribution import normalization, rules
from lrp_prune.attribution.operations import KINDS
from lrp_prune.attribution.rules import Rule

RULES: dict[str, Rule] = {
    "gradient": rules.gradient,
    "identity": rules.identity,
    "uniform": rules.uniform,
    "stop": rules.stop,
    "stop_gate": rules.stop_gate,
    "stop_denominator": rules.stop_denominator,
    "constant_statistic": normalization.constant_statistic,
    "attention_uniform": rules.attention_uniform,
    "attention_to_values": rules.attention_to_values,
    "attention_gradient": rules.attention_gradient,
    "skip": rules.skip,
}
"""Rules by name, so that a composite can be written in a configuration file."""
_PLAIN: dict[str, Rule] = {
    "attention": rules.attention_gradient,
    "dropout": rules.skip,
    "normalization": normalization.plain,
}
"""What the plain gradient is of kinds of operation that have more to mind than their gradient."""


@dataclass(frozen=True)
class Composite:
    """A named choice of rules, by kind of operation; kinds that are left out keep the plain gradient.

    Args:
        name: what results are labelled with.
        rules: kind of operation -> rule, or the name of one. Kinds: ``activation``, ``product`` (of two activations),
            ``matmul`` (of two activations), ``softmax``, ``attention`` (``scaled_dot_product_attention``),
            ``normalization``, ``statistic`` (square roots, norms, variances), ``division``, ``dropout``.

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
                raise ValueError(
                    f"composite {self.name!r}: unknown kind of operation {kind!r}, expected one of {KINDS}"
                )
            if isinstance(rule, str) and rule not in RULES:
                raise ValueError(f"composite {self.name!r}: unknown rule {rule!r}, expected one of {tuple(RULES)}")
        object.__setattr__(self, "rules", MappingProxyType(dict(self.rules)))

    def rule(self, kind: str) -> Rule:
        """The rule of a kind of operation."""
        chosen = self.rules.get(kind, rules.gradient)
        rule = RULES[chosen] if isinstance(chosen, str) else chosen
        return _PLAIN.get(kind, rule) if rule is rules.gradient else rule


_COMMON = {
    "activation": "identity",
    "normalization": "constant_statistic",
    "statistic": "stop",
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
