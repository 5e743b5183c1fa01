"""Where modules have the outputs of their weights, for methods that see no use of them."""

from torch import nn

from lrp_prune.names import named_parameters, unwrap


def layouts_of(model: nn.Module) -> dict[str, str]:
    """Layouts (:data:`lrp_prune.selection.scopes.LAYOUTS`) of the weights of known modules, by canonical name.

    Those of others are not known: they are left out.

    Example:
        >>> layouts_of(nn.Sequential(nn.Linear(2, 3), nn.Conv1d(2, 3, 4), nn.ConvTranspose1d(2, 3, 4)))
        {'0.weight': 'linear', '1.weight': 'convolution', '2.weight': 'transposed_convolution'}
    """
    kinds: dict[int, str] = {}
    for module in unwrap(model).modules():
        kind = _kind_of(module)
        if kind is None:
            continue
        for entry in module.parameters(recurse=False):
            if entry.dim() == _MATRIX or (entry.dim() > _MATRIX and kind.endswith("convolution")):
                kinds[id(entry)] = kind
    return {name: kinds[id(entry)] for name, entry in named_parameters(unwrap(model)).items() if id(entry) in kinds}


_MATRIX = 2
"""Dimensions of a weight that is no kernel; what else a module has (a key added to all) is none."""


def _kind_of(module: nn.Module) -> str | None:
    if isinstance(module, nn.modules.conv._ConvTransposeNd):
        return "transposed_convolution" if module.groups == 1 else None
    if isinstance(module, nn.modules.conv._ConvNd):
        return "convolution"
    if type(module).__name__ == "Conv1D":  # of transformers
        return "transposed"
    return "linear" if isinstance(module, nn.Linear | nn.MultiheadAttention | nn.RNNBase) else None
