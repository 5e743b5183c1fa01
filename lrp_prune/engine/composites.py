"""Composites: which rule each operation gets."""

import ast
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from lrp_prune.engine.operations import KINDS
from lrp_prune.engine.rules import PLAIN, RULES, AlphaBeta, Call, Flat, Gamma, Own, Rule, ZBox, ZPlus, gradient
from lrp_prune.engine.rules.softmax import AttentionZPlus, SoftmaxZPlus
from lrp_prune.engine.rules.terms import Constant
from lrp_prune.engine.where import LAYER, LAYERS, Where

__all__ = ["COMPOSITES", "LAYER", "LAYERS", "Composite", "Where", "composite_of", "epsilon_gamma_box"]

RuleLike = str | Rule | Callable[[Call], Any]
"""A rule, the name of one, or a function of a :class:`~lrp_prune.engine.rules.Call` that returns its result."""


@dataclass(frozen=True)
class Composite:
    """A named choice of rules: the first that matches an operation is its rule, and where none does the base's.

    Args:
        name: what results are labelled with.
        rules: what a rule is for -> the rule, or the name of one, in the order in which they are asked. What it is for is a kind
            of operation, a class of modules, or :class:`Where` with several conditions. Kinds: ``activation``, ``product`` (of
            two activations), ``linear`` (products of an activation with a weight or constant, but for ``convolution``),
            ``matmul`` (of two activations), ``softmax``, ``attention`` (``scaled_dot_product_attention``),
            ``normalization``, ``statistic`` (roots, reciprocals, norms, variances), ``division``, ``average_pooling``,
            ``max_pooling``, ``sum`` (of two activations), ``dropout``.
        base: the composite, or the name of a preset, that has the rules of everything else; None for the plain gradient.

    Raises:
        ValueError: for an unknown kind or rule, or a rule for what it cannot be for.

    Example:
        The gamma rule for convolutions, a stronger one for the first two, and LRP-epsilon for the rest:

        >>> import torch, lrp_prune
        >>> from lrp_prune.attribution import Gamma, Where
        >>> rules = {Where("convolution", depth=range(2)): Gamma(1.0), "convolution": Gamma(0.25)}
        >>> composite = Composite("gamma", rules, base="epsilon")
        >>> model = nn.Sequential(
        ...     nn.Conv1d(1, 4, 3, bias=False), nn.ReLU(), nn.Conv1d(4, 4, 3, bias=False), nn.ReLU(),
        ...     nn.Conv1d(4, 4, 3, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(8, 2, bias=False),
        ... )
        >>> with lrp_prune.attributing(model, composite) as propagation:
        ...     value = model(torch.randn(1, 1, 8)).sum()
        ...     relevance = propagation.relevance(value)["input"]
        >>> torch.testing.assert_close(relevance.sum(), value.detach())
        >>> batches = [(torch.randn(16, 1, 8), torch.randint(2, (16,)))]
        >>> lrp_prune.attribute(model, batches, composite=composite).composite
        'gamma'
    """

    name: str
    rules: Mapping[str | type[nn.Module] | Where, RuleLike] = field(default_factory=dict, hash=False)
    base: "str | Composite | None" = None

    def __post_init__(self) -> None:
        entries: list[tuple[Where, Rule]] = []
        for where, rule in self.rules.items():
            try:
                entries.append(_entry(where, rule))
            except ValueError as error:
                raise ValueError(f"composite {self.name!r}: {error}") from None
        base = None if self.base is None else composite_of(self.base)
        object.__setattr__(self, "rules", dict(self.rules))
        object.__setattr__(self, "entries", (*entries, *(() if base is None else base.entries)))
        preset = _presets().get(self.name)
        if preset is not None and preset.entries != self.entries:
            raise ValueError(
                f"{self.name!r} is the name of a preset with other rules, and results are told apart by it"
            )

    entries: tuple[tuple[Where, Rule], ...] = field(init=False, repr=False, compare=False)
    """What rules are for, and the rules; first match wins."""

    def rule(
        self,
        kind: str,
        name: str = "",
        module: nn.Module | None = None,
        depth: int | None = None,
        layer_depth: int | None = None,
    ) -> Rule:
        """The rule of a kind of operation, in a module of a name."""
        for where, rule in self.entries:
            if where.matches(kind, name, module, depth, layer_depth) and _fits(rule, kind):
                return PLAIN.get(kind, rule) if rule == gradient else rule
        return PLAIN.get(kind, gradient)

    def rules_of(self, kind: str) -> Iterator[Rule]:
        """All rules that an operation of a kind may get."""
        for where, rule in self.entries:
            if where.is_for(kind) and _fits(rule, kind):
                yield rule
                if not where.is_placed:
                    return
        yield gradient

    def needs(self, what: str) -> bool:
        """Whether a rule needs to know something of its calls: see :class:`~lrp_prune.engine.rules.Rule`."""
        return any(what in rule.needs for kind in KINDS for rule in self.rules_of(kind))

    @property
    def is_placed(self) -> bool:
        """Whether rules differ between operations of a kind, or need to know the module that runs."""
        return any(where.is_placed for where, _ in self.entries) or self.needs("places")

    @property
    def traced(self) -> bool:
        """Whether a rule for products may ask where an activation comes from."""
        return any("gates" in rule.needs for rule in self.rules_of("product"))

    @property
    def is_plain(self) -> bool:
        """Whether every operation keeps its plain gradient."""
        return all(rule == gradient or rule in PLAIN.values() for _, rule in self.entries)

    def check_scores_weights(self) -> None:
        """Refuse a composite under which the relevance of weights is not known.

        Raises:
            ValueError: if it has a rule for linear layers or convolutions that says nothing of it.
        """
        for kind in LAYERS:
            for where, rule in self.entries:
                # A rule for some modules, whatever they run, is looked at where it meets a weight.
                wanted = where.is_for(kind) and (where.kind is not None or not where.is_placed)
                if wanted and _fits(rule, kind) and not rule.scores_weights:
                    called = getattr(rule.function, "__name__", rule) if isinstance(rule, Own) else _name_of(rule)
                    raise ValueError(
                        f"composite {self.name!r} has a rule of its own for {kind!r} ({called}), and what relevance weights have "
                        "then is not known: leave it out, declare its terms (lrp_prune.attribution.Terms), or use "
                        "lrp_prune.attributing for activations"
                    )
                if wanted and _fits(rule, kind):
                    break

    def check_fits(self, modules: Mapping[str, nn.Module]) -> None:
        """Refuse patterns and classes that no module of a model has.

        Raises:
            ValueError: for the first of them.
        """
        for where, _ in self.entries:
            if where.name is not None and not any(fnmatchcase(name, where.name) for name in modules):
                raise ValueError(
                    f"composite {self.name!r}: the pattern {where.name!r} matches no module; there are "
                    f"{', '.join(list(modules)[1:4])}, ..."
                )
            layer = where.layer
            if layer is not None and not any(isinstance(module, layer) for module in modules.values()):
                raise ValueError(f"composite {self.name!r}: the model has no {layer.__name__}")


def _entry(given: str | type[nn.Module] | Where, rule: RuleLike) -> tuple[Where, Rule]:
    where = given if isinstance(given, Where) else Where(given) if isinstance(given, str) else Where(layer=given)
    if isinstance(rule, str):
        if rule not in RULES:
            raise ValueError(f"unknown rule {rule!r}, expected one of {tuple(RULES)}")
        rule = RULES[rule]
    elif isinstance(rule, type) or not callable(rule):
        raise ValueError(f"a rule is an object, such as Gamma(0.25), the name of one, or a function, got {rule!r}")
    elif not isinstance(rule, Rule):
        rule = Own(rule)
    if where.kind is not None and not all(_fits(rule, kind) for kind in KINDS if where.is_for(kind)):
        raise ValueError(f"{_name_of(rule)} is a rule for {rule.kinds}, not for {where.kind!r}")
    return where, rule


def _fits(rule: Rule, kind: str) -> bool:
    return rule.kinds is None or kind in rule.kinds


def _name_of(rule: Rule) -> str:
    return next((name for name, known in RULES.items() if known == rule), str(rule))


def composite_of(composite: str | Composite) -> Composite:
    """A preset by name, with bounds in brackets if it needs any, or the composite itself.

    Raises:
        ValueError: if there is no preset of that name, or its bounds are missing or make no sense.
    """
    if isinstance(composite, Composite):
        return composite
    if composite in COMPOSITES:
        return COMPOSITES[composite]
    name, bracket, bounds = composite.partition("(") if isinstance(composite, str) else ("", "", "")
    if name != BOXED:
        known = (*COMPOSITES, f"{BOXED}(low, high)")
        raise ValueError(f"composite must be one of {known} or a Composite, got {composite!r}")
    try:
        low, high = ast.literal_eval(bracket + bounds)
    except (SyntaxError, TypeError, ValueError):
        raise ValueError(
            f"composite {composite!r} needs the smallest and the largest value that inputs can have, such as "
            f"'{BOXED}(-2.1, 2.6)', or a tuple with one for each channel"
        ) from None
    return epsilon_gamma_box(low, high)


def _presets() -> dict[str, Composite]:
    """The presets; none while they are made."""
    found: dict[str, Composite] = globals().get("COMPOSITES", {})
    return found


_COMMON: dict[str | type[nn.Module] | Where, RuleLike] = {
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

COMPOSITES |= {
    composite.name: composite
    for composite in (
        Composite("epsilon_gamma", {"convolution": Gamma(0.25)}, base="epsilon"),
        Composite("epsilon_plus", {"convolution": ZPlus()}, base="epsilon"),
        Composite("epsilon_plus_flat", {Where(LAYER, depth=range(1)): Flat(), "convolution": ZPlus()}, base="epsilon"),
        Composite("epsilon_alpha2_beta1", {"convolution": AlphaBeta(2.0, 1.0)}, base="epsilon"),
    )
}
"""Presets for convolutional networks, by depth (Montavon et al. 2019; Kohlbrenner et al. 2020): ``epsilon`` for fully connected
layers, which lie above, another rule for convolutions, and ``flat`` or, by :func:`epsilon_gamma_box`, z^B for the first layer."""

_GAMMAS: dict[str | type[nn.Module] | Where, RuleLike] = {"convolution": Gamma(0.25), "linear": Gamma(0.05)}

COMPOSITES |= {
    composite.name: composite
    for composite in (
        Composite("attnlrp_gamma", _GAMMAS, base="attnlrp"),
        Composite("cp_lrp_gamma", _GAMMAS, base="cp_lrp"),
        Composite(
            "attnlrp_gamma_z_plus",
            {**_GAMMAS, "softmax": SoftmaxZPlus(), "attention": AttentionZPlus()},
            base="attnlrp",
        ),
    )
}
"""Presets for vision transformers (arXiv 2402.05602, Table 4): gamma 0.25 for convolutions and 0.05 for linear layers, and
softmax by its Taylor expansion, as a constant (CP-LRP), or by z+. The paper has epsilon for the projections of attention, which
names tell: ``Composite("vit", {Where("linear", name="*.attn.*"): "gradient"}, base="attnlrp_gamma")``."""

BOXED = "epsilon_gamma_box"


def epsilon_gamma_box(low: Constant, high: Constant) -> Composite:
    """The preset ``epsilon_gamma`` with z^B for the first layer, whose inputs are bounded (Montavon et al. 2019).

    Wherever a composite is given by name, ``"epsilon_gamma_box(-2.1, 2.6)"`` is the same, and results are labelled so.

    Args:
        low: the smallest value that inputs can have, or one for each channel.
        high: the largest.

    Raises:
        ValueError: for bounds that make no sense, see :class:`~lrp_prune.attribution.ZBox`.

    Example:
        >>> epsilon_gamma_box(-1, 1) == composite_of("epsilon_gamma_box(-1, 1)")
        True
    """
    box = ZBox(low, high)
    return Composite(f"{BOXED}({box.low}, {box.high})", {Where(LAYER, depth=range(1)): box}, base="epsilon_gamma")
