"""Passes that leave a model as it was."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from lrp_prune.engine.checkpoints import recomputed_in_evaluation
from lrp_prune.models.profile import profile_of
from lrp_prune.models.states import make_kept_ordinary, unchanged_configuration, undisturbed


@contextmanager
def unaltered(module: nn.Module) -> Iterator[None]:
    """Evaluation mode and no inference mode inside, activation checkpoints at work; modes, random numbers and configuration come
    out as they went in.

    Args:
        module: what is run, without wrappers.
    """
    with (
        torch.inference_mode(False),
        undisturbed(module),
        unchanged_configuration(profile_of(module).config),
        recomputed_in_evaluation(module),
    ):
        make_kept_ordinary(module)
        yield
