"""What keeps the tree readable: data flow one way, without circles, in files and functions that can be read in one sitting."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted((*(ROOT / "lrp_prune").rglob("*.py"), *(ROOT / "callbacks").rglob("*.py")))
LINES, LINES_OF_A_FUNCTION = 350, 60


def test_no_file_is_longer_than_can_be_read_at_once() -> None:
    long = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in FILES}
    assert len(long) > 150
    assert not {name: lines for name, lines in long.items() if lines > LINES}


@pytest.mark.slow
def test_no_function_is_longer_than_a_screen() -> None:
    """Without its signature and its docstring."""
    long = {}
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                body = node.body[ast.get_docstring(node) is not None :]
                lines = 1 + (body[-1].end_lineno or 0) - body[0].lineno if body else 0
                if lines > LINES_OF_A_FUNCTION:
                    long[f"{path.relative_to(ROOT)}: {node.name}"] = lines
    assert not long


def test_every_folder_is_installed() -> None:
    """A wheel has the packages that are listed; an editable install finds the others as well, so that nobody would see it."""
    project = (ROOT / "pyproject.toml").read_text().split("[tool.setuptools]")[1].split("]")[0]
    listed = set(re.findall(r'"(lrp_prune[\w.]*)"', project))
    folders = {".".join(path.relative_to(ROOT).parent.parts) for path in (ROOT / "lrp_prune").rglob("__init__.py")}
    assert listed == {*folders, "lrp_prune.callbacks"}
    assert folders == {".".join(path.relative_to(ROOT).parent.parts) for path in (ROOT / "lrp_prune").rglob("*.py")}


def test_imports_point_one_way() -> None:
    """By the contracts in pyproject.toml."""
    pytest.importorskip("importlinter")
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command as run; run()"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 kept, 0 broken" in done.stdout


@pytest.mark.slow
def test_nothing_below_them_uses_the_callbacks() -> None:
    """They are a folder of their own, which the contracts cannot see; the package alone imports them, when asked for them."""
    for path in (ROOT / "lrp_prune").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            imported = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            imported += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            assert not any(name.startswith("lrp_prune.callbacks") for name in imported), path


PRIVATE = {
    "lrp_prune/distributed/fsdp.py": {
        "_get_fsdp_state", "_fsdp_param_group", "_fsdp_param_groups", "fsdp_params", "_unsharded_param", "_param_fqn",
        "_is_root", "_partial_reduce_output", "reset_iter_state",
    },
    "lrp_prune/wrapper/internals.py": {
        "_metric_attributes", "_average_model", "_swap_models", "_MultiProcessingLauncher", "_has_run",
        "_on_before_batch_transfer", "_call_strategy_hook", "_DeviceDtypeModuleMixin",
    },
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("owner", PRIVATE)
def test_private_names_of_others_stand_in_one_file(owner: str) -> None:
    """Where a new version of torch or Lightning is looked at."""
    found: dict[str, set[str]] = {}
    for path in FILES:
        tree = ast.parse(path.read_text())
        names = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        names |= {
            node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)
        }
        names |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names}
        if names & PRIVATE[owner]:
            found[str(path.relative_to(ROOT))] = names & PRIVATE[owner]
    assert found == {owner: PRIVATE[owner]}


@pytest.mark.slow
def test_nothing_private_of_lightning_is_imported_elsewhere() -> None:
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lightning"):
                private = [alias.name for alias in node.names if alias.name.startswith("_")]
                assert not private or path.name == "internals.py", path
                assert "._" not in (node.module or ""), path
