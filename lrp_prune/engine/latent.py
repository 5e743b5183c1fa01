"""Latent modules: those whose outputs' relevance is wanted besides that of the roots."""

from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn

from lrp_prune.arguments import check_patterns
from lrp_prune.engine.roots import Roots
from lrp_prune.models.batches import fields, with_fields


def latent_modules(modules: Mapping[str, nn.Module], patterns: Sequence[str] | None) -> list[str]:
    """The modules whose outputs' relevance is wanted."""
    check_patterns("latent", patterns)
    for pattern in patterns or ():
        if not any(_matching(name, [pattern]) for name in modules):
            raise ValueError(
                f"latent pattern {pattern!r} matches no module; there are {', '.join(list(modules)[1:4])}, ..."
            )
    return [name for name in modules if name and _matching(name, patterns)]


def _matching(name: str, patterns: Sequence[str] | None) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns or ())


def recorded(
    name: str, roots: Roots, note: Callable[[str, Tensor], None], carry: Callable[[Tensor, Tensor], None]
) -> Callable[..., Any]:
    """Record a module's output, and hand on a copy: the model may add to it in place.

    Args:
        name: the module's.
        roots: what tells whether anything is recorded.
        note: is told of the output.
        carry: makes what is known of the output known of the copy.
    """

    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        if not roots.recording:
            return None
        named = fields(output)
        entries = named.values() if named else output if isinstance(output, tuple | list) else [output]
        tensor = next(iter(entries), None)
        if not isinstance(tensor, Tensor) or not tensor.requires_grad:
            return None
        note(name, tensor)
        copy = tensor.clone()
        carry(tensor, copy)
        if isinstance(output, Mapping):
            output[next(iter(output))] = copy  # type: ignore[index]  # model outputs are mutable mappings
            return output
        if hasattr(output, "_fields"):
            return type(output)(copy, *output[1:])
        if isinstance(output, tuple | list):
            return type(output)((copy, *output[1:]))
        return with_fields(output, {next(iter(named)): copy}) if named else copy

    return hook
