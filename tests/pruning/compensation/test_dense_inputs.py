"""What a stage's layers get in the dense model comes from one run of it, as far as there is room, and is the same in any case."""

import copy

import pytest
import torch
from torch import Tensor, nn

import lrp_prune
from lrp_prune.pruning import LeastSquares, scorer
from lrp_prune.pruning.compensation import compensate_
from lrp_prune.pruning.compensation.inputs import DenseInputs
from lrp_prune.pruning.places import Place
from tests.support.compensation import AddedTwice, half, mlp
from tests.support.small_models import batch_for, build


@pytest.mark.parametrize("name", ["mlp", "bert", "mixtral", "cnn"])
def test_what_does_not_fit_is_computed_again_and_comes_to_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    if name == "cnn":
        model = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 1, groups=2), nn.Flatten(), nn.Linear(8 * 36, 4)
        ).eval()  # fmt: skip
        batches = [torch.randn(12, 3, 6, 6) for _ in range(3)]
    else:
        model, batches = mlp() if name == "mlp" else (build(name), [batch_for(name, 4, 12) for _ in range(3)])
    masks = lrp_prune.select(scorer("random", model).compute(), 0.5, scope="layer")
    found, dropped = [], []
    before = DenseInputs.taken

    def taken(inputs: DenseInputs, batch: int, place: Place, device: torch.device) -> list[list[Tensor]] | None:
        rows = before(inputs, batch, place, device)
        dropped.append(rows is None)
        return rows

    monkeypatch.setattr(DenseInputs, "taken", taken)
    for room in (1 << 30, 3 * 4000, 0):
        monkeypatch.setattr("lrp_prune.pruning.compensation.reading.ROOM", room)
        mine = copy.deepcopy(model)
        dropped.clear()
        compensate_(mine, masks, batches, LeastSquares())
        found.append(mine)
        some = any(dropped), all(dropped)
        # Where a stage has several layers, those that fit are kept.
        assert some == {1 << 30: (False, False), 0: (True, True)}.get(room, (True, name in ("mlp", "cnn")))
    for other in found[1:]:
        for ours, theirs in zip(found[0].parameters(), other.parameters(), strict=True):
            assert torch.equal(ours, theirs)


def test_the_dense_model_is_run_once_for_each_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(AddedTwice(False), AddedTwice(False))
    runs = list[int]()
    masks = half(model, ["0.a.weight", "0.b.weight", "1.a.weight"])
    for room in (1 << 30, 0):
        monkeypatch.setattr("lrp_prune.pruning.compensation.reading.ROOM", room)
        runs.append(0)
        mine = copy.deepcopy(model)
        mine[0].a.register_forward_pre_hook(lambda *_: runs.__setitem__(-1, runs[-1] + 1))
        compensate_(mine, masks, [torch.randn(64, 8)], LeastSquares())
    assert runs == [7, 9]  # and not once more for the inputs of each layer
