"""Statistics by their definition, from what each layer gets and gives back, token by token."""

from typing import Any

import torch
from torch import Tensor, nn

from tests.support.likelihood import how_likely


def tokens_of(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """Weight ``[out, in]``, activations and gradients ``[samples, tokens, .]`` of each linear layer, by plain autograd hooks."""
    found: dict[str, list[Any]] = {}

    def hook(name: str) -> Any:
        def record(module: Any, args: Any, output: Tensor) -> None:
            weight = module.weight.T if type(module).__name__ == "Conv1D" else module.weight
            found[f"{name}.weight"] = [weight.detach(), args[0].detach(), output]

        return record

    handles = [
        module.register_forward_hook(hook(name))
        for name, module in model.named_modules()
        if type(module).__name__ in ("Linear", "Conv1D") and "lm_head" not in name
    ]
    logits = model(**batch, use_cache=False).logits
    value = how_likely(logits[:, :-1], batch["input_ids"][:, 1:])
    gradients = torch.autograd.grad(value, [entry[2] for entry in found.values()])
    for handle in handles:
        handle.remove()
    samples, tokens = batch["input_ids"].shape  # some models flatten both into one dimension
    return {
        name: (entry[0], entry[1].reshape(samples, tokens, -1), d.reshape(samples, tokens, -1))
        for (name, entry), d in zip(found.items(), gradients, strict=True)
    }


def expected_statistic(statistic: str, weight: Tensor, a: Tensor, d: Tensor) -> Tensor:
    by_token = weight * torch.einsum("bto,bti->btoi", d, a)
    return {
        "signed": by_token.sum((0, 1)),
        "abs_sample": by_token.sum(1).abs().sum(0),
        "abs_token": by_token.abs().sum((0, 1)),
        "squared_token": by_token.square().sum((0, 1)),
    }[statistic]
