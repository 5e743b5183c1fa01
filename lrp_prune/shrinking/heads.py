r"""What attention heads are made by: which rows of query, key and value, and of what else, each head depends on.

A mask of heads is about the layer that reads them. What makes them is found in the graph of one forward: between that layer and
the layers before it, head ``h`` depends on an entry of a parameter if the gradient of the head's channels, in a random
direction, has anything there,

.. math:: D_{h,i} = [\partial \langle r, a_h \rangle / \partial W_i \neq 0].

Other heads' entries are left out of the product that makes a head, so that their gradient is exactly zero. An entry (a row of
the query, a row of the key that several heads share, a column of a table of position biases) can go when all heads that depend
on it go.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lrp_prune.models.backends import traceable_attention
from lrp_prune.models.batches import to_device
from lrp_prune.models.returned import tensors_within
from lrp_prune.names import named_modules, named_parameters
from lrp_prune.shrinking.units import Group

# What only shows a parameter in another shape, or some of its entries.
_VIEWS = (
    "TBackward|Transpose|Permute|View|UnsafeView|Reshape|ToCopy|Select|Slice|Split|Unbind|Squeeze|Unsqueeze|Expand|Alias|Clone|"
    "Index|Embedding|AsStrided|Narrow|Chunk"
).split("|")
_LAYERS = ("Addmm", "Mm", "Bmm", "Baddbmm", "Linear", "MkldnnLinear", "MklLinear", "Convolution", "Mkldnn", "Cudnn")


class Slices(NamedTuple):
    """The indices of a parameter along one axis that heads depend on.

    Args:
        parameter: canonical name.
        axis: along which.
        depends: bool ``[heads, size]``.
    """

    parameter: str
    axis: int
    depends: Tensor

    @property
    def sets(self) -> Tensor | None:
        """Which heads share indices, as those of a key in grouped-query attention, bool ``[sets, heads]``.

        None where each has its own, or they share in another way than in sets of which each head is in one.
        """
        shared = self.depends[:, self.depends.sum(0) > 1]
        found: Tensor = torch.unique(shared.T, dim=0)
        return found if len(found) and bool((found.sum(0) == 1).all()) else None


def slices_of(
    module: nn.Module, batch: Any, run: Callable[[nn.Module, Any], Any], groups: Iterable[Group]
) -> dict[str, list[Slices]]:
    """What the heads of each group are made by, by the group's name.

    Args:
        module: what is run, in evaluation mode.
        batch: one batch, with more than one token: over a single one attention does not depend on queries and keys.
        run: how it is run.
        groups: of heads.
    """
    names = {id(parameter): name for name, parameter in named_parameters(module).items()}
    batch = to_device(batch, next(module.parameters()).device)
    with _all_needing_gradients(module), traceable_attention(module), torch.enable_grad():
        outputs = [value for value in tensors_within(run(module, batch)) if value.requires_grad]
        graph = _Graph(outputs, names)
        found = {}
        for group in groups:
            (reader,) = group.members
            found[group.name] = _with_vectors(module, graph.slices(reader.parameter, reader.owners.reshape(-1)))
    return found


class _Graph:
    """The graph of a forward, in which parameters are known by name."""

    def __init__(self, outputs: Sequence[Tensor], names: Mapping[int, str]) -> None:
        self._names = names
        self._shown: dict[Any, nn.Parameter | None] = {}
        self._readers: dict[str, list[tuple[Any, int]]] = {}
        for node in _behind([output.grad_fn for output in outputs]):
            if _is_layer(node):
                shown = [self._parameter(parent) for parent, _ in node.next_functions]
                activations = [edge for edge, seen in zip(node.next_functions, shown, strict=True) if seen is None]
                for seen in shown:
                    if seen is not None and id(seen) in names:
                        self._readers.setdefault(names[id(seen)], []).extend(
                            edge for edge in activations if edge[0] is not None
                        )

    def slices(self, reader: str, heads: Tensor) -> list[Slices]:
        """What the heads that a weight reads are made by."""
        number = int(heads.max()) + 1
        depends: dict[tuple[str, int], Tensor] = {}
        for edge in self._readers.get(reader, ()):
            shape = edge[0]._input_metadata[edge[1]].shape
            if shape[-1] != len(heads):
                return []
            near, layers = self._near(edge[0])
            with _ending_at(layers):
                for head in range(number):
                    gradients = self._gradients(edge, shape, heads == head, near)
                    for parameter, gradient in zip(near, gradients, strict=True):
                        for axis, size in enumerate(parameter.shape):
                            key = self._names[id(parameter)], axis
                            rows = depends.setdefault(key, torch.zeros(number, size, dtype=torch.bool, device="cpu"))
                            if gradient is not None:
                                rows[head] |= (gradient != 0).movedim(axis, 0).reshape(size, -1).any(1).cpu()
        # An axis along which each index belongs to all heads, or to none, has nothing to do with heads.
        return [
            Slices(name, axis, rows)
            for (name, axis), rows in depends.items()
            if bool((rows.any(0) & ~rows.all(0)).any()) and bool(rows.any(1).all())
        ]

    def _gradients(
        self, edge: tuple[Any, int], shape: Sequence[int], chosen: Tensor, near: Sequence[nn.Parameter]
    ) -> Sequence[Tensor | None]:
        if not near:
            return []
        direction = torch.zeros(tuple(shape), dtype=near[0].dtype, device=near[0].device)
        generator = torch.Generator().manual_seed(0)
        random = torch.randn((*shape[:-1], int(chosen.sum())), generator=generator, device="cpu")
        direction[..., chosen.to(direction.device)] = random.to(direction)
        output = torch.autograd.graph.GradientEdge(*edge)
        return torch.autograd.grad(output, near, direction, retain_graph=True, allow_unused=True)

    def _near(self, start: Any) -> tuple[list[nn.Parameter], dict[Any, list[int]]]:
        """The parameters of the nearest layers behind a node and of what is between; these layers, and where these go on."""
        found: dict[int, nn.Parameter] = {}
        layers: dict[Any, list[int]] = {}
        stack, seen = [start], set[Any]()
        while stack:
            node = stack.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            shown = [self._parameter(parent) for parent, _ in node.next_functions]
            found.update({id(each): each for each in shown if each is not None and id(each) in self._names})
            behind = [place for place, each in enumerate(shown) if each is None]
            if _is_layer(node) and len(behind) < len(shown):
                layers[node] = behind
            else:
                stack.extend(node.next_functions[place][0] for place in behind)
        return list(found.values()), layers

    def _parameter(self, node: Any) -> nn.Parameter | None:
        """The parameter that a node shows, whole or in part; None if it computes something."""
        path = []
        found: nn.Parameter | None = None
        while node is not None and node not in self._shown:
            path.append(node)
            if hasattr(node, "variable"):
                found = node.variable
                break
            parents = [parent for parent, _ in node.next_functions if parent is not None]
            if len(parents) != 1 or not node.name().startswith(tuple(_VIEWS)):
                break
            node = parents[0]
        else:
            found = None if node is None else self._shown[node]
        self._shown.update(dict.fromkeys(path, found))
        return found


@contextmanager
def _ending_at(layers: Mapping[Any, Sequence[int]]) -> Iterator[None]:
    """Gradients end at these nodes: where they would go on to what a layer was applied to, the same weights may be used again."""

    def ending(behind: Sequence[int]) -> Callable[[Any, Any], Any]:
        def hook(inputs: Sequence[Tensor | None], _: Any) -> tuple[Tensor | None, ...]:
            return tuple(None if place in behind else gradient for place, gradient in enumerate(inputs))

        return hook

    handles = [node.register_hook(ending(behind)) for node, behind in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _is_layer(node: Any) -> bool:
    return bool(node.name().startswith(_LAYERS))


def _behind(nodes: Sequence[Any]) -> Iterator[Any]:
    stack, seen = list(nodes), set[Any]()
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield node
        stack.extend(parent for parent, _ in node.next_functions)


def _with_vectors(module: nn.Module, slices: list[Slices]) -> list[Slices]:
    """Biases go with the rows of their layer: a shift of all keys alike changes no attention, and has no gradient to go by."""
    modules, found = named_modules(module), {(each.parameter, each.axis): each for each in slices}
    for each in slices:
        owner = modules.get(each.parameter.rpartition(".")[0])
        size = each.depends.shape[1]
        for name, parameter in owner.named_parameters(recurse=False) if owner is not None else ():
            vector = f"{each.parameter.rpartition('.')[0]}.{name}"
            if parameter.dim() == 1 and len(parameter) == size and each.depends.dim() == 2:
                found[vector, 0] = Slices(vector, 0, each.depends)
    return list(found.values())


@contextmanager
def _all_needing_gradients(module: nn.Module) -> Iterator[None]:
    before = [(parameter, parameter.requires_grad) for parameter in module.parameters()]
    try:
        for parameter, _ in before:
            parameter.requires_grad_(parameter.is_floating_point() or parameter.requires_grad)
        yield
    finally:
        for parameter, needed in before:
            parameter.requires_grad_(needed)
