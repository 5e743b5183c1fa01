"""Composites as text: a few lines of YAML, which are read again to the very same composite."""

import ast
import importlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from lrp_prune.engine.entries import entry_of
from lrp_prune.engine.rule_text import described, text_of
from lrp_prune.engine.rules import Rule
from lrp_prune.engine.where import Where

SUFFIXES = (".yaml", ".yml")
_PARTS = ("name", "base", "rules")
_CONDITIONS = tuple(field.name for field in fields(Where))
_WIDTH = 120
_MERGED = "tag:yaml.org,2002:merge"  # of the key <<, which takes in the entries of another mapping


class Written(NamedTuple):
    """A composite as it was read; ``told`` says from where."""

    told: str
    name: str
    base: str | None
    entries: list[tuple[Where, Rule]]


def is_path(text: object) -> bool:
    """Whether this is a path to a file of a composite, and not its text."""
    return isinstance(text, os.PathLike) or (isinstance(text, str) and not is_text(text) and _has_suffix(text))


def is_text(text: str) -> bool:
    """Whether this is the text of a composite, and not the name of one."""
    return "\n" in text or text.lstrip().startswith("{")


def is_source(given: object) -> bool:
    """Whether :func:`read` is to read this."""
    return isinstance(given, Mapping) or is_path(given) or (isinstance(given, str) and is_text(given))


def _has_suffix(path: object) -> bool:
    return str(path).strip().lower().endswith(SUFFIXES)


def is_document(values: Mapping[Any, Any]) -> bool:
    """Whether a mapping has the parts of a composite, and is not one from what rules are for to the rules."""
    return any(part in values for part in _PARTS)


def read(source: "str | os.PathLike[str] | Mapping[str, Any]") -> Written:
    """What a file, a text or the values of one say.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no composite; the message names the file, the entry, and what is allowed.
    """
    told, name, values = "composite", "custom", source
    if is_path(source):
        path = Path(str(source))
        if not path.is_file():
            raise FileNotFoundError(f"there is no composite at {path} (looked for in {Path.cwd()})")
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is no text in UTF-8: {error}") from None
        told, name, values = str(path), path.stem, _parsed(text, str(path))
    elif isinstance(source, str):
        values = _parsed(source, told)
    if not isinstance(values, Mapping) or not values:
        raise ValueError(
            f"{told}: expected a mapping with {_PARTS}, or from kinds of operation to rules, got {values!r}"
        )
    if not is_document(values):
        values = {"rules": values}
    unknown = [key for key in values if key not in _PARTS]
    if unknown:
        raise ValueError(f"{told}: unknown {unknown[0]!r}, expected {_PARTS}; kinds of operation belong under 'rules'")
    for part, wanted in (("name", "a text"), ("base", "the name of a preset")):
        if not isinstance(values.get(part, ""), str) and values[part] is not None:
            raise ValueError(f"{told}: {part} must be {wanted}, got {values[part]!r}")
    found: list[tuple[Where, Rule]] = []
    for number, given in enumerate(_listed(told, values.get("rules")), start=1):
        where, rule = _entry(f"{told}, entry {number} ({given})", given)
        if where.kind is not None and any(where == known for known, _ in found):
            raise ValueError(
                f"{told}, entry {number} ({given}): one before it is for the same, so that it is never asked"
            )
        found.append((where, rule))
    return Written(told, values.get("name") or name, values.get("base"), found)


def _parsed(text: str, told: str) -> Any:
    import yaml

    loading: Any = type(
        "Loader", (yaml.SafeLoader,), {}
    )  # refuses keys that are there twice, of which the last would count

    def mapping(loader: Any, node: Any) -> dict[Any, Any]:
        keys = [loader.construct_object(key, deep=True) for key, _ in node.value if key.tag != _MERGED]
        twice = [key for number, key in enumerate(keys) if key in keys[:number]]
        if twice:
            raise ValueError(
                f"{told}, line {node.start_mark.line + 1}: {twice[0]!r} is there twice; several entries for one kind are "
                "written as a list, '- {kind: ..., depth: ..., rule: ...}'"
            )
        made: dict[Any, Any] = loader.construct_mapping(node, deep=True)
        return made

    loading.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, mapping)
    try:
        return yaml.load(text, loading)
    except yaml.YAMLError as error:
        raise ValueError(f"{told} is no YAML: {' '.join(str(error).split())}") from None


def _listed(told: str, rules: Any) -> list[Any]:
    if rules is None:
        return []
    if isinstance(rules, Mapping):
        return [{"kind": kind, "rule": rule} for kind, rule in rules.items()]
    if isinstance(rules, list | tuple):
        return list(rules)
    raise ValueError(f"{told}: rules must be a list of entries, or a mapping from kinds to rules, got {rules!r}")


def _entry(told: str, given: Any) -> tuple[Where, Rule]:
    if not isinstance(given, Mapping) or "rule" not in given:
        raise ValueError(f"{told}: expected a mapping with 'rule' and what it is for, {_CONDITIONS}")
    unknown = [key for key in given if key not in (*_CONDITIONS, "rule")]
    if unknown:
        raise ValueError(f"{told}: unknown {unknown[0]!r}, expected 'rule' and what it is for, {_CONDITIONS}")
    if not isinstance(given["rule"], str):
        raise ValueError(f"{told}: rule must be a text such as 'gamma(0.25)', got {given['rule']!r}")
    conditions = {key: value for key, value in given.items() if key != "rule" and value is not None}
    if not conditions:
        raise ValueError(f"{told}: say what the rule is for, by one of {_CONDITIONS}")
    try:
        made = {key: _READ[key](value) if key in _READ else value for key, value in conditions.items()}
        return entry_of(Where(**made), given["rule"])
    except ValueError as error:
        raise ValueError(f"{told}: {error}") from None


def _read_layer(value: Any) -> type[nn.Module]:
    """A class by its name in ``torch.nn``, or with its module's, which is imported."""
    found: Any = None
    if isinstance(value, str) and all(part.isidentifier() for part in value.split(".")):
        *path, last = value.split(".")
        found, rest = _imported(path) if path else (nn, [])
        for name in (*rest, last):
            found = getattr(found, name, None)
    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        raise ValueError(
            f"layer must be the name of a class of torch.nn, such as Conv2d, or of one with its module, such as "
            f"my_models.Block, got {value!r}"
        )
    return found


def _imported(path: Sequence[str]) -> tuple[Any, Sequence[str]]:
    """The innermost module of a dotted path, and what is left of the path; None if there is no such module."""
    for parts in range(len(path), 0, -1):
        name = ".".join(path[:parts])
        try:
            return importlib.import_module(name), path[parts:]
        except Exception as error:
            if not isinstance(error, ModuleNotFoundError) or not f"{name}.".startswith(f"{error.name}."):
                raise ValueError(f"the module {name} cannot be imported: {type(error).__name__}: {error}") from error
    return None, path


def _read_depth(value: Any) -> range:
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return range(value, value + 1)
    if isinstance(value, str):
        try:
            node = ast.parse(value.strip(), mode="eval").body
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "range":
                return range(*map(ast.literal_eval, node.args))
        except (SyntaxError, TypeError, ValueError):
            pass
    raise ValueError(f"depth must be a place counted from 0, or places such as range(3) or range(2, 5), got {value!r}")


_READ: Mapping[str, Callable[[Any], Any]] = {"layer": _read_layer, "depth": _read_depth}


def _layer_text(layer: type[nn.Module]) -> str:
    short: str = layer.__name__
    if getattr(nn, short, None) is layer:
        return short
    text: str = f"{layer.__module__}.{layer.__qualname__}"
    try:
        same = _read_layer(text) is layer
    except ValueError:
        same = False
    if not same:
        raise ValueError(
            f"the class {text} cannot be found by its name: define it at the top of a module, or use a name pattern"
        )
    return text


def _depth_text(depth: range) -> str | int:
    if len(depth) == 1 and depth.step == 1:
        return depth.start
    return repr(depth) if depth.step != 1 or depth.start else f"range({depth.stop})"


def write(name: str, base: str | None, entries: Sequence[tuple[Where, Rule]]) -> str:
    """The text of a composite.

    Raises:
        ValueError: for a rule or a class of layers that has no name; see :func:`~lrp_prune.engine.rule_text.text_of`.
    """
    written: list[dict[str, Any]] = []
    for where, rule in entries:
        try:
            written.append(_conditions(where, _layer_text) | {"rule": text_of(rule)})
        except ValueError as error:
            raise ValueError(f"composite {name!r}: {error}") from None
    return _dumped(name, base, written)


def describe(name: str, entries: Sequence[tuple[Where, Rule]]) -> str:
    """The same with every setting, as it is kept with results; what no text can say is named."""

    def told(layer: type[nn.Module]) -> str:
        try:
            return _layer_text(layer)
        except ValueError:
            return f"<{layer.__module__}.{layer.__qualname__}>"

    return _dumped(name, None, [_conditions(where, told) | {"rule": described(rule)} for where, rule in entries])


def _conditions(where: Where, layer_text: Callable[[type[nn.Module]], str]) -> dict[str, Any]:
    texts: Mapping[str, Callable[[Any], Any]] = {"layer": layer_text, "depth": _depth_text}
    given = {key: getattr(where, key) for key in _CONDITIONS if getattr(where, key) is not None}
    return {key: texts[key](value) if key in texts else value for key, value in given.items()}


def _dumped(name: str, base: str | None, entries: list[dict[str, Any]]) -> str:
    import yaml

    values = {"name": name, **({} if base is None else {"base": base}), "rules": entries}
    text: str = yaml.safe_dump(values, sort_keys=False, default_flow_style=None, width=_WIDTH, allow_unicode=True)
    return text


def save(text: str, path: str | os.PathLike[str]) -> None:
    """Write a text to where it is found as a composite again; the file appears complete, or the old one stays.

    Raises:
        ValueError: for a file that would not be taken for one.
    """
    if not _has_suffix(path):
        raise ValueError(f"composites are read from files that end in {SUFFIXES}, got {str(path)!r}")
    temporary = Path(f"{path}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
