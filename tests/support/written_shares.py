"""Shares of rules that treat signs apart, written out."""

from collections.abc import Callable

import torch
from torch import Tensor

from lrp_prune import Composite
from lrp_prune.attribution import AlphaBeta, Gamma, Terms

GAMMA = 0.4


def gamma_shares(contributions: Tensor, bias: Tensor) -> Tensor:
    """What of each output's relevance goes to each contribution ``[..., outputs, inputs]``: those of its sign count more."""
    everything = torch.cat([contributions, bias[..., None]], -1)
    z = everything.sum(-1, keepdim=True)
    favoured = everything * (1 + GAMMA * (everything * z > 0))
    return (favoured / favoured.sum(-1, keepdim=True))[..., :-1]


def alpha_beta_shares(contributions: Tensor, bias: Tensor) -> Tensor:
    """Twice the share among positive contributions, minus that among negative ones; of a sign that there is none of, nothing."""
    everything = torch.cat([contributions, bias[..., None]], -1)
    positive, negative = everything * (everything > 0), everything * (everything < 0)
    shares = [part / part.sum(-1, keepdim=True) for part in (positive, negative)]
    return (2 * shares[0].nan_to_num(0) - shares[1].nan_to_num(0))[..., :-1]


RULES: dict[str, tuple[Terms, Callable[[Tensor, Tensor], Tensor]]] = {
    "gamma": (Gamma(GAMMA), gamma_shares),
    "alpha_beta": (AlphaBeta(2, 1), alpha_beta_shares),
}


def composite(rule: str) -> Composite:
    return Composite(rule, {"linear": RULES[rule][0], "convolution": RULES[rule][0]})
