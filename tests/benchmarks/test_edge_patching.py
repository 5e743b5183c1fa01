"""The plain edge attribution patching is right, and gate training keeps less in memory than it."""

import pytest
import torch

from lrp_prune import circuits
from lrp_prune.tasks.metrics import batch_metric
from lrp_prune.tasks.task import answer_logits
from tests.benchmarks import edge_patching
from tests.support.circuit_tasks import small_task
from tests.support.small_models import build


def unchanged(name: str, tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def test_copies_for_each_reader_change_nothing() -> None:
    model = build("llama")
    for batch in small_task().batches():
        with torch.no_grad():
            logits = edge_patching.edge_ready(model, batch["input_ids"], unchanged, unchanged)
            torch.testing.assert_close(logits, answer_logits(model, batch), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("reader", ["a1.q", "a1.v", "m0", "m1", "logits"])
def test_an_edge_scores_the_slope_of_patching_it(reader: str) -> None:
    model = build("llama").double()
    batch = small_task().batches()[0]
    scores = edge_patching.edge_scores(model, batch)[reader]
    outputs: list[dict[str, torch.Tensor]] = []
    for ids in (batch["input_ids"], batch["counterfactual_ids"]):
        outputs.append({})
        noted = outputs[-1]

        def wrote(name: str, written: torch.Tensor, noted: dict[str, torch.Tensor] = noted) -> torch.Tensor:
            noted[name] = written
            return written

        with torch.no_grad():
            edge_patching.edge_ready(model, ids, wrote, unchanged)
    # The second head of the first layer is the third writer: the embeddings are the first.
    difference = (outputs[1]["a0"] - outputs[0]["a0"])[:, :, 1].detach()
    share = torch.zeros((), dtype=torch.float64, requires_grad=True)

    def patched(name: str, copy: torch.Tensor) -> torch.Tensor:
        if name != reader:
            return copy
        return copy + share * (difference[:, :, None] if copy.dim() == 4 else difference)

    with torch.enable_grad():
        logits = edge_patching.edge_ready(model, batch["input_ids"], unchanged, patched)
        value = batch_metric("logit_difference", logits, batch).sum()
    (slope,) = torch.autograd.grad(value, share)
    torch.testing.assert_close(scores[2].sum(), slope, rtol=1e-6, atol=1e-10)


def test_live_bytes_are_those_of_the_tensors() -> None:
    def action() -> None:
        first = torch.zeros(1000)
        second = torch.zeros(3000)
        del first
        torch.zeros(500)
        del second

    assert 16_000 <= edge_patching.peak_bytes(action) < 16_500


def test_gate_training_keeps_less_than_edges_do() -> None:
    model, task = build("llama"), small_task()
    model.requires_grad_(False)
    batch = task.batches()[0]
    gates = circuits.GateTraining(model, task, density=0.5)
    for action in (edge_patching.edge_scores, lambda model, batch: edge_patching.gate_step(gates, batch)):
        action(model, batch)
    edges = edge_patching.peak_bytes(lambda: edge_patching.edge_scores(model, batch))
    ours = edge_patching.peak_bytes(lambda: edge_patching.gate_step(gates, batch))
    assert edges > 1.5 * ours, (edges, ours)
