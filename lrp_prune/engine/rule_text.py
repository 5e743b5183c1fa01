"""Rules as text, as a call of their name: ``gamma(0.25, stabilizer=1e-06)``. What is read is looked up by name, never run."""

import ast
import re
from dataclasses import MISSING, fields
from types import FunctionType
from typing import Any

from lrp_prune.engine import rules
from lrp_prune.engine.rules import PLAIN, RULES, Own, Rule, Terms


def _name_in_text(rule: type[Rule]) -> str:
    return re.sub(r"(?<!^)(?=[A-Z])", "_", rule.__name__).lower()


_KNOWN = {
    entry if isinstance(entry, type) else type(entry)
    for entry in (*RULES.values(), *PLAIN.values(), *vars(rules).values())
    if isinstance(entry, Rule) or (isinstance(entry, type) and issubclass(entry, Rule))
}

CLASSES: dict[str, type[Rule]] = {
    _name_in_text(known): known for known in sorted(_KNOWN - {Rule, Own, Terms}, key=_name_in_text)
}
"""Rules that can have settings, by the name that text gives them; :data:`RULES` has those that are named as they are."""


def rule_of(text: str) -> Rule:
    """The rule that a text says: its name, and its settings in brackets if it is to have other than the usual ones.

    Raises:
        ValueError: for what is written otherwise, a name that there is not, or settings that the rule does not take.

    Example:
        >>> rule_of("gamma(0.5)"), rule_of("uniform")
        (Gamma(gamma=0.5, stabilizer=0.0), Shares(gates=True))
    """
    try:
        found = _read(ast.parse(text.strip(), mode="eval").body)
    except (SyntaxError, MemoryError, RecursionError):
        raise ValueError(
            f"{text!r} is no rule: write its name, with settings in brackets as in 'gamma(0.25)'"
        ) from None
    if not isinstance(found, Rule):
        raise ValueError(f"{text!r} is no rule: expected one of {known_names()}, as in 'gamma(0.25)'")
    return found


def known_names() -> tuple[str, ...]:
    """The names that a text may use."""
    return tuple(dict.fromkeys((*RULES, *CLASSES)))


def _read(node: ast.expr) -> Any:
    """A rule, or one of its settings, which may be a rule again."""
    if isinstance(node, ast.Name):
        return RULES[node.id] if node.id in RULES else _made(node.id, [], {})
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        if any(keyword.arg is None for keyword in node.keywords):
            raise SyntaxError("a call with unpacked settings")
        settings = {str(keyword.arg): _read(keyword.value) for keyword in node.keywords}
        return _made(node.func.id, [_read(value) for value in node.args], settings)
    if isinstance(node, ast.Tuple | ast.List):
        return tuple(map(_read, node.elts))
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError):
        raise ValueError(
            f"{ast.unparse(node)!r} is no setting of a rule: give a number, a tuple of numbers or a text"
        ) from None


def _made(name: str, values: list[Any], settings: dict[str, Any]) -> Rule:
    if name not in CLASSES:
        if name in RULES:
            raise ValueError(f"rule {name!r} has no settings, write {name!r}")
        raise ValueError(
            f"unknown rule {name!r}, expected one of {known_names()}; one of your own is given a name by "
            f"lrp_prune.register_rule({name!r}, rule)"
        )
    try:
        return CLASSES[name](*values, **settings)
    except TypeError:
        takes = [f.name if f.default is MISSING else f"{f.name}={f.default!r}" for f in fields(CLASSES[name]) if f.init]
        raise ValueError(f"rule {name!r} takes the settings ({', '.join(takes)})") from None


def text_of(rule: Rule, *, whole: bool = False) -> str:
    """The text that :func:`rule_of` makes this very rule of.

    Args:
        rule: the rule.
        whole: write all settings, also usual ones, so that the text stays true if these change.

    Raises:
        ValueError: for a rule that has no name, or settings that no text can say.

    Example:
        >>> from lrp_prune.engine.rules import Gamma
        >>> text_of(Gamma(0.25)), text_of(Gamma(0.5)), text_of(Gamma(0.25), whole=True)
        ('gamma', 'gamma(0.5)', 'gamma(gamma=0.25, stabilizer=0.0)')
    """
    name = next((name for name, known in CLASSES.items() if known is type(rule)), None)
    for fixed, known in RULES.items():
        if known == rule and not (whole and fixed == name and fields(rule)):
            return fixed
    if name is None:
        raise ValueError(
            f"{_unnamed(rule)} has no name, so that it cannot be written: give it one by "
            "lrp_prune.register_rule('its_name', rule), and where it is read as well"
        )
    text = f"{name}({', '.join(_settings(rule, whole))})"
    try:
        exact = vars(rule_of(text)) == vars(rule)
    except ValueError:
        exact = False
    if not exact:
        raise ValueError(
            f"{_unnamed(rule)} cannot be written, {text!r} is another one: its settings must be fields of a dataclass, and "
            "numbers, texts, rules, or tuples of these"
        )
    return text


def _settings(rule: Rule, whole: bool) -> list[str]:
    found, skipped = [], whole
    for field in fields(rule):
        value = getattr(rule, field.name)
        if not whole and value == field.default:
            skipped = True
            continue
        found.append(_written(value, whole) if not skipped else f"{field.name}={_written(value, whole)}")
    return found


def _written(value: Any, whole: bool) -> str:
    if isinstance(value, Rule):
        return text_of(value, whole=whole)
    if isinstance(value, tuple):
        entries = ", ".join(_written(entry, whole) for entry in value)
        return f"({entries},)" if len(value) == 1 else f"({entries})"
    return repr(value)


def described(rule: Rule) -> str:
    """What a rule is, in a text that is the same in each run, whether it can be read again or not."""
    try:
        return text_of(rule, whole=True)
    except ValueError:
        return _unnamed(rule)


def _unnamed(rule: Rule) -> str:
    if isinstance(rule, Own):
        function = rule.function if isinstance(rule.function, FunctionType) else type(rule.function)
        return f"<{function.__module__}.{function.__qualname__}>"
    settings = ", ".join(f"{field.name}={getattr(rule, field.name)!r}" for field in fields(rule))
    return f"<{type(rule).__module__}.{type(rule).__qualname__}({settings})>"
