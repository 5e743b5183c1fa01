"""Entries of a composite: what a rule is for, and the rule, however they are given."""

from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from lrp_prune.engine.operations import KINDS
from lrp_prune.engine.rule_text import rule_of
from lrp_prune.engine.rules import RULES, Call, Own, Rule
from lrp_prune.engine.where import Where

RuleLike = str | Rule | Callable[[Call], Any]
"""A rule, its text such as ``"gamma(0.25)"``, or a function of a :class:`~lrp_prune.engine.rules.Call` that gives its result."""


def entry_of(given: str | type[nn.Module] | Where, rule: RuleLike) -> tuple[Where, Rule]:
    """What a rule is for, and the rule.

    Raises:
        ValueError: for an unknown kind or rule, or a rule for what it cannot be for.
    """
    where = given if isinstance(given, Where) else Where(given) if isinstance(given, str) else Where(layer=given)
    if isinstance(rule, str):
        rule = rule_of(rule)
    elif isinstance(rule, type) or not callable(rule):
        raise ValueError(f"a rule is an object, such as Gamma(0.25), the name of one, or a function, got {rule!r}")
    elif not isinstance(rule, Rule):
        rule = Own(rule)
    if where.kind is not None and not all(fits(rule, kind) for kind in KINDS if where.is_for(kind)):
        raise ValueError(f"{name_of(rule)} is a rule for {rule.kinds}, not for {where.kind!r}")
    return where, rule


def asked(entries: Iterable[tuple[Where, Rule]]) -> tuple[tuple[Where, Rule], ...]:
    """The entries without those that never are asked, since one before them is for the same kind, in the same places."""
    found: list[tuple[Where, Rule]] = []
    for where, rule in entries:
        if where.kind is None or all(where != known for known, _ in found):
            found.append((where, rule))
    return tuple(found)


def fits(rule: Rule, kind: str) -> bool:
    """Whether a rule can be for a kind of operation."""
    return rule.kinds is None or kind in rule.kinds


def name_of(rule: Rule) -> str:
    """What a rule is called in messages."""
    return next((name for name, known in RULES.items() if known == rule), str(rule))


def check_places(name: str, entries: Iterable[tuple[Where, Rule]], modules: Mapping[str, nn.Module]) -> None:
    """Refuse patterns and classes that no module of a model has.

    Args:
        name: the composite's.
        entries: its entries.
        modules: of the model, by name.

    Raises:
        ValueError: for the first of them.
    """
    for where, _ in entries:
        if where.name is not None and not any(fnmatchcase(entry, where.name) for entry in modules):
            raise ValueError(
                f"composite {name!r}: the pattern {where.name!r} matches no module; there are "
                f"{', '.join(list(modules)[1:4])}, ..."
            )
        layer = where.layer
        if layer is not None and not any(isinstance(module, layer) for module in modules.values()):
            raise ValueError(f"composite {name!r}: the model has no {layer.__name__}")
