"""Other ways to explain an input, written from their papers, as references for the benchmark of faithfulness.

Integrated gradients (Sundararajan et al. 2017), SmoothGrad (Smilkov et al. 2017), attention rollout (Abnar and Zuidema 2020).
Nothing here uses the package that is measured against them. The gradients are those of embeddings, or of pixels.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Change = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Reached:
    """Where a model's input becomes numbers.

    Args:
        argument: the input's name.
        embedding: the module that looks tokens up, of which the first call counts; None where the input is numbers.
        rollout: relevance by attention, from a model and a batch.
    """

    argument: str
    embedding: Callable[[nn.Module], nn.Module] | None
    rollout: Callable[[nn.Module, Any], Tensor]

    def gradient(self, model: nn.Module, batch: Any, target: Any, change: Change) -> tuple[Tensor, Tensor]:
        """The input in numbers, and the gradient where it is changed."""
        seen: list[Tensor] = []

        def leaf(values: Tensor) -> Tensor:
            seen.extend([values.detach(), change(values.detach()).requires_grad_()])
            return seen[1]

        if self.embedding is None:
            value = target(model, {**batch, self.argument: leaf(batch[self.argument])})
        else:
            module = self.embedding(model)
            handle = module.register_forward_hook(lambda module, args, output: output if seen else leaf(output))
            try:
                value = target(model, batch)
            finally:
                handle.remove()
        return seen[0], torch.autograd.grad(value, seen[1])[0]

    def summed(self, relevance: Tensor) -> Tensor:
        """Of tokens over their embeddings; of pixels as it is."""
        return relevance if self.embedding is None else relevance.sum(-1)

    def integrated_gradients(self, model: nn.Module, batch: Any, target: Any, steps: int = 20) -> dict[str, Tensor]:
        """The input times the mean gradient on the way from zero, at the middles of as many steps."""
        total: Tensor | None = None
        for step in range(steps):
            share = (step + 0.5) / steps
            values, gradient = self.gradient(model, batch, target, lambda values, share=share: share * values)
            total = gradient if total is None else total + gradient
        return {self.argument: self.summed(values * total / steps)}

    def smoothgrad(
        self, model: nn.Module, batch: Any, target: Any, draws: int = 20, noise: float = 0.1
    ) -> dict[str, Tensor]:
        """The input times the mean gradient under noise, of a share of the input's range."""
        generator = torch.Generator().manual_seed(0)

        def noisy(values: Tensor) -> Tensor:
            scale = noise * (values.amax() - values.amin())
            return values + scale * torch.randn(values.shape, generator=generator)

        total: Tensor | None = None
        for _ in range(draws):
            values, gradient = self.gradient(model, batch, target, noisy)
            total = gradient if total is None else total + gradient
        return {self.argument: self.summed(values * total / draws)}

    def attention_rollout(self, model: nn.Module, batch: Any, target: Any) -> dict[str, Tensor]:
        """The product of the layers' attention, averaged over heads, each with as much of the identity."""
        before = model.config._attn_implementation
        model.set_attn_implementation("eager")
        try:
            with torch.no_grad():
                return {self.argument: self.rollout(model, batch)}
        finally:
            model.set_attn_implementation(before)

    def random(self, model: nn.Module, batch: Any, target: Any) -> dict[str, Tensor]:
        """Numbers that know nothing of the model, the same for the same input."""
        values = batch[self.argument]
        generator = torch.Generator().manual_seed(int(values.double().abs().sum() * 1000) % 2**31)
        return {self.argument: torch.rand(values.shape, generator=generator)}


def rolled(attentions: tuple[Tensor, ...]) -> Tensor:
    """From each layer's attention ``[samples, heads, tokens, tokens]`` to that of the last on the input."""
    total: Tensor | None = None
    for attention in attentions:
        layer = attention.mean(1)
        layer = 0.5 * layer + 0.5 * torch.eye(layer.shape[-1])
        total = layer if total is None else layer @ total
    assert total is not None
    return total


def of_class_token(model: nn.Module, batch: Any) -> Tensor:
    """Of an image model: what the class token reads of each patch."""
    return rolled(model(**batch, output_attentions=True).attentions)[:, 0, 1:]


def of_last_token(model: nn.Module, batch: Any) -> Tensor:
    """Of a causal model: what the last token reads of each token."""
    return rolled(model(**batch, output_attentions=True, use_cache=False).attentions)[:, -1]


def of_decoder(model: nn.Module, batch: Any) -> Tensor:
    """Of an encoder-decoder: what its last position reads of each of the encoder's tokens, over the decoder's layers."""
    output = model(**batch, output_attentions=True, use_cache=False)
    read = torch.stack([attention.mean(1)[:, -1] for attention in output.cross_attentions]).mean(0)
    return (read[:, None] @ rolled(output.encoder_attentions))[:, 0]
