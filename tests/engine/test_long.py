"""Long inputs: nothing is made that grows with the square of the tokens, beside the model's own attention."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import lrp_prune

COMPOSITES = ["attnlrp", "cp_lrp", "epsilon", "gradient"]


class Made(TorchDispatchMode):
    """The number of entries of all tensors that operators make, and of the largest."""

    def __init__(self) -> None:
        super().__init__()
        self.total = self.largest = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for entry in tree_leaves(result):
            if isinstance(entry, Tensor):
                self.total += entry.numel()
                self.largest = max(self.largest, entry.numel())
        return result


def _llama(**sizes: int) -> nn.Module:
    torch.manual_seed(0)
    return tf.LlamaForCausalLM(tf.LlamaConfig(**sizes, attn_implementation="sdpa")).eval()


def _explained(model: nn.Module, ids: Tensor) -> Tensor:
    output: Tensor = model(input_ids=ids, use_cache=False, logits_to_keep=1).logits
    return output[:, -1].amax(-1).sum()


def _attributed(model: nn.Module, tokens: int, composite: str) -> Made:
    ids = torch.zeros(1, tokens, dtype=torch.long, device=model.device)
    with Made() as made, lrp_prune.attributing(model, composite, unruled="error") as propagation:
        relevance = propagation.relevance(_explained(model, ids))
    assert relevance["model.embed_tokens"].shape == (1, tokens, model.config.hidden_size)
    return made


def _collected(model: nn.Module, tokens: int, composite: str) -> Made:
    with Made() as made:
        lrp_prune.attribute(model, [torch.zeros(1, tokens, dtype=torch.long)], _explained, composite)
    return made


@pytest.mark.parametrize("composite", COMPOSITES)
@pytest.mark.parametrize("way", [_attributed, _collected])
def test_twice_the_tokens_make_no_more_than_twice_as_much(
    way: Callable[[nn.Module, int, str], Made], composite: str
) -> None:
    """Weights of a few entries leave nothing but what grows with the tokens; what attention makes within itself is not seen."""
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "num_key_value_heads": 1}
    model = _llama(**sizes, num_hidden_layers=1, vocab_size=8)
    short, long = (way(model, tokens, composite) for tokens in (256, 512))
    assert long.total < 2.1 * short.total
    assert long.largest <= 2 * short.largest < 256 * 256
