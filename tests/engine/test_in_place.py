"""Methods that work in place write into their own tensor, whatever their operands are, and explain as their twins do."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import lrp_prune
from lrp_prune.engine.operations import OPERATIONS

Write = Callable[["Writing", str, Tensor, Tensor], Tensor]


class Writing(nn.Module):
    """Layers with a function between, which gets parameters of many shapes."""

    def __init__(self, name: str, write: Write) -> None:
        super().__init__()
        self.rows, self.vector = nn.Parameter(torch.randn(3, 8)), nn.Parameter(torch.randn(8))
        self.few, self.square = nn.Parameter(torch.randn(3)), nn.Parameter(torch.randn(8, 8))
        self.batch = nn.Parameter(torch.randn(2, 3, 8))
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 3)
        self.name, self.write = name, write

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.last(self.write(self, self.name, self.first(x), x))
        return result


WRITES: dict[str, tuple[str, Write]] = {
    "addcmul": ("addcmul", lambda model, name, h, x: getattr(h, name)(model.rows, x)),
    "addcmul by name": ("addcmul", lambda model, name, h, x: getattr(h, name)(tensor1=h, tensor2=model.rows)),
    "addcmul of parameters": ("addcmul", lambda model, name, h, x: getattr(h, name)(model.rows, model.rows)),
    "addcmul to a constant": ("addcmul", lambda model, name, h, x: getattr(model.rows.clone(), name)(h, model.rows)),
    "addcdiv": ("addcdiv", lambda model, name, h, x: getattr(h, name)(model.rows, x * x + 1)),
    "addcdiv to a constant": ("addcdiv", lambda model, name, h, x: getattr(model.rows.clone(), name)(h, x * x + 1)),
    "lerp to a constant": ("lerp", lambda model, name, h, x: getattr(model.rows.clone(), name)(h, 0.3)),
    "addmm": ("addmm", lambda model, name, h, x: getattr(h, name)(x, model.square)),
    "addmm of another shape": ("addmm", lambda model, name, h, x: getattr(h, name)(model.rows[:, :3], x)),
    "addmm of parameters": ("addmm", lambda model, name, h, x: getattr(h, name)(model.rows, model.square)),
    "addmv": ("addmv", lambda model, name, h, x: getattr(h.mean(-1), name)(x, model.vector)[:, None] + h),
    "addr": ("addr", lambda model, name, h, x: getattr(h, name)(model.few, x.mean(0))),
    "addbmm": ("addbmm", lambda model, name, h, x: getattr(h, name)(model.batch, x.new_ones(2, 8, 8) * x.sum())),
    "baddbmm": (
        "baddbmm",
        lambda model, name, h, x: getattr(h.expand(2, 3, 8).clone(), name)(
            model.batch, x[:1, :, None].expand(2, 8, 8)
        ).sum(0),
    ),
}


def explained(name: str, write: Write) -> tuple[Tensor, dict[str, float]]:
    torch.manual_seed(0)
    model, x = Writing(name, write), torch.randn(3, 8)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    own = model(x)
    with lrp_prune.attributing(model, unruled="error") as propagation:
        output = model(x)
        relevance = propagation.relevance(output.sum())
    assert torch.equal(output, own)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    return output, {root: float(value.sum()) for root, value in relevance.items()}


@pytest.mark.parametrize("case", WRITES)
def test_values_parameters_and_relevance_are_those_of_the_twin(case: str) -> None:
    name, write = WRITES[case]
    output, relevance = explained(name, write)
    in_place, of_in_place = explained(f"{name}_", write)
    torch.testing.assert_close(in_place, output)
    assert relevance["x"] != 0
    assert sorted(of_in_place.values()) == pytest.approx(sorted(relevance.values()), rel=1e-5)


def test_no_method_is_left_out() -> None:
    """Of those whose first operand is not what they write into."""
    found = {
        operation.functional.__name__
        for operation in OPERATIONS.values()
        if operation.functional is not None and operation.operands[:1] != ((0, operation.operands[0][1]),)
    }
    assert found <= {name for name, _ in WRITES.values()}
