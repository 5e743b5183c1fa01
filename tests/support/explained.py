"""A function or small model, explained."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

import lrp_prune
from tests.support.small_models import Single


def explained(
    function: Callable[[Tensor], Tensor],
    x: Tensor,
    composite: str = "cp_lrp",
    of: Callable[[Tensor], Tensor] = torch.sum,
) -> tuple[Tensor, dict[str, Tensor]]:
    """A value of the output, and its relevance by roots; also that the output is torch's, bit for bit."""
    model = function if isinstance(function, nn.Module) else Single(function)
    with torch.no_grad():
        plain = model(x)
    with lrp_prune.attributing(model, composite, unruled="error") as propagation:
        output = model(x)
        assert torch.equal(output, plain)
        value = of(output)
        return value.detach(), propagation.relevance(value)


TOKENS = 3


def explained_tokens(model: nn.Module, composite: str = "cp_lrp") -> tuple[float, dict[str, Tensor]]:
    """The first output of two samples of so many tokens with four channels each, and its relevance by roots."""
    x = torch.randn(2, TOKENS, 4, generator=torch.Generator().manual_seed(1))
    value, relevance = explained(model, x, composite, lambda output: output[:, 0].sum())
    return value.item(), relevance
