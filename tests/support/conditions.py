"""Conditions that a test can set: on the tokens of a text, and on an activation."""

from typing import Any

import torch
from torch import Tensor, nn

from lrp_prune.correction import ConditionalPatch, Patch
from lrp_prune.correction.conditions import Condition

EMBEDDING = "model.embed_tokens"
LAST_UP, LAST_DOWN = "model.layers.1.mlp.up_proj.weight", "model.layers.1.mlp.down_proj.weight"
"""Of the last layer of the tests' small Llama: each token's output depends on no other token from here on."""


class TokenIs(Condition):
    """Holds at one of some tokens."""

    name = "test: token is"

    def __init__(self, at: str, among: list[int]) -> None:
        self.at, self.among = at, list(among)

    def holds(self, inputs: tuple[Any, ...], output: Any) -> Tensor:
        ids: Tensor = inputs[0]
        return torch.isin(ids, torch.tensor(self.among, dtype=ids.dtype, device=ids.device))

    def options(self) -> dict[str, Any]:
        return {"at": self.at, "among": self.among}


class Everywhere(Condition):
    """Holds for every sample."""

    name = "test: everywhere"

    def __init__(self, at: str) -> None:
        self.at = at

    def holds(self, inputs: tuple[Any, ...], output: Any) -> Tensor:
        return torch.ones(len(output), dtype=torch.bool)

    def options(self) -> dict[str, Any]:
        return {"at": self.at}


def last_layer_patch(model: nn.Module, seed: int = 0, entries: int = 300, **provenance: Any) -> Patch:
    generator = torch.Generator().manual_seed(seed)
    positions = {
        name: torch.randperm(model.get_parameter(name).numel(), generator=generator)[:entries]
        for name in (LAST_UP, LAST_DOWN)
    }
    return Patch.from_positions(model, positions, **provenance)


def where_token_is(model: nn.Module, among: list[int], seed: int = 0) -> ConditionalPatch:
    return ConditionalPatch(last_layer_patch(model, seed, behaviour="example"), TokenIs(EMBEDDING, among))
