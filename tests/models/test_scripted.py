"""What torch.jit has compiled is refused by name, before anything runs."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import lrp_prune

BATCH = torch.randn(5, 4), torch.randint(0, 3, (5,))


def scripted(module: nn.Module) -> Any:
    return torch.jit.script(module)


def traced(module: nn.Module) -> Any:
    return torch.jit.trace(module, torch.randn(2, 8))


@pytest.mark.filterwarnings("ignore:.*torch.jit")
@pytest.mark.parametrize("compiled", [scripted, traced])
@pytest.mark.parametrize(
    "call",
    [
        lambda model: lrp_prune.attribute(model, [BATCH]),
        lambda model: lrp_prune.prune(model, [BATCH], 0.5),
        lambda model: lrp_prune.prune(model, [BATCH], 0.5, "magnitude"),
        lambda model: lrp_prune.explain(model, BATCH[0]),
    ],
    ids=["attribute", "prune", "magnitude", "explain"],
)
def test_a_part_is_refused_by_name(compiled: Callable[[nn.Module], Any], call: Callable[[nn.Module], Any]) -> None:
    model = nn.Sequential(nn.Linear(4, 8), compiled(nn.Sequential(nn.Linear(8, 8), nn.ReLU())), nn.Linear(8, 3))
    with pytest.raises(ValueError, match=r"^1 is compiled by torch\.jit, which hides its operations from rules"):
        call(model)


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_a_model_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^the model is compiled by torch\.jit"):
        lrp_prune.attribute(scripted(nn.Linear(4, 3)), [BATCH])
    with pytest.raises(ValueError, match=r"^the model is compiled by torch\.jit"):
        lrp_prune.prune(scripted(nn.Linear(4, 3)), [BATCH], 0.5, "magnitude")
