"""What importing the package does, and does not do."""

import subprocess
import sys
from pathlib import Path

import pytest

import lrp_prune


def _python(code: str, where: Path) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=where, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.slow
def test_the_engine_needs_neither_lightning_nor_transformers(tmp_path: Path) -> None:
    code = "import sys, lrp_prune; print([name for name in ('lightning', 'transformers', 'datasets') if name in sys.modules])"
    assert _python(code, tmp_path) == "[]"


@pytest.mark.slow
def test_the_callbacks_are_imported_from_the_package_only(tmp_path: Path) -> None:
    code = "import lrp_prune.callbacks as c; import importlib.util as u; print(c.__name__, u.find_spec('callbacks'))"
    assert _python(code, tmp_path) == "lrp_prune.callbacks None"


def test_every_public_name_exists() -> None:
    for name in lrp_prune.__all__:
        assert getattr(lrp_prune, name).__doc__, name


def test_the_package_is_typed() -> None:
    assert lrp_prune.__file__ is not None
    assert (Path(lrp_prune.__file__).parent / "py.typed").exists()


@pytest.mark.slow
def test_parts_of_the_package_are_there_without_being_imported(tmp_path: Path) -> None:
    names = ("attribution", "callbacks", "circuits", "correction", "metrics", "pruning", "tasks")
    for name in names:
        code = f"import lrp_prune; print(lrp_prune.{name}.__name__, {name!r} in dir(lrp_prune))"
        assert _python(code, tmp_path) == f"lrp_prune.{name} True"
    code = "import lrp_prune; print({'CorrectedModule', 'prune'} <= set(dir(lrp_prune)), hasattr(lrp_prune, 'nothing'))"
    assert _python(code, tmp_path) == "True False"
