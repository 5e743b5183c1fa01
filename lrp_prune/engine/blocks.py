"""Blocks: layers that write onto a residual stream, found where what they write is added to what they were made of."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lrp_prune.engine.facts import Fact
from lrp_prune.engine.operations import channels_of
from lrp_prune.engine.origins import marked
from lrp_prune.engine.shadow import Call
from lrp_prune.engine.shadows import keeps_zero

_SUMMING = frozenset("add sub subtract".split())
_LAYERS = ("_Observed", "_Ruled", "Convolution", "Addmm", "Mm", "Linear")
_FAR = 4096
"""Nodes of the graph that are looked at in search of the stream."""


Written = Mapping[tuple[str, int], frozenset[str]]
"""By which weight, and at which of its uses, a tensor was written, and what else has to be zero for that to be zero."""


class Blocks:
    """Follows what layers write until it is added to a stream."""

    def __init__(self) -> None:
        self._found: dict[str, frozenset[str]] = {}
        self._uses = Counter[str]()
        self._elsewhere: dict[str, set[int]] = {}
        """Of each weight the uses that have written what was not added to a stream, so far."""
        self._lost: dict[str, str] = {}
        self._mixed: dict[str, str] = {}

    @property
    def found(self) -> dict[str, frozenset[str]]:
        """The weight of each layer that writes onto a residual stream, and the other parameters that the block owns."""
        return {name: others for name, others in self._found.items() if not self._elsewhere.get(name)}

    @property
    def shared(self) -> list[str]:
        """The weights that write onto a stream, and something else as well."""
        return [name for name in self._found if self._elsewhere.get(name)]

    @property
    def mixed(self) -> dict[str, str]:
        """The weights of layers that write into what is added to a stream, and the function in which that became more."""
        return {name: function for name, function in self._mixed.items() if name not in self._found}

    def carry(self, source: Any, copy: Any) -> None:
        """A copy that was made out of sight is what it is a copy of."""
        _set(copy, _written(source))

    def write(self, result: Tensor, weight: str, bias: Tensor | None) -> None:
        """A layer has written."""
        self._uses[weight] += 1
        if torch._C._current_graph_task_id() == -1:  # a backward pass computes again, and maybe not until the stream
            self._elsewhere.setdefault(weight, set()).add(self._uses[weight])
        origin = None if bias is None else marked(bias)
        _set(result, {(weight, self._uses[weight]): frozenset({origin.name} if origin else ())})

    def after(self, call: Call) -> None:
        """Follow a function that has just run."""
        result = call.outputs[0] if call.outputs else None
        if result is None:
            return
        found = None
        active = [value for value in call.tensors if value.requires_grad]
        written = [value for value in active if _written(value) is not None]
        if written and result.requires_grad:
            found = self._written_by(call, result, active, written)
            if found is None:
                self._lost.update(
                    dict.fromkeys((name for value in written for name, _ in _written(value) or ()), call.name)
                )
        if call.kind == "sum" and call.name in _SUMMING and len(active) == 2:
            self._note_mixed(result, *active)
        _set(result, found)

    def _note_mixed(self, result: Tensor, first: Tensor, second: Tensor) -> None:
        """Note what else than outputs of layers is added to a stream: to the model's inputs, and to what was added to these."""
        for branch, other in ((first, second), (second, first)):
            if (
                _written(branch) is not None
                or branch.shape != other.shape
                or not (_STREAM.of(other) or _comes_in(other))
            ):
                continue
            names = set(_layers_before(branch.grad_fn, branch.shape))
            if names and _is_stream_of(other, branch):
                self._mixed.update({name: self._lost[name] for name in names if name in self._lost})
                _STREAM.note(result, True)

    def _written_by(self, call: Call, result: Tensor, active: list[Tensor], written: list[Tensor]) -> Written | None:
        own = _written(written[0])
        assert own is not None
        if call.kind == "sum" and call.name in _SUMMING:
            return self._summed(call, active, written)
        if len(active) == 1 and channels_of(call.name, call.kind) in ("copied", "moved"):
            return own
        if call.kind in ("product", "division"):
            whole = [value for value in written if value.shape == result.shape]  # a gate of the branch is broadcast
            return _written(whole[0]) if len(whole) == 1 else own if len(written) == 1 else None
        if call.kind == "normalization" and len(active) == 1:
            # Its shift, or a running mean, is written even where nothing comes in, unless the block owns scale and shift.
            return _with(own, call.tensors[1:])
        if call.kind == "activation" and len(active) == 1 and keeps_zero(call, active[0]):
            return own
        return None

    def _summed(self, call: Call, active: list[Tensor], written: list[Tensor]) -> Written | None:
        if len(active) == 1:
            own, shifts = _written(active[0]), [value for value in call.tensors if value is not active[0]]
            return None if own is None or any(marked(value) is None for value in shifts) else _with(own, shifts)
        parts = [use for value in written for use in (_written(value) or {}).items()]
        merged = dict(parts)
        if len(merged) < len(parts):  # twice what one layer wrote, as of a rotation
            return merged
        streams = [
            branch
            for branch, other in (active[:2], active[1::-1])
            if _written(branch) is not None and _is_stream_of(other, branch)
        ]
        if not streams and len(written) == 2:
            streams = [branch for branch, other in (active[:2], active[1::-1]) if _is_projection_beside(other, branch)]
        if len(streams) == 1:
            _STREAM.note(call.outputs[0], True)
            block = _written(streams[0])
            assert block is not None
            for (weight, use), others in block.items():
                self._found[weight] = self._found.get(weight, frozenset()) | others
                self._elsewhere.get(weight, set()).discard(use)
            return None
        return merged if len(written) == 2 else None  # branches side by side, which are added to the stream together


def _with(written: Written, constants: Iterable[Tensor]) -> Written:
    """What is written together with parameters that shift it."""
    shifts = {origin.name for value in constants if (origin := marked(value)) is not None}
    return {use: others | shifts for use, others in written.items()}


_FACT: Fact[Written] = Fact("written")
_written, _set = _FACT.of, _FACT.note
_STREAM: Fact[bool] = Fact("stream")


def _is_stream_of(stream: Tensor, branch: Tensor) -> bool:
    """Whether the branch was made of the stream, or of a part of what was summed up to it."""
    summands = set(_summands(stream))
    return any(edge in summands for edge in _ancestors(branch))


def _comes_in(stream: Tensor) -> bool:
    """Whether a part of what was summed up is one of the model's inputs."""
    return any(node.name().endswith("AccumulateGrad") for node, _ in _summands(stream))


def _is_projection_beside(shortcut: Tensor, branch: Tensor) -> bool:
    """Whether a shortcut is one layer away from what the branch made by several layers: the stream in another width."""
    made_of = {node for node, _ in set(_ancestors(branch)) & set(_ancestors(shortcut))}
    return _layers_until(shortcut.grad_fn, made_of) == 1 < _layers_until(branch.grad_fn, made_of)


def _layers_before(node: Any, shape: Sequence[int]) -> Iterator[str]:
    """The weights of the nearest layers that wrote as many channels as there are along a dimension."""
    stack, seen = [node], set[Any]()
    while stack and len(seen) < _FAR:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        use = getattr(node, "use", None)
        if use is None:
            stack.extend(parent for parent, _ in node.next_functions)
        elif use.weight.shape[use.form.out_axis] in shape:
            yield use.origin.name


def _layers_until(node: Any, ends: set[Any]) -> int:
    """The least number of layers between a node and one of the others."""
    level, layers = [node], 0
    seen: set[Any] = set()
    while level and layers < 3:
        following: list[Any] = []
        near = list(level)
        while near:
            node = near.pop()
            if node in ends:
                return layers
            if node is None or node in seen:
                continue
            seen.add(node)
            parents = [parent for parent, _ in node.next_functions]
            (following if node.name().startswith(_LAYERS) else near).extend(parents)
        level, layers = following, layers + 1
    return layers


_PASSING = ("Add", "Sub", "View", "UnsafeView", "Reshape", "Clone", "ToCopy", "Transpose", "Permute")
_SCALING = ("Mul", "Div")


def _summands(tensor: Tensor) -> Iterator[tuple[Any, int]]:
    """The node of a tensor and which of its outputs it is; and behind sums, views and scales those of what was summed."""
    stack = [(tensor.grad_fn, tensor.output_nr)]
    seen: set[Any] = set()
    while stack:
        edge = node, _ = stack.pop()
        if node is None or edge in seen:
            continue
        seen.add(edge)
        yield edge
        parents = [parent for parent in node.next_functions if parent[0] is not None]
        if node.name().startswith(_PASSING) or (node.name().startswith(_SCALING) and len(parents) == 1):
            stack.extend(parents)


def _ancestors(tensor: Tensor) -> Iterator[tuple[Any, int]]:
    """The nodes that a tensor was made of, each with which of its outputs, the nearest first."""
    queue = [(tensor.grad_fn, tensor.output_nr)]
    seen: set[Any] = set()
    while queue and len(seen) < _FAR:
        edge = node, _ = queue.pop(0)
        if node is None or edge in seen:
            continue
        seen.add(edge)
        yield edge
        queue.extend(node.next_functions)
