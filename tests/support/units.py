"""Removing one unit at a time, and ablating the same by hooks."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

import lrp_prune
from lrp_prune.relevance import Relevance


def randomized(model: nn.Module) -> nn.Module:
    """Every parameter and running statistic different from its neighbours, and biases that are not zero; in float64."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            vector = parameter.dim() < 2
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(0.3 + 0.3 * noise if vector else 0.5 * noise)
        for name, buffer in model.named_buffers():
            if "running" in name:
                buffer.copy_(torch.rand(buffer.shape, generator=generator) + 0.5)
    return model.eval().double()


@contextmanager
def without(relevance: Relevance, group: str, unit: int, model: nn.Module) -> Iterator[lrp_prune.Masks]:
    """The model without one unit, and nothing else, by masks; it comes back."""
    values = {name: torch.ones_like(tensor) for name, tensor in relevance.items()}
    values[group][unit] = 0
    single = Relevance(
        {group: values[group]},
        granularity=relevance.granularity,
        members={group: relevance.members[group]},
        parameter_shapes=relevance.parameter_shapes,
    )
    # Of a group of one unit everything goes.
    sparsity = 1 / len(values[group]) if len(values[group]) > 1 else 0.999
    masks = lrp_prune.select(single, sparsity, scope="layer")
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    masks.apply_(model)
    yield masks
    model.load_state_dict(state)


def assert_taken_out_as_if_silent(
    blocks: Relevance, branches: dict[str, nn.Module], model: nn.Module, x: Tensor
) -> None:
    """The model without a block gives what it gives while the branch that the block writes puts out zeros."""
    for group, branch in branches.items():
        handle = branch.register_forward_hook(lambda *args: torch.zeros_like(args[2]))
        expected = model(x)
        handle.remove()
        with without(blocks, group, 0, model):
            torch.testing.assert_close(model(x), expected)
        assert not torch.allclose(model(x), expected)


@contextmanager
def silenced(model: nn.Module, modules: Iterable[str], channel: int | slice | Tensor) -> Iterator[None]:
    """Channels of some modules' outputs are zero."""

    def zero(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        last = isinstance(module, nn.Linear | nn.LayerNorm) or output.dim() < 3
        changed = output.clone()
        changed.movedim(-1 if last else 1, 0)[channel] = 0
        return changed

    handles = [model.get_submodule(name).register_forward_hook(zero) for name in modules]
    yield
    for handle in handles:
        handle.remove()


def makers(relevance: Relevance, group: str, unit: int, model: nn.Module) -> list[tuple[str, Tensor]]:
    """The modules that make a unit, each with the channels of its output that are the unit's, as the members claim."""
    found = []
    for member in relevance.members[group]:
        name = member.parameter.rpartition(".")[0]
        if not member.reads and not isinstance(model.get_submodule(name), nn.ConvTranspose2d):
            rows = (member.owners == unit).reshape(member.owners.shape[0], -1).any(1)
            found.append((name, rows.nonzero().view(-1)))
    return found


def channels_of(model: nn.Module, run: Callable[[], object], module: str) -> int:
    """How many channels a module puts out."""
    found: list[int] = []
    handle = model.get_submodule(module).register_forward_hook(lambda *args: found.append(args[2].shape[1]))
    run()
    handle.remove()
    return found[0]
