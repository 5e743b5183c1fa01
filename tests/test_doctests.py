"""Runs the examples in the docstrings of both packages, under the names that users import."""

import doctest
import importlib
import pkgutil
from collections.abc import Iterator

import pytest

import lrp_prune
import lrp_prune.callbacks


def module_names() -> Iterator[str]:
    for package in (lrp_prune, lrp_prune.callbacks):
        yield package.__name__
        for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
            yield module.name


@pytest.mark.parametrize("name", sorted(set(module_names())))
def test_examples_in_docstrings(name: str) -> None:
    options = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    result = doctest.testmod(importlib.import_module(name), optionflags=options)
    assert not result.failed


def test_the_public_functions_have_examples() -> None:
    finder = doctest.DocTestFinder(recurse=False)
    for name in ("attribute", "attributing", "select", "prune", "Masks", "Relevance"):
        (test,) = finder.find(getattr(lrp_prune, name), name)
        assert test.examples, f"lrp_prune.{name} has no example"
