"""Reads the docstrings for the pages: what help() and doctest read stays plain, and the pages get links, formulas and code."""

import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import griffe
from latex2mathml.converter import convert

_ROLE = re.compile(r":(?P<role>[a-z]+):`(?P<name>[^`]+)`")
_DISPLAYED = re.compile(
    r"^(?P<indent> *)\.\. math::(?P<first>.*)\n(?P<rest>(?:(?P=indent) +\S.*\n|\s*\n)*)", re.MULTILINE
)
_LITERAL = re.compile(r"^(?P<indent> *)Example::\n\n(?P<code>(?:(?P=indent) +\S.*(?:\n|$)|\s*\n)+)", re.MULTILINE)
_EXAMPLE = re.compile(r"^( *)Example:$", re.MULTILINE)
_SEVERAL = re.compile(r"^ {4}(?P<names>\w+(?:,\s+\w+)+):(?P<text> .*(?:\n {6,}\S.*)*)$", re.MULTILINE)
_RETURNED = re.compile(r"^(?:Returns|Yields):\n(?: {4}.*\n?|\s*\n)+", re.MULTILINE)
_COLON = re.compile(r"(`[^`]*`)|: ")
_PUBLIC = {
    "prune": "lrp_prune.pruning.prune.prune",
    "select": "lrp_prune.pruning.select.select",
    "compare": "lrp_prune.pruning.comparing.compare",
    "Shrunk": "lrp_prune.shrinking.report.Shrunk",
    "load_shrunk": "lrp_prune.shrinking.files.load_shrunk",
    "shrink": "lrp_prune.shrinking.shrink.shrink",
    "Comparison": "lrp_prune.pruning.comparison.Comparison",
    "pruning_curve": "lrp_prune.pruning.curve.pruning_curve",
    "SearchSpace": "lrp_prune.search.space.SearchSpace",
    "search_composite": "lrp_prune.search.searching.search_composite",
    "reconstruct": "lrp_prune.reconstruction.reconstruct.reconstruct",
    "CorrectedModule": "lrp_prune.wrapper.module.CorrectedModule",
    "circuits.GateTraining": "lrp_prune.circuits.gates.GateTraining",
    "circuits.save_report": "lrp_prune.circuits.report.save_report",
}
"""Public name -> where it is, of what is imported when it is asked for, and of functions in a module of the same name."""


class Docstrings(griffe.Extension):
    """Translates roles, formulas and examples of docstrings to Markdown, and puts the callbacks where they are installed."""

    def on_package(self, *, pkg: griffe.Module, loader: griffe.GriffeLoader, **_: Any) -> None:
        if pkg.name != "lrp_prune":
            return
        if "callbacks" not in pkg.members:  # a folder beside the package, installed as a part of it
            finder = griffe.GriffeLoader(
                search_paths=[Path(__file__).parent.parent],
                docstring_parser=loader.docstring_parser,
                docstring_options=loader.docstring_options,
                modules_collection=loader.modules_collection,
                lines_collection=loader.lines_collection,
            )
            pkg.set_member("callbacks", finder.load("callbacks"))
        for public, defined in _PUBLIC.items():
            parent, name = pkg, public
            if "." in public:
                part, name = public.split(".")
                parent = pkg[part]
            parent.set_member(name, griffe.Alias(name, defined))
        known = {name: f"{pkg.name}.{name}" for name in pkg.exports or ()}
        known.update({f"{pkg.name}.{name}": f"{pkg.name}.{name}" for name in known})
        known.update(_shadowed(pkg))
        _translate(pkg, known)


def _shadowed(found: griffe.Object) -> dict[str, str]:
    """Functions that a package gives the name of their module: what they are called -> where they are."""
    names = {}
    for name, member in found.members.items():
        if member.is_alias or not member.is_module:
            continue
        if name in member.members:
            names[member.path] = f"{member.path}.{name}"
        names.update(_shadowed(member))
    return names


def _translate(found: griffe.Object, known: Mapping[str, str]) -> None:
    if found.docstring is not None:
        found.docstring.value = markdown(found.docstring.value, known)
    for member in found.members.values():
        if not member.is_alias:
            _translate(member, known)


def markdown(text: str, known: Mapping[str, str]) -> str:
    """A docstring as the pages take it.

    Args:
        text: the docstring.
        known: what something is called in docstrings -> the path by which it is on a page, where that is another.
    """
    text = _SEVERAL.sub(_each, text)
    # What is before a colon in what is returned would be taken for its type.
    text = _RETURNED.sub(lambda section: _COLON.sub(lambda colon: colon[1] or "&#58; ", section[0]), text)
    text = _DISPLAYED.sub(_displayed, text)
    text = _LITERAL.sub(_fenced, text)
    text = _EXAMPLE.sub(r"\1Examples:", text)
    return _ROLE.sub(partial(_role, known=known), text)


def _each(found: re.Match[str]) -> str:
    """Arguments that share an entry get one each, with their own types."""
    return "\n".join(f"    {name}:{found['text']}" for name in re.split(r",\s+", found["names"]))


def _displayed(found: re.Match[str]) -> str:
    formula = " ".join(f"{found['first']} {found['rest']}".split())
    return f"{found['indent']}{convert(formula, display='block')}\n\n"


def _fenced(found: re.Match[str]) -> str:
    code = [line.rstrip() for line in found["code"].strip("\n").split("\n")]
    fence = f"{found['indent']}    ```"
    return "\n".join([f"{found['indent']}Examples:", f"{fence}python", *code, fence, "", ""])


def _role(found: re.Match[str], known: Mapping[str, str]) -> str:
    name = " ".join(found["name"].split())
    if found["role"] == "math":
        return convert(name)
    shown = name.rsplit(".", 1)[-1] if name.startswith("~") else name
    name = name.removeprefix("~")
    path = known.get(name, name)
    if not path.startswith("lrp_prune."):
        return f"`{shown}`"
    return f'<autoref identifier="{path}" optional><code>{shown}</code></autoref>'
