"""Layers whose weights are codes: they hold no parameter that could be scored, so that they are easily overlooked."""

from torch import nn

from lrp_prune.names import named_modules

_PACKED = ("qweight", "weight_packed", "packed_weight")


def quantized_modules(model: nn.Module) -> dict[str, str]:
    """Canonical module name -> class of each quantized layer (``torch.ao``, and layers with packed integer buffers).

    Example:
        >>> quantized_modules(nn.Sequential(nn.Linear(2, 2)))
        {}
    """
    found: dict[str, str] = {}
    for name, module in named_modules(model).items():
        inside = any(name.startswith(f"{outer}.") for outer in found)
        packed = any(key in module._buffers for key in _PACKED)
        if not inside and (".nn.quantized." in f"{type(module).__module__}." or packed):
            found[name] = str(module._get_name())  # type: ignore[no-untyped-call]  # torch's
    return found
