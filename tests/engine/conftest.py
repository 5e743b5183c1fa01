"""zennit, which relevance of convolutional networks is compared with."""

import sys
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from torch import nn


@pytest.fixture(scope="module")
def zennit() -> Iterator[Any]:
    """zennit; it asks torchvision for classes of models that are not used here, so that it need not be installed."""
    with pytest.MonkeyPatch.context() as patch:
        try:
            import torchvision  # noqa: F401
        except (ImportError, RuntimeError):  # RuntimeError: it is there, but built for another torch
            models, resnet = ModuleType("torchvision.models"), ModuleType("torchvision.models.resnet")
            resnet.Bottleneck = resnet.BasicBlock = type("Unused", (nn.Module,), {})  # type: ignore[attr-defined]
            for module in (ModuleType("torchvision"), models, resnet):
                patch.setitem(sys.modules, module.__name__, module)
        composites = pytest.importorskip("zennit.composites")
        from zennit import canonizers, layer, rules, types

        yield SimpleNamespace(composites=composites, layer=layer, rules=rules, types=types, canonizers=canonizers)
