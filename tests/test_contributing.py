"""What CONTRIBUTING.md shows runs, and the files and names that it sends people to are there."""

import re
from pathlib import Path
from typing import Any

import torch
from torch import nn

import lrp_prune
from lrp_prune.attribution import RULES
from lrp_prune.relevance.statistics import STATISTICS
from tests.support.circuit_tasks import numbers

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "CONTRIBUTING.md").read_text()


def _section(title: str) -> dict[str, Any]:
    """The names that the code of a section makes."""
    (section,) = re.findall(rf"^## {title}$(.*?)(?=^## |\Z)", TEXT, re.MULTILINE | re.DOTALL)
    scope: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", section, re.DOTALL):
        exec(block, scope)
    assert len(scope) > 1, f"{title} shows no code"
    return scope


def test_the_rule_gives_weights_its_relevance() -> None:
    composite = _section("A rule for an operation")["composite"]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(1, 2, 9, bias=False), nn.Flatten()).double()
    x = torch.randn(1, 1, 9, dtype=torch.float64)
    relevance = lrp_prune.attribute(
        model, [x], lambda m, b: m(b).square().sum() / 2, composite, "signed", include=["*"], matmul_dtype=None
    )
    z = model(x).detach().view(2, 1)
    contributions = x[0] * model[0].weight.detach()[:, 0]
    positive = contributions.clamp(min=0)
    expected = positive / positive.sum(1, keepdim=True) * z.square()
    torch.testing.assert_close(relevance["0.weight"][:, 0].double(), expected, rtol=1e-5, atol=1e-7)


def test_the_statistic_is_taken() -> None:
    assert _section("A statistic")["relevance"].statistic == "cubed_token"


def test_the_task_makes_prompts() -> None:
    task = _section("A task")["Successor"](numbers, range(1, 4))
    assert [sample.clean for sample in task.samples] == [(1, 2, 3), (2, 3, 4), (3, 4, 5)]
    assert [sample.answers + sample.distractors for sample in task.samples] == [(4, 13), (5, 14), (6, 15)]
    train, held_out = (set(part.starts) for part in task.split(1 / 3))
    assert train | held_out == {1, 2, 3} and not train & held_out


def test_what_is_referred_to_is_there() -> None:
    paths = re.findall(r"`((?:lrp_prune|tests)/[\w/.]+)`", TEXT)
    assert len(paths) >= 5
    assert [path for path in paths if not (ROOT / path).exists()] == []
    assert "gamma" in RULES and "signed" in STATISTICS
