"""Long inputs: nothing is made that grows with the square of the tokens, beside the model's own attention."""

from collections.abc import Callable
from contextlib import nullcontext
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


_7B = {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32, "vocab_size": 32000}


def _by_shapes(tokens: int, composite: str | None) -> int:
    """Entries made for the relevance of a model as wide as Llama 7B; without a composite by its own forward and backward."""
    with torch.device("meta"):
        model = _llama(**_7B, num_hidden_layers=2).requires_grad_(False)
        batch = {
            "inputs_embeds": torch.zeros(1, tokens, 4096, requires_grad=True),
            "attention_mask": torch.ones(1, 1, tokens, tokens, dtype=torch.bool),
        }
    rules = nullcontext() if composite is None else lrp_prune.attributing(model, composite, unruled="error")
    with Made() as made, rules as propagation:
        value = model(**batch, use_cache=False, logits_to_keep=1).logits.amax(-1).sum()
        if propagation is None:
            torch.autograd.grad(value, batch["inputs_embeds"])
        else:
            assert propagation.relevance(value)["inputs_embeds"].shape == (1, tokens, 4096)
    return made.total


@pytest.mark.parametrize("composite", [*COMPOSITES, "epsilon_plus"])
def test_a_large_model_s_relevance_adds_to_its_own_attention_what_grows_with_the_tokens(composite: str) -> None:
    """By shapes alone, on the meta device, where what attention makes within itself is seen: 34 billion entries, several times.

    CP-LRP makes less than the model's own backward pass does, since nothing goes to queries and keys.
    """
    short, long = (_by_shapes(tokens, composite) - _by_shapes(tokens, None) for tokens in (16384, 32768))
    assert long < short < 0 if composite == "cp_lrp" else 0 < long < 2.1 * short, (short, long)


def test_weights_of_a_model_without_values_are_not_scored() -> None:
    with torch.device("meta"):
        model = nn.Linear(4, 3)
    with pytest.raises(ValueError, match=r"explained value is on the meta device.*load the weights"):
        lrp_prune.attribute(model, [torch.ones(2, 4, device="meta")], lambda model, batch: model(batch).sum())
