"""What a pass made is gone as soon as nothing uses it: no circle keeps tensors until Python happens to look for circles."""

import copy
import gc
from collections.abc import Callable
from typing import Any

import pytest
from torch import Tensor, nn

import lrp_prune
from lrp_prune import circuits
from tests.support.circuit_tasks import small_task
from tests.support.small_models import batch_for, build, forward

pytestmark = pytest.mark.slow

Batch = dict[str, Tensor]


def _target(model: nn.Module, batch: Batch) -> Tensor:
    return forward(model, batch).amax(-1).sum()


def _attribute(model: nn.Module, batch: Batch) -> Any:
    return lrp_prune.attribute(model, [batch, batch], target=_target)


def _units(model: nn.Module, batch: Batch) -> Any:
    return lrp_prune.attribute(model, [batch], granularity=["neuron", "head", "block"], target=_target)


def _prune(model: nn.Module, batch: Batch) -> Any:
    return lrp_prune.prune(model, [batch] * 4, sparsity=0.5, method=lrp_prune.LRP(target=_target), recalibrate=True)


def _wanda(model: nn.Module, batch: Batch) -> Any:
    return lrp_prune.prune(model, [batch] * 4, sparsity=0.5, method="wanda", recalibrate=True)


def _estimate(model: nn.Module, batch: Batch) -> Any:
    return lrp_prune.estimate(model, batch=(2, 7))


def _compare(model: nn.Module, batch: Batch) -> Any:
    def evaluate(model: nn.Module) -> float:
        return float(_target(model, batch))

    methods = [lrp_prune.Gradient(target=_target), "wanda"]
    return lrp_prune.compare(model, [batch] * 4, evaluate, methods=methods, sparsities=[0.5])


def kept_alive(function: Callable[[], Any]) -> list[Tensor]:
    """The tensors that are reachable from circles only, once a function's result is gone."""
    gc.collect()
    gc.disable()
    try:
        function()
        before = len(gc.garbage)
        gc.set_debug(gc.DEBUG_SAVEALL)
        gc.collect()
        return [found for found in gc.garbage[before:] if issubclass(type(found), Tensor)]
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()


EVERYWHERE = [(what, name) for what in (_attribute, _units, _prune) for name in ("llama", "bert", "mixtral", "resnet")]


@pytest.mark.parametrize("what, architecture", [*EVERYWHERE, (_wanda, "t5"), (_compare, "vit"), (_estimate, "llama")])
def test_nothing_waits_for_the_search_for_circles(architecture, what):
    model, batch = build(architecture), batch_for(architecture)
    what(copy.deepcopy(model), batch)  # what is made once and kept
    model = model.eval()
    assert not [tuple(tensor.shape) for tensor in kept_alive(lambda: what(model, batch))]


@pytest.mark.parametrize("method", ["attnlrp", "gate_ig", "attribution_patching", "activation", "wanda"])
def test_nothing_of_a_circuit_waits_either(method):
    model, task = build("llama").eval(), small_task()

    def found() -> Any:
        ranking = circuits.discover(model, task, ["neuron", "head"], method, rounds=2)
        return circuits.evaluate(model, ranking, task, [0.5])

    found()
    assert not [tuple(tensor.shape) for tensor in kept_alive(found)]
