"""torchvision, whose models are plain Python, also where its compiled operators do not fit the torch that is installed."""

import importlib
import importlib.util
import sys
from types import ModuleType

import pytest
import torch

_OPERATORS = ("nms", "qnms")
"""What an import of torchvision looks up, of operators that no classifier uses."""
_declared: list[torch.library.Library] = []


def is_installed() -> bool:
    """Whether there is a torchvision."""
    return importlib.util.find_spec("torchvision") is not None


def torchvision() -> ModuleType:
    """torchvision; tests are skipped where it is not installed.

    timm and transformers import it as well, where it is: whoever uses these calls this first then.
    """
    if not is_installed():
        pytest.skip("torchvision is not installed")
    try:
        return importlib.import_module("torchvision")
    except RuntimeError as error:  # its operators were built for another torch, and were not loaded
        if "does not exist" not in str(error) or _declared:
            raise
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[name]
    library = torch.library.Library("torchvision", "DEF")  # what it declares goes when it goes
    for operator in _OPERATORS:
        library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _declared.append(library)
    return importlib.import_module("torchvision")
