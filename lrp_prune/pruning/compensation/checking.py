"""Whether stages are made of what others give, as they have to be for what these gave to stand in for them.

A stage may read what another leaves behind beside its outputs: an attribute, an object that both write into. Standing in for
the other, its outputs would leave that as it was, and the stage would be compensated for inputs that it never gets.
"""

from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lrp_prune.engine.call import Call
from lrp_prune.engine.uses import Product
from lrp_prune.pruning.compensation.partial_runs import PartialRuns
from lrp_prune.pruning.compensation.stages import Given, Kept
from lrp_prune.pruning.processes import Processes
from lrp_prune.pruning.products import ComputedUses

_BATCHES = 2
"""How many batches it is looked at with."""
_PLAIN = (Kept, int, float, complex, str, bytes, type(None))
"""What a stage may give that nobody writes into."""


_Inputs = list[tuple[str, float]]
"""What a stage's layers get, product by product: the weight's name and how large the input is."""


class _Noted(ComputedUses):
    """Notes what layers get, for each stage that runs.

    Args:
        stages: which to look at.
    """

    def __init__(self, stages: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self._stages, self._running = stages, list[str]()
        self.inputs: dict[str, _Inputs] = {name: [] for name in stages}

    @contextmanager
    def watching(self) -> Iterator[None]:
        """The time of one forward."""
        with ExitStack() as stack:
            for name, stage in self._stages.items():
                stack.callback(stage.register_forward_pre_hook(partial(self._enter, name)).remove)
                stack.callback(stage.register_forward_hook(self._leave, prepend=True).remove)
            yield

    def _enter(self, name: str, *_: Any) -> None:
        self._running.append(name)

    def _leave(self, *_: Any) -> None:
        self._running.pop()

    def _made(self, call: Call, found: Product, result: Tensor) -> None:
        x = found.activation.detach()
        size = float(torch.linalg.vector_norm(x, dtype=torch.promote_types(x.dtype, torch.float32)))
        for name in self._running:
            self.inputs[name].append((found.origin.name, size))


def not_reproduced(
    runs: PartialRuns, stages: Mapping[str, nn.Module], needed: Mapping[str, Collection[str]], processes: Processes
) -> list[str]:
    """The stages whose layers get something else where the outputs of those before them stand in for these.

    Of a model that gives something else each time it is run, none can be told.

    Args:
        runs: of the model, as it is; its first two batches are taken, so that what one leaves behind is found by the other.
        stages: in the order of execution.
        needed: for each stage those whose outputs it is made of.
        processes: those that do this together, who all find what one of them finds.
    """
    with processes.agreeing():
        expected = [_whole(runs, index, stages) for index in range(min(len(runs.batches), _BATCHES))]
    given, wrong = Given(stages, needed, "cpu"), list[str]()
    for name, stage in stages.items():
        with processes.agreeing():
            outputs = [_run_alike(runs, index, name, stage, given, whole[name]) for index, whole in enumerate(expected)]
        if all(processes.gathered(all(outputs))):
            given.keep(name, [output[0] for output in outputs if output is not None])
        else:
            wrong.append(name)
    with processes.agreeing():
        again = _whole(runs, 0, stages) if wrong else expected[0]
    return wrong if all(processes.gathered(all(_alike(again[name], expected[0][name]) for name in stages))) else []


def _run_alike(
    runs: PartialRuns, index: int, name: str, stage: nn.Module, given: Given, expected: _Inputs
) -> tuple[Any] | None:  # fmt: skip
    """What a stage gives; None if its layers do not get, at each time that it is run, what they got."""
    output: Any = None
    for again in (False, True):
        noted = _Noted({name: stage})
        try:
            with noted.watching():
                output = runs.run(index, stage, given, noted)
        except torch.OutOfMemoryError:
            raise
        except Exception:  # what is not there ends in an error of any kind, which the model as it is has not
            return None
        if not _alike(noted.inputs[name], expected):
            return None
        if again or all(isinstance(leaf, _PLAIN) for leaf in tree_leaves(output)):
            break  # else it hands on an object, into which those behind it may have written by the second time
    return (output,)


def _whole(runs: PartialRuns, index: int, stages: Mapping[str, nn.Module]) -> dict[str, _Inputs]:
    """What the layers of all stages get where none stands in for another; what comes behind the last one is not run."""
    noted = _Noted(stages)
    if stages:
        with noted.watching():
            runs.run(index, list(stages.values())[-1], Given(stages, {name: () for name in stages}, "cpu"), noted)
    return noted.inputs


def _alike(found: _Inputs, expected: _Inputs) -> bool:
    if [name for name, _ in found] != [name for name, _ in expected]:
        return False
    pairs = ((ours, theirs) for (_, ours), (_, theirs) in zip(found, expected, strict=True))
    return all(abs(ours - theirs) <= _CLOSE * abs(theirs) for ours, theirs in pairs)


_CLOSE = 1e-4
"""How much the sizes of inputs may differ, as a share: what stands in was computed in the same way."""
