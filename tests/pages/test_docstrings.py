"""How the pages read the docstrings."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

pytest.importorskip("griffe")
pytest.importorskip("latex2mathml")


@pytest.fixture(scope="module")
def docstrings() -> ModuleType:
    path = Path(__file__).parents[2] / "docs" / "docstrings.py"
    spec = importlib.util.spec_from_file_location("docstrings", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_roles_are_links_by_the_path_that_is_on_a_page(docstrings):
    known = {"select": "lrp_prune.select", "lrp_prune.circuits.discover": "lrp_prune.circuits.discover.discover"}
    text = "See :func:`select`, :func:`~lrp_prune.circuits.discover` and :meth:`apply_`."
    made = docstrings.markdown(text, known)
    assert 'identifier="lrp_prune.select" optional><code>select</code>' in made
    assert 'identifier="lrp_prune.circuits.discover.discover" optional><code>discover</code>' in made
    assert made.endswith("and `apply_`.")


def test_formulas_are_mathml(docstrings):
    made = docstrings.markdown("Of :math:`x_i`:\n\n.. math:: y = x^2\n\nas said.", {})
    assert made.count("<math") == 2 and ".. math" not in made and ":math:" not in made
    assert '<math xmlns="http://www.w3.org/1998/Math/MathML" display="block">' in made and made.endswith("as said.")


def test_arguments_of_one_meaning_have_an_entry_each(docstrings):
    made = docstrings.markdown("Args:\n    one: first.\n    two, three,\n        four: as\n        said.\n", {})
    assert (
        made
        == "Args:\n    one: first.\n    two: as\n        said.\n    three: as\n        said.\n    four: as\n        said.\n"
    )


def test_examples_are_code(docstrings):
    made = docstrings.markdown("Example::\n\n    x = 1\n\n    y = 2\n\nArgs:\n    x: one.", {})
    assert made == "Examples:\n    ```python\n    x = 1\n\n    y = 2\n    ```\n\nArgs:\n    x: one."
    assert docstrings.markdown("Example:\n    >>> 1\n    1", {}) == "Examples:\n    >>> 1\n    1"


def test_the_first_words_of_what_is_returned_are_not_its_type(docstrings):
    made = docstrings.markdown("Returns:\n    The masks: all of `a: b`.\n\nRaises:\n    ValueError: if not.\n", {})
    assert made == "Returns:\n    The masks&#58; all of `a: b`.\n\nRaises:\n    ValueError: if not.\n"
