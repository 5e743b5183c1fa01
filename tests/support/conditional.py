"""Ids of which some are where a condition holds, and one that is learned."""

import torch
from torch import Tensor, nn

from lrp_prune.correction import (
    ActivationAbove,
)

IDS = torch.randint(3, 50, (3, 12), generator=torch.Generator().manual_seed(5))
AMONG = sorted(set(IDS.flatten().tolist()))[::3]


def logits(model: nn.Module, ids: Tensor = IDS) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=ids).logits
    return found


def activation_condition(model: nn.Module, share: float = 0.4) -> ActivationAbove:
    """Holds at about this share of the tokens."""
    direction = torch.randn(model.config.hidden_size, generator=torch.Generator().manual_seed(1))
    states = model.model(input_ids=IDS, output_hidden_states=True).hidden_states[1].detach()
    scores = (states @ direction).flatten().sort().values
    place = int((1 - share) * len(scores))
    # Between two of them, so that rounding turns none.
    return ActivationAbove("model.layers.0", float(scores[place : place + 2].mean()), direction)
