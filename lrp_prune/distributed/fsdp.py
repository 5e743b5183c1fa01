"""What of FSDP2 has no public name: all of it that is used, in one place.

Tested with torch 2.13: the oldest that the rest is tested with, 2.6, does not run FSDP2 on CPUs. What another version calls
otherwise is refused by name, and only where a model is sharded.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

TESTED = "2.13"
"""The version of torch whose private names these are."""
_FLAGS = ("reduce_grads", "all_reduce_grads")


def groups_of_parameters(module: nn.Module) -> list[Any]:
    """FSDP's groups of parameters; torch has no public way to read their flags.

    Raises:
        RuntimeError: this version of torch keeps them elsewhere.
    """
    state: Any = module._get_fsdp_state() if hasattr(module, "_get_fsdp_state") else None  # type: ignore[operator]
    if hasattr(state, "_fsdp_param_groups"):
        return list(state._fsdp_param_groups)
    if not hasattr(state, "_fsdp_param_group"):
        raise RuntimeError(
            f"torch {torch.__version__} keeps what fully_shard knows of a module elsewhere than {TESTED}, which this was "
            "tested with: use that, or a newer lrp-prune"
        )
    return [] if state._fsdp_param_group is None else [state._fsdp_param_group]


def gathered_parameters(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The whole parameters that FSDP keeps for a module once it has made them, each with its name."""
    for entry in (entry for group in groups_of_parameters(module) for entry in group.fsdp_params):
        gathered = getattr(entry, "_unsharded_param", None)
        if gathered is not None:
            yield entry._param_fqn or "a parameter", gathered


@contextmanager
def gradients_unsynchronized(modules: Sequence[nn.Module]) -> Iterator[None]:
    """No gradient is reduced in a backward; each flag comes out as it went in."""
    groups = [group for module in modules for group in groups_of_parameters(module)]
    before = [[getattr(group, flag) for flag in _FLAGS] for group in groups]
    for module in modules:
        module.set_requires_gradient_sync(False, recurse=False)  # type: ignore[operator]  # of FSDPModule
    try:
        yield
    finally:
        for group, values in zip(groups, before, strict=True):
            for flag, value in zip(_FLAGS, values, strict=True):
                setattr(group, flag, value)


def forget_pass(modules: Sequence[nn.Module]) -> None:
    """Bring FSDP out of the middle of a forward or backward; gradients that wait for their reduction stay."""
    groups = [group for module in modules for group in groups_of_parameters(module)]
    waiting = [getattr(group, "_partial_reduce_output", None) for group in groups]
    for module in modules:
        reset = getattr(module, "reset_iter_state", None)  # torch 2.12
        if reset is not None and module._get_fsdp_state()._is_root:  # type: ignore[operator]
            reset()
    for group, output in zip(groups, waiting, strict=True):
        group._partial_reduce_output = output
