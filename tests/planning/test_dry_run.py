"""A forward without data keeps what one with data does, whatever the model asks about entries on its way."""

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig, MambaConfig, MixtralConfig

import lrp_prune
from lrp_prune.planning.dry_run import Collecting
from lrp_prune.pruning.methods import collected_by, method_of
from lrp_prune.relevance import granularities_of

SIZES = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2,
    "vocab_size": 50,
}  # fmt: skip


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value, self.last = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        pattern = (self.query(x) @ self.key(x).mT).softmax(-1)
        result: Tensor = self.last(pattern @ self.value(x))
        return result


class Computed(nn.Module):
    """With weights that are functions of parameters, some of which keep zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.decay, self.bounded, self.masked = (nn.Parameter(torch.randn(8, 8)) for _ in range(3))
        self.last = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        masked = self.masked.masked_fill(torch.eye(8, dtype=torch.bool), 0.0)
        result: Tensor = self.last(x @ -torch.exp(self.decay) + x @ torch.tanh(self.bounded) + x @ masked)
        return result


def _language_model(configuration: object, **options: str) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = AutoModelForCausalLM.from_config(configuration, **options)
    return model


def _ids() -> dict[str, Tensor]:
    return {"input_ids": torch.arange(12).view(2, 6)}


def _left_padded() -> dict[str, Tensor]:
    return {**_ids(), "attention_mask": torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])}


CASES = {
    "layers": lambda: (nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3)), torch.randn(4, 8)),
    "convolutions": lambda: (
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 4)).eval(),
        torch.randn(2, 3, 8, 8),
    ),
    "attention": lambda: (Attending(), torch.randn(2, 5, 8)),
    "computed weights": lambda: (Computed(), torch.randn(2, 8)),
    "llama": lambda: (_language_model(LlamaConfig(**SIZES)), _ids()),
    "eager llama": lambda: (_language_model(LlamaConfig(**SIZES), attn_implementation="eager"), _left_padded()),
    "gemma2": lambda: (_language_model(Gemma2Config(head_dim=8, **SIZES)), _ids()),
    "mixtral": lambda: (_language_model(MixtralConfig(num_local_experts=2, num_experts_per_tok=1, **SIZES)), _ids()),
    "mamba": lambda: (_language_model(MambaConfig(hidden_size=16, num_hidden_layers=1, vocab_size=50)), _ids()),
}
UNITS = [("layers", "neuron"), ("convolutions", "neuron"), ("attention", "neuron"), ("attention", "head")]
UNITS += [("llama", "neuron"), ("llama", "head"), ("eager llama", "head"), ("gemma2", "neuron")]


def _kept_with_data(model: nn.Module, batch: object, granularity: str) -> int:
    """Bytes that a forward keeps beside the weights."""
    kinds = granularities_of(granularity)
    collected = collected_by(method_of("lrp"), kinds)
    assert collected is not None
    options = {"granularity": granularity, "include": None, "exclude": None, "trainable_only": False}
    own = {entry.untyped_storage()._cdata for entry in (*model.parameters(), *model.buffers())}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = Collecting(model, collected, options)(batch)
    keep(output if isinstance(output, Tensor) else output.logits)
    return sum(entry.untyped_storage().nbytes() for storage, entry in kept.items() if storage not in own)


@pytest.mark.parametrize(("case", "granularity"), [*((case, "weight") for case in CASES), *UNITS])
def test_as_much_is_kept_as_with_data(case: str, granularity: str) -> None:
    model, batch = CASES[case]()
    plan = lrp_prune.estimate(model, batch=batch, granularity=granularity)
    assert plan.activations == pytest.approx(_kept_with_data(model, batch, granularity), rel=0.1)
