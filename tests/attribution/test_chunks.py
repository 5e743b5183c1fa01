"""Weights collected some at a time have the relevance that they have at once."""

import pytest
import torch
from torch import nn

import lrp_prune
from lrp_prune.attribution.chunks import in_runs
from tests.support.small_models import batch_for, build

EXACT = {"matmul_dtype": None}


def _equal(first, second):
    assert list(first) == list(second)
    for name in first:
        assert torch.equal(first[name], second[name]), name


@pytest.mark.slow
@pytest.mark.parametrize("chunks", [2, 3, 1000])
@pytest.mark.parametrize(
    "options", [{}, {"statistic": "geometric", "composite": "epsilon"}, {"composite": "cp_lrp"}], ids=str
)
def test_same_as_at_once(options, chunks):
    model, batches = build("llama"), [batch_for("llama"), batch_for("llama")]
    at_once = lrp_prune.attribute(model, batches, **EXACT, **options)
    in_chunks = lrp_prune.attribute(model, batches, **EXACT, **options, chunks=chunks)
    _equal(at_once, in_chunks)
    assert in_chunks.num_samples == at_once.num_samples
    assert in_chunks.unscored == at_once.unscored


def test_each_pass_collects_a_part_and_parks_it(monkeypatch):
    from lrp_prune.attribution.observers import ObserverTable

    model, parked = build("llama"), []
    original = ObserverTable.park

    def park(self, names, device):
        held = {name for name, statistic in self._statistics.items() if statistic.sums is not None}
        parked.append((set(names), held))
        original(self, names, device)

    monkeypatch.setattr(ObserverTable, "park", park)
    lrp_prune.attribute(model, [batch_for("llama")], chunks=3)
    assert len(parked) == 3
    for index, (names, held) in enumerate(parked):
        assert held == set().union(*(earlier for earlier, _ in parked[: index + 1]))
        assert not names & set().union(*(earlier for earlier, _ in parked[:index]))


def test_an_included_embedding_is_in_one_pass():
    model, options = build("llama"), {"include": ["*embed_tokens*", "*mlp*"], **EXACT}
    batches = [batch_for("llama")]
    _equal(lrp_prune.attribute(model, batches, **options), lrp_prune.attribute(model, batches, chunks=3, **options))


@pytest.mark.slow
def test_pruned_alike():
    first, second = build("llama"), build("llama")
    second.load_state_dict(first.state_dict())
    batches = [batch_for("llama")]
    masks = lrp_prune.prune(first, batches, 0.5, **EXACT)
    assert lrp_prune.prune(second, batches, 0.5, chunks=4, **EXACT) == masks
    assert lrp_prune.prune(second, sparsity=0.6, method="magnitude", chunks=4).sparsity == pytest.approx(0.6, abs=1e-3)


def test_chunks_are_balanced_and_in_order():
    sizes = {f"layer{index}": torch.empty(10 * (1 + index % 3)) for index in range(30)}
    parts = in_runs(sizes, 4)
    assert [name for part in parts for name in sizes if name in part] == list(sizes)
    held = [sum(sizes[name].numel() for name in part) for part in parts]
    assert max(held) - min(held) <= 60
    assert in_runs({"only": torch.empty(3)}, 5) == [{"only"}]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"chunks": 0}, "chunks must be a whole number of at least 1, got 0"),
        ({"chunks": 2, "granularity": "neuron"}, "about neurons"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        lrp_prune.attribute(build("llama"), [batch_for("llama")], **arguments)


def test_batches_that_end():
    model, batch = nn.Linear(3, 2), (torch.randn(4, 3), torch.randint(2, (4,)))
    with pytest.raises(ValueError, match="can be gone through once: pass a list or a loader"):
        lrp_prune.attribute(model, iter([batch]), chunks=2)

    class Shrinking:
        def __init__(self):
            self.left = 3

        def __iter__(self):
            self.left -= 1
            return iter([batch] * self.left)

    with pytest.raises(ValueError, match="held 8 samples when they were gone through first, and 4 later"):
        lrp_prune.attribute(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2)), Shrinking(), target="class", chunks=2)
