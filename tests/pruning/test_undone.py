"""Whatever fails while a model is pruned, and wherever: it is as it was."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lrp_prune
from lrp_prune.pruning import METHODS
from lrp_prune.pruning.recalibration import Recalibration


class OutOfLuckError(RuntimeError):
    pass


def model_and_batches() -> tuple[nn.Module, list[Any]]:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(12, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 4)
    )
    model.eval()
    return model, [(torch.randn(32, 12), torch.randint(4, (32,))) for _ in range(4)]


def failing_at(monkeypatch: pytest.MonkeyPatch, where: str, times: int) -> None:
    """Let the given number of in-place changes pass, and fail at the next."""
    left = [times]
    names = {"masks": ["mul_", "masked_fill_", "copy_"], "scales": ["mul_", "add_"]}[where]
    inside = [False]
    kind = {"masks": lrp_prune.Masks, "scales": Recalibration}[where]
    real_apply = kind.apply_

    def apply_(self: Any, model: nn.Module) -> None:
        inside[0] = True
        try:
            real_apply(self, model)
        finally:
            inside[0] = False

    monkeypatch.setattr(kind, "apply_", apply_)

    def breaking(real: Any) -> Any:
        def broken(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            if inside[0]:
                left[0] -= 1
                if left[0] < 0:
                    raise OutOfLuckError
            return real(tensor, *args, **kwargs)

        return broken

    for name in names:
        monkeypatch.setattr(Tensor, name, breaking(getattr(Tensor, name)))


@pytest.mark.parametrize("rounds", [1, 2])
@pytest.mark.parametrize(("where", "times"), [("masks", 0), ("masks", 1), ("scales", 0), ("scales", 2), ("scales", 5)])
def test_an_error_while_it_is_applied_changes_nothing(
    where: str, times: int, rounds: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batches = model_and_batches()
    before = copy.deepcopy(model.state_dict())
    lrp_prune.prune(copy.deepcopy(model), batches, 0.7, rounds=rounds, recalibrate=True)  # without the error it works
    failing_at(monkeypatch, where, times)
    with pytest.raises(OutOfLuckError):
        lrp_prune.prune(model, batches, 0.7, rounds=rounds, recalibrate=True)
    monkeypatch.undo()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("method", ["magnitude", "random"])
@pytest.mark.parametrize("kind", ["iterator", "list", "loader", "stream"])
def test_methods_that_need_no_data_ask_for_none(kind: str, method: str) -> None:
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self) -> Any:
            return iter(())

    empty = {
        "iterator": lambda: iter([]),
        "list": lambda: [],
        "loader": lambda: torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.zeros(0, 12)), 4),
        "stream": lambda: torch.utils.data.DataLoader(Stream(), 4),
    }[kind]
    for sparsity in (0.5, 0.8):  # 0.8: of two rounds, were there anything to recalibrate on
        model, _ = model_and_batches()
        other = copy.deepcopy(model)
        masks = lrp_prune.prune(model, empty(), sparsity, method)
        assert masks == lrp_prune.prune(other, (), sparsity, method)
        assert masks.sparsity == pytest.approx(sparsity, abs=1e-3)
        assert all(torch.equal(value, other.state_dict()[name]) for name, value in model.state_dict().items())
        with pytest.raises(ValueError, match="recalibrate=True needs batches"):
            lrp_prune.prune(model, empty(), sparsity, method, recalibrate=True)
    for needing in METHODS.keys() - {"magnitude", "random"}:
        with pytest.raises(ValueError, match="no batch"):
            lrp_prune.prune(model_and_batches()[0], empty(), 0.5, needing)


@pytest.mark.parametrize("wrong", ["yes", 1, 0, 0.5])
def test_whether_to_recalibrate_is_yes_no_or_left_open(wrong: Any) -> None:
    model, batches = model_and_batches()
    with pytest.raises(ValueError, match=f"recalibrate must be True, False, or None.*{wrong!r}"):
        lrp_prune.prune(model, batches, recalibrate=wrong)


def test_schedules_of_lists_are_followed() -> None:
    model, batches = model_and_batches()
    other = copy.deepcopy(model)
    masks = lrp_prune.prune(model, batches, 0.5, schedule=[0.2, 0.5], recalibrate=False)
    first = lrp_prune.prune(other, batches, 0.2, recalibrate=False)
    expected = lrp_prune.prune(other, batches, 0.5, existing=first, recalibrate=False)
    assert masks == expected and masks != lrp_prune.prune(model_and_batches()[0], batches, 0.5, recalibrate=False)
    for arguments, message in (
        ({"schedule": [0.2, 0.4]}, "ends at 0.4, and the sparsity to reach is 0.5"),
        ({"schedule": [0.2, 0.5], "rounds": 1}, "2 entries for rounds=1"),
        ({"schedule": lambda number: 0.5}, "pass rounds="),
        ({"schedule": "square"}, "schedule must be one of"),
        ({"schedule": "square", "rounds": 1}, "schedule must be one of"),
    ):
        with pytest.raises(ValueError, match=message):
            lrp_prune.prune(model_and_batches()[0], batches, 0.5, recalibrate=False, **arguments)
