"""SparseGPT, Wanda and RIA, written from their papers, as independent references for the benchmarks.

Sources: E. Frantar and D. Alistarh, "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot", ICML
2023, arXiv 2301.00774 (algorithm 1, section 3); M. Sun, Z. Liu, A. Bair and J. Z. Kolter, "A Simple and Effective
Pruning Approach for Large Language Models", ICLR 2024, arXiv 2306.11695; Y. Zhang et al., "Plug-and-Play: An Efficient
Post-training Pruning Method for Large Language Models", ICLR 2024. Nothing here uses the package that is measured against it.

All go through the blocks of a causal model one after the other: the inputs of a block come from the blocks before it
as already pruned, and the linear layers inside a block are solved on the inputs they have while that block is dense.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

Solver = Callable[[str, nn.Linear, Tensor], None]
Pattern = tuple[int, int]
"""`(n, m)`: of each `m` inputs that follow each other `n` are kept, in each row."""


def sparsegpt_(
    weight: Tensor,
    gram: Tensor,
    sparsity: float,
    mask: Tensor | None = None,
    block: int = 128,
    damping: float = 0.01,
    pattern: Pattern | None = None,
) -> Tensor:
    """Prunes a linear layer's weight in place by optimal brain surgery, column by column, in lazy blocks.

    With `H = X^T X + damping * mean(diag) * I` and the upper Cholesky factor `U` of its inverse (`H^-1 = U^T U`), the
    error of removing `w_ij` is `w_ij^2 / U_jj^2`, and the columns to the right of `j` take over `-(w_ij / U_jj) U_j,:`.
    Within a block of columns the `sparsity` fraction of the smallest errors is removed, whichever rows they are in.

    Args:
        weight: `[out, in]`.
        gram: `X^T X` of the layer's inputs, `[in, in]`.
        sparsity: Fraction to remove, in [0, 1).
        mask: Boolean `[out, in]`, True = kept: removes the others and updates these; `sparsity` is then unused.
        block: Columns whose mask is chosen, and whose updates to the right are applied, at once.
        damping: Fraction of the mean of the diagonal that is added to it.
        pattern: Keeps `n` of each `m`, chosen when the first of them is reached; `sparsity` is then unused, and `block` a
            multiple of `m`.

    Returns:
        The mask, boolean `[out, in]`, True = kept.
    """
    w = weight.detach().to(torch.float64, copy=True)
    hessian = gram.to(torch.float64, copy=True)
    dead = hessian.diagonal() == 0
    hessian.diagonal()[dead] = 1.0
    w[:, dead] = 0.0
    hessian.diagonal().add_(damping * hessian.diagonal().mean())
    factor = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(hessian)), upper=True)
    kept = torch.ones_like(w, dtype=torch.bool) if mask is None else mask
    for start in range(0, w.shape[1], block):
        end = min(start + block, w.shape[1])
        columns, corner = w[:, start:end], factor[start:end, start:end]
        if mask is None and pattern is None:
            errors = (columns / corner.diagonal()).square().flatten()
            removed = errors.topk(round(sparsity * errors.numel()), largest=False).indices
            choice = torch.ones_like(errors, dtype=torch.bool)
            choice[removed] = False
            kept[:, start:end] = choice.view(columns.shape)
        residual = torch.zeros_like(columns)
        for j in range(end - start):
            if mask is None and pattern is not None and j % pattern[1] == 0:
                group = slice(j, j + pattern[1])
                errors = (columns[:, group] / corner.diagonal()[group]).square()
                kept[:, start + j : start + j + pattern[1]] = kept_of_each(errors, pattern)
            residual[:, j] = columns[:, j] * ~kept[:, start + j] / corner[j, j]
            columns[:, j:] -= torch.outer(residual[:, j], corner[j, j:])
        w[:, end:] -= residual @ factor[start:end, end:]
    with torch.no_grad():
        weight.copy_((w * kept).to(weight.dtype))
    return kept


def kept_of_each(score: Tensor, pattern: Pattern) -> Tensor:
    """True for the `n` largest of each `m` of a row; `score` is `[out, in]`."""
    n, m = pattern
    groups = score.unflatten(1, (-1, m))
    return torch.zeros_like(groups, dtype=torch.bool).scatter_(2, groups.topk(n, dim=2).indices, True).flatten(1)


def wanda_(weight: Tensor, gram: Tensor, sparsity: float, pattern: Pattern | None = None) -> Tensor:
    """Prunes, in each row, the smallest `abs(w_ij) * norm(x_j)`; returns the mask, True = kept."""
    score = weight.detach().abs() * gram.diagonal().sqrt()
    if pattern is not None:
        kept = kept_of_each(score, pattern)
    else:
        removed = score.topk(round(sparsity * score.shape[1]), dim=1, largest=False).indices
        kept = torch.ones_like(score, dtype=torch.bool).scatter_(1, removed, False)
    with torch.no_grad():
        weight.mul_(kept)
    return kept


def ria_(weight: Tensor, gram: Tensor, sparsity: float, pattern: Pattern | None = None, power: float = 0.5) -> Tensor:
    """Prunes, in the whole layer, the smallest relative importance and activation; returns the mask, True = kept.

    The score is `(abs(w_ij) / sum_k abs(w_ik) + abs(w_ij) / sum_k abs(w_kj)) * norm(x_j) ** power`.
    """
    size = weight.detach().abs()
    relative = size / size.sum(1, keepdim=True) + size / size.sum(0, keepdim=True)
    score = relative * gram.diagonal().sqrt() ** power
    if pattern is not None:
        kept = kept_of_each(score, pattern)
    else:
        removed = score.flatten().topk(round(sparsity * score.numel()), largest=False).indices
        kept = torch.ones_like(score, dtype=torch.bool)
        kept.view(-1)[removed] = False
    with torch.no_grad():
        weight.mul_(kept)
    return kept


class _StopError(Exception):
    pass


def block_inputs(model: nn.Module, blocks: nn.ModuleList, ids: Tensor) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    """Records what the first block is called with, window by window."""
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append((args, kwargs))
        raise _StopError

    handle = blocks[0].register_forward_pre_hook(record, with_kwargs=True)
    try:
        for window in ids:
            try:
                model(input_ids=window[None], use_cache=False)
            except _StopError:
                continue
    finally:
        handle.remove()
    return calls


@torch.no_grad()
def block_by_block(model: nn.Module, ids: Tensor, solve: Solver, label: str = "block by block") -> None:
    """Calls `solve(name, linear, X^T X)` for each linear layer of each block, on inputs from the solved blocks before.

    Args:
        model: A causal Hugging Face model; its weights are changed by `solve`.
        ids: Calibration windows `[windows, tokens]`.
        solve: Changes the layer's weight in place.
        label: What the progress bar says.
    """
    count = model.config.num_hidden_layers
    prefix, blocks = next(
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count
    )
    calls = block_inputs(model, blocks, ids)
    for index, layer in enumerate(tqdm(blocks, desc=label, leave=False)):
        linears = {name: module for name, module in layer.named_modules() if isinstance(module, nn.Linear)}
        grams = {name: torch.zeros(module.in_features, module.in_features) for name, module in linears.items()}
        handles = []
        for name, module in linears.items():

            def accumulate(_: nn.Module, args: tuple[Tensor, ...], gram: Tensor = grams[name]) -> None:
                inputs = args[0].flatten(0, -2).float()
                gram.addmm_(inputs.T, inputs)

            handles.append(module.register_forward_pre_hook(accumulate))
        for args, kwargs in calls:
            layer(*args, **kwargs)
        for handle in handles:
            handle.remove()
        for name, module in linears.items():
            solve(f"{prefix}.{index}.{name}.weight", module, grams[name])
        for number, (args, kwargs) in enumerate(calls):
            output = layer(*args, **kwargs)
            calls[number] = ((output[0] if isinstance(output, tuple) else output, *args[1:]), kwargs)


def sparsegpt(
    model: nn.Module,
    ids: Tensor,
    sparsity: float = 0.5,
    masks: dict[str, Tensor] | None = None,
    pattern: Pattern | None = None,
) -> dict[str, Tensor]:
    """Prunes the linear layers in a causal model's blocks by SparseGPT, or updates the weights that `masks` keep."""
    found: dict[str, Tensor] = {}

    def solve(name: str, linear: nn.Linear, gram: Tensor) -> None:
        mask = masks[name] if masks is not None else None
        found[name] = sparsegpt_(linear.weight, gram, sparsity, mask, pattern=pattern)

    block_by_block(model, ids, solve, "SparseGPT")
    return found


def wanda(model: nn.Module, ids: Tensor, sparsity: float = 0.5, pattern: Pattern | None = None) -> dict[str, Tensor]:
    """Prunes all linear layers in the blocks of a causal model with Wanda, row by row."""
    return _scored(model, ids, wanda_, "Wanda", sparsity, pattern)


def ria(model: nn.Module, ids: Tensor, sparsity: float = 0.5, pattern: Pattern | None = None) -> dict[str, Tensor]:
    """Prunes all linear layers in the blocks of a causal model with RIA, layer by layer."""
    return _scored(model, ids, ria_, "RIA", sparsity, pattern)


def _scored(
    model: nn.Module,
    ids: Tensor,
    prune_: Callable[[Tensor, Tensor, float, Pattern | None], Tensor],
    label: str,
    sparsity: float,
    pattern: Pattern | None,
) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}

    def solve(name: str, linear: nn.Linear, gram: Tensor) -> None:
        found[name] = prune_(linear.weight, gram, sparsity, pattern)

    block_by_block(model, ids, solve, label)
    return found
