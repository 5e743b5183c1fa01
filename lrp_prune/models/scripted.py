"""Modules that torch.jit has compiled: no rule sees what they compute."""

import torch
from torch import nn


def refuse_scripted(model: nn.Module) -> None:
    """Refuse a model, or a part of it, that ``torch.jit`` has compiled.

    Raises:
        ValueError: names the first.
    """
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise ValueError(
                f"{name or 'the model'} is compiled by torch.jit, which hides its operations from rules: give the module that "
                "it was scripted or traced from (with its state_dict), and script it again afterwards"
            )
