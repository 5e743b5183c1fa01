"""What a wrapper for corrections means to a callback: the module inside, with its weights as they were trained."""

from contextlib import AbstractContextManager, nullcontext

from torch import nn

from lrp_prune.wrapper.module import CorrectedModule


def inner(module: nn.Module) -> nn.Module:
    """The module that is trained, without a wrapper for corrections."""
    return module.module if isinstance(module, CorrectedModule) else module


def uncorrected(module: nn.Module) -> AbstractContextManager[None]:
    """Patches are taken off while weights are pruned, so that what disabling them puts back is pruned as well."""
    return module.uncorrected() if isinstance(module, CorrectedModule) else nullcontext()
