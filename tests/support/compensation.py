"""Small models for compensation, masks of half of their weights, and what each layer has to be."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lrp_prune.pruning import LeastSquares, Masks, OptimalBrainSurgeon

EXACT = LeastSquares(damping=0.01, steps=500, tolerance=1e-12)
"""Solved to the last digits, so that results can be compared."""
WAYS = {
    "exact": EXACT,
    "obs": OptimalBrainSurgeon(dense=0.0),
    "weighted": LeastSquares(damping=0.01, steps=500, tolerance=1e-12, weights="relevance"),
}
"""What has to come to the same in one process and in several."""


def mlp(seed: int = 0) -> tuple[nn.Sequential, list[Any]]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(8, 24), nn.ReLU(), nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 3)).double()
    return model, [(torch.randn(64, 8).double(), torch.randint(3, (64,))) for _ in range(3)]


def half(model: nn.Module, names: list[str], seed: int = 0) -> Masks:
    generator = torch.Generator().manual_seed(seed)
    parameters = dict(model.named_parameters())
    return Masks({name: torch.rand(parameters[name].shape, generator=generator) > 0.5 for name in names})


class AddedTwice(nn.Module):
    """When the second layer runs, what the first got is no longer there."""

    def __init__(self, inplace: bool) -> None:
        super().__init__()
        self.inplace, self.a, self.b = inplace, nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.a, self.b):
            made = layer(x)
            x = x.add_(made) if self.inplace else x + made
        return x


class Twice(nn.Module):
    """The first layer runs twice, and is in no stage."""

    def __init__(self) -> None:
        super().__init__()
        self.twice, self.middle, self.last = nn.Linear(8, 8), nn.Linear(8, 6), nn.Linear(6, 3)

    def before(self, x: Tensor) -> Tensor:
        return self.twice(self.twice(x).relu())

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.middle(self.before(x)).relu())


def check_closed_form(
    dense: nn.Module,
    pruned: nn.Module,
    masks: Masks,
    run: Callable[[nn.Module], Any],
    way: LeastSquares,
    tolerance: float,
) -> set[str]:
    """Check every layer that hooks can see against its ridge regression, and return the names of their weights.

    What a layer gets once the whole model is done is what it got when it was solved for, as the layers before it were done then.

    Args:
        dense: the model before.
        pruned: the model after.
        masks: which were applied.
        run: runs a model on all reference samples.
        way: how it was compensated.
        tolerance: of each entry, relative to the largest of its weight.
    """
    ours, theirs = _inputs(pruned, run), _inputs(dense, run)
    checked = set()
    for name, inputs in ours.items():
        if f"{name}.weight" not in masks or not masks.pruned_in(f"{name}.weight"):
            continue
        before, after = dense.get_submodule(name), pruned.get_submodule(name)
        expected, found, kept = _rows(before, name), _rows(after, name), _rows(before, name, masks)
        solved = torch.stack(
            [
                _ridge(rows.double(), other.double(), weight.double(), own, way, before.bias is not None)
                for rows, other, weight, own in zip(inputs, theirs[name], expected, kept, strict=True)
            ]
        )
        assert not found[~kept].any()
        assert float((found - solved).abs().max()) <= tolerance * float(solved.abs().max()), name
        checked.add(f"{name}.weight")
    return checked


def _inputs(model: nn.Module, run: Callable[[nn.Module], Any]) -> dict[str, list[Tensor]]:
    """What each layer gets, ``[rows, in]`` for each group of channels."""
    found: dict[str, list[Tensor]] = {}
    handles = []
    for name, layer in model.named_modules():

        def hook(layer: nn.Module, given: Any, name: str = name) -> None:
            x = given[0].detach()
            if isinstance(layer, nn.Conv2d):
                patches = nn.functional.unfold(x, layer.kernel_size, layer.dilation, layer.padding, layer.stride)  # type: ignore[arg-type]
                found[name] = list(patches.movedim(1, -1).flatten(0, 1).chunk(layer.groups, dim=1))
            else:
                found[name] = [x.reshape(-1, x.shape[-1])]

        if isinstance(layer, nn.Linear | nn.Conv2d) or type(layer).__name__ == "Conv1D":
            handles.append(layer.register_forward_pre_hook(hook))
    with torch.no_grad():
        run(model.eval())
    for handle in handles:
        handle.remove()
    return found


def _rows(layer: Any, name: str, masks: Masks | None = None) -> Tensor:
    """Weight and bias of a layer, or what masks keep of them, ``[groups, out, in + 1]``."""
    parts = []
    for kind in ("weight", "bias"):
        tensor = getattr(layer, kind)
        if tensor is None:
            continue
        full = f"{name}.{kind}"
        if masks is not None:
            tensor = masks[full] if full in masks else torch.ones_like(tensor, dtype=torch.bool)
        if kind == "weight" and type(layer).__name__ == "Conv1D":
            tensor = tensor.T
        parts.append(tensor.detach().reshape(len(tensor), -1))
    groups = layer.groups if isinstance(layer, nn.Conv2d) else 1
    return torch.cat(parts, dim=1).reshape(groups, -1, sum(part.shape[1] for part in parts))


def _ridge(x: Tensor, dense: Tensor, weight: Tensor, kept: Tensor, way: LeastSquares, bias: bool) -> Tensor:
    """Each row's regression on what it keeps, towards its dense weights."""
    if bias:
        x, dense = (torch.cat([entry, torch.ones(len(entry), 1).to(entry)], dim=1) for entry in (x, dense))
    gram, mixed = x.T @ x, ((1 - way.dense) * x + way.dense * dense).T @ x
    delta = way.damping * gram.diagonal()[: x.shape[1] - bias].mean()
    found = torch.zeros_like(weight)
    for row, support, start in zip(found, kept, weight, strict=True):
        if not support.any() or delta == 0:
            row[support] = start[support]
            if bias and delta == 0 and support[-1]:  # alone
                row[-1] = start @ mixed[:, -1] / gram[-1, -1]
            continue
        system = (gram + delta * torch.eye(len(gram), dtype=gram.dtype))[support][:, support]
        row[support] = torch.linalg.solve(system, (start @ mixed + delta * start)[support])
    return found
