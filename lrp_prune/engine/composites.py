"""Composites: which rule each operation gets."""

import ast
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from lrp_prune.engine import composite_text
from lrp_prune.engine.entries import RuleLike, asked, entry_of, fits, name_of
from lrp_prune.engine.operations import KINDS
from lrp_prune.engine.rules import PLAIN, AlphaBeta, Flat, Gamma, Own, Rule, ZBox, ZPlus, gradient
from lrp_prune.engine.rules.softmax import AttentionZPlus, SoftmaxZPlus
from lrp_prune.engine.rules.terms import Constant
from lrp_prune.engine.where import LAYER, LAYERS, Where


@dataclass(frozen=True)
class Composite:
    """A named choice of rules: the first that matches an operation is its rule, and where none does the base's.

    Composites are equal if their names are, and all entries in their order, whichever of them are the base's.

    Args:
        name: what results are labelled with.
        rules: what a rule is for -> the rule, or its text (``"gamma(0.5)"``), in the order they are asked. What it is for is a
            kind of operation, a class of modules, or :class:`Where` with several conditions. Kinds: ``activation``, ``product``
            (of two activations), ``linear`` (products of an activation with a weight or constant, but for ``convolution``),
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
    rules: Mapping[str | type[nn.Module] | Where, RuleLike] = field(default_factory=dict, compare=False)
    base: "str | Composite | None" = field(default=None, compare=False)

    def __post_init__(self) -> None:
        entries: list[tuple[Where, Rule]] = []
        for where, rule in self.rules.items():
            try:
                entries.append(entry_of(where, rule))
            except ValueError as error:
                raise ValueError(f"composite {self.name!r}: {error}") from None
        base = None if self.base is None else composite_of(self.base)
        object.__setattr__(self, "rules", dict(self.rules))
        object.__setattr__(self, "entries", asked((*entries, *(() if base is None else base.entries))))
        preset = _presets().get(self.name)
        if preset is not None and preset.entries != self.entries:
            raise ValueError(
                f"{self.name!r} is the name of a preset with other rules, and results are told apart by it"
            )

    entries: tuple[tuple[Where, Rule], ...] = field(init=False, repr=False, hash=False)
    """What rules are for, and the rules; first match wins."""

    @classmethod
    def from_yaml(cls, source: "str | os.PathLike[str] | Mapping[str, Any]") -> "Composite":
        """Read what :meth:`to_yaml` wrote, or what was written by hand.

        There are ``name`` (by default the file's), ``base`` (a preset) and ``rules``: a mapping from kinds of operation to rules,
        or a list of entries, each with its ``rule`` and what it is for, as in :class:`Where`. A rule is its name, with settings
        in brackets; ``depth`` is a place or ``range(...)``; ``layer`` a class of ``torch.nn``, or one with its module, which is
        imported. Rules of one's own are known by the name that :func:`lrp_prune.register_rule` gave them.

        Args:
            source: path of a file that ends in ``.yaml``, or its text, or the values in it.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: for what is no composite; the message names the file, the entry and what is allowed.

        Example:
            >>> text = "{name: mine, base: epsilon, rules: [{kind: layer, depth: 0, rule: flat}, {name: 'stem.*', rule: z_plus}]}"
            >>> rules = {Where("layer", depth=range(1)): "flat", Where(name="stem.*"): ZPlus()}
            >>> Composite.from_yaml(text) == Composite("mine", rules, base="epsilon")
            True
        """
        told, name, named, entries = composite_text.read(source)
        levels: list[dict[str | type[nn.Module] | Where, RuleLike]] = [{}]
        for where, rule in entries:
            if where in levels[-1]:  # which is asked where the rule before it cannot be
                levels.append({})
            levels[-1][where] = rule
        try:
            base = None if named is None else _preset(named)
            for level in levels[:0:-1]:
                base = cls("", level, base)
            return cls(name, levels[0], base)
        except ValueError as error:
            raise ValueError(f"{told}: {error}") from None

    def to_yaml(self, path: "str | os.PathLike[str] | None" = None) -> str:
        """The composite as text, which :meth:`from_yaml` makes this very composite of; written to a file if there is a path.

        Raises:
            ValueError: for a rule or a class of layers that has no name to be found by, or a file of another kind.

        Example:
            >>> print(composite_of("epsilon_plus_flat").to_yaml())
            name: epsilon_plus_flat
            base: epsilon
            rules:
            - {kind: layer, depth: 0, rule: flat}
            - {kind: convolution, rule: z_plus}
            <BLANKLINE>
        """
        base = None if self.base is None else composite_of(self.base)
        if base is not None and _is_preset(base):
            own = asked(entry_of(where, rule) for where, rule in self.rules.items())
            text = composite_text.write(self.name, base.name, own)
        else:
            text = composite_text.write(self.name, None, self.entries)
        if path is not None:
            composite_text.save(text, path)
        return text

    @property
    def description(self) -> str:
        """The same with every setting and no base: what results keep, to say exactly how they were made."""
        return composite_text.describe(self.name, self.entries)

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
            if where.matches(kind, name, module, depth, layer_depth) and fits(rule, kind):
                return PLAIN.get(kind, rule) if rule == gradient else rule
        return PLAIN.get(kind, gradient)

    def rules_of(self, kind: str) -> Iterator[Rule]:
        """All rules that an operation of a kind may get."""
        for where, rule in self.entries:
            if where.is_for(kind) and fits(rule, kind):
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
                if wanted and fits(rule, kind) and not rule.scores_weights:
                    called = getattr(rule.function, "__name__", rule) if isinstance(rule, Own) else name_of(rule)
                    raise ValueError(
                        f"composite {self.name!r} has a rule of its own for {kind!r} ({called}), and what relevance weights have "
                        "then is not known: leave it out, declare its terms (lrp_prune.attribution.Terms), or use "
                        "lrp_prune.attributing for activations"
                    )
                if wanted and fits(rule, kind):
                    break


CompositeLike = str | os.PathLike[str] | Mapping[Any, Any] | Composite
"""A composite; or the name of a preset, a file or a text of YAML, or a mapping from what rules are for to the rules."""


def composite_of(composite: CompositeLike) -> Composite:
    """The composite that is given.

    Args:
        composite: name of a preset, with bounds in brackets if it needs any; path of a file that ends in ``.yaml``; what such a
            file holds, as text or as values; ``{what a rule is for: rule}``, which is named ``custom``; or a composite.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: if there is no preset of that name, its bounds are missing or make no sense, or for what is no composite.

    Example:
        >>> composite_of("{convolution: gamma(0.5)}") == composite_of({"convolution": Gamma(0.5)})
        True
    """
    if isinstance(composite, Composite):
        return composite
    if isinstance(composite, Mapping) and not composite_text.is_document(composite):
        return Composite("custom", composite)
    if composite_text.is_source(composite):
        return Composite.from_yaml(composite)
    return _preset(composite)


def _preset(composite: Any) -> Composite:
    if isinstance(composite, str) and composite in COMPOSITES:
        return COMPOSITES[composite]
    name, bracket, bounds = composite.partition("(") if isinstance(composite, str) else ("", "", "")
    if name != BOXED:
        known = (*COMPOSITES, f"{BOXED}(low, high)")
        raise ValueError(
            f"composite must be one of {known}, a file that ends in .yaml, or a Composite, got {composite!r}"
        )
    try:
        low, high = ast.literal_eval(bracket + bounds)
    except (SyntaxError, TypeError, ValueError):
        raise ValueError(
            f"composite {composite!r} needs the smallest and the largest value that inputs can have, such as "
            f"'{BOXED}(-2.1, 2.6)', or a tuple with one for each channel"
        ) from None
    return epsilon_gamma_box(low, high)


def _is_preset(composite: Composite) -> bool:
    try:
        return _preset(composite.name) == composite
    except ValueError:
        return False


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
