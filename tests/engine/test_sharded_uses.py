"""Recurrent, reparametrized and unscored weights of models that ``fully_shard`` has divided."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lrp_prune
from lrp_prune.pruning import METHODS
from lrp_prune.relevance.unscored import DIVIDED, UNUSED, UnscoredWeightsWarning
from tests.support.sharding import sharded, together, whole

pytestmark = pytest.mark.processes


class Model(nn.Module):
    """An LSTM, a head, and a layer that is not used."""

    def __init__(self, normalized: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.recurrent = nn.Sequential(nn.LSTM(4, 6, batch_first=True, bidirectional=True))
        self.head, self.unused = nn.Linear(12, 3), nn.Linear(12, 5)
        if normalized:
            nn.utils.parametrizations.spectral_norm(self.head)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.head(self.recurrent(x)[0][:, -1])
        return result


def _batches(number: int) -> list[Any]:
    generator = torch.Generator().manual_seed(3)
    return [
        (torch.randn(2, 5, 4, generator=generator), torch.randint(3, (2,), generator=generator)) for _ in range(number)
    ]


def _own(mesh: Any) -> list[Any]:
    return _batches(4)[mesh.get_local_rank() :: mesh.size()]


def test_a_recurrent_model_with_an_unused_layer_is_pruned_as_in_one_process(tmp_path: Path) -> None:
    expected = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnscoredWeightsWarning)
        for method in METHODS:
            options: dict[str, Any] = {"method": method, "scope": "global", "matmul_dtype": None}
            expected[method] = lrp_prune.prune(Model(), _batches(4), sparsity=0.4, **options)
    relevance = lrp_prune.attribute(Model(), _batches(4), matmul_dtype=None)

    def check(mesh: Any) -> None:
        model = Model()
        model = sharded(model, mesh, [model.recurrent])
        found = lrp_prune.attribute(model, _own(mesh), matmul_dtype=None)
        assert found.unscored == relevance.unscored == {"unused.weight": UNUSED}
        for name in relevance:
            torch.testing.assert_close(whole(found[name]), relevance[name], rtol=1e-4, atol=1e-8)
        for method, reference in expected.items():
            model = Model()
            model = sharded(model, mesh, [model.recurrent])
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UnscoredWeightsWarning)
                options = {"method": method, "scope": "global", "matmul_dtype": None}
                masks = lrp_prune.prune(model, _own(mesh), sparsity=0.4, **options)
            assert masks.num_pruned == reference.num_pruned and masks.unscored == reference.unscored
            same = [int((whole(masks[name]) != reference[name]).sum()) for name in reference]
            assert sum(same) <= 2, method  # scores that tie within rounding
            assert masks.gathered().unscored == reference.unscored

    together(check, 2, tmp_path)


def test_reparametrized_weights_are_refused_where_they_are_divided(tmp_path: Path) -> None:
    def check(mesh: Any) -> None:
        model = Model(normalized=True)
        model = sharded(model, mesh, [model.recurrent])
        relevance = lrp_prune.attribute(model, _own(mesh), exclude=["unused"])
        assert relevance.unscored == {"head.parametrizations.weight.original": DIVIDED}
        for method in ("lrp", "magnitude"):
            with pytest.raises(ValueError, match="divided among processes, and computed with"):
                lrp_prune.prune(model, _own(mesh), method=method)

    together(check, 2, tmp_path)
