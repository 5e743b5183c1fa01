"""Tiny models with random weights of the architectures that transformers ships, and batches for them."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
import transformers as tf
from torch import Tensor, nn

VOCABULARY = 50
_LLAMA: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
}
_BERT: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


def llama(**changes: Any) -> tf.LlamaForCausalLM:
    """A still smaller Llama of any configuration, with random weights."""
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "vocab_size": 26,
    }
    return tf.LlamaForCausalLM(tf.LlamaConfig(**{**sizes, **changes}))


def _causal(name: str, **config: Any) -> Callable[..., nn.Module]:
    def build(**attention: Any) -> nn.Module:
        configuration = getattr(tf, f"{name}Config", None) or getattr(tf, f"{name}TextConfig")
        model: nn.Module = getattr(tf, f"{name}ForCausalLM")(configuration(**{**config, **attention}))
        return model

    return build


CAUSAL: dict[str, Callable[..., nn.Module]] = {
    "llama": _causal("Llama", **_LLAMA),
    "mistral": _causal("Mistral", **_LLAMA, head_dim=8),
    "qwen2": _causal("Qwen2", **_LLAMA),
    "qwen3": _causal("Qwen3", **_LLAMA, head_dim=8),
    "gemma": _causal("Gemma", **_LLAMA, head_dim=8),
    "phi3": _causal("Phi3", **_LLAMA, pad_token_id=0, eos_token_id=1, bos_token_id=1),
    "mixtral": _causal("Mixtral", **_LLAMA, num_local_experts=4),
    "opt": _causal(
        "OPT",
        hidden_size=32,
        ffn_dim=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=VOCABULARY,
        word_embed_proj_dim=32,
    ),
    "gpt2": lambda **attention: tf.GPT2LMHeadModel(
        tf.GPT2Config(
            n_embd=32, n_layer=2, n_head=4, vocab_size=VOCABULARY, bos_token_id=1, eos_token_id=1, **attention
        )
    ),
}
OTHERS: dict[str, Callable[..., nn.Module]] = {
    "bert": lambda **attention: tf.BertForSequenceClassification(
        tf.BertConfig(**_BERT, vocab_size=VOCABULARY, **attention)
    ),
    "vit": lambda **attention: tf.ViTForImageClassification(
        tf.ViTConfig(**_BERT, image_size=16, patch_size=4, **attention)
    ),
}
ARCHITECTURES = {**CAUSAL, **OTHERS}
NO_CHOICE: dict[str, Callable[..., nn.Module]] = {
    "t5": lambda: tf.T5ForConditionalGeneration(
        tf.T5Config(d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, vocab_size=VOCABULARY)
    ),
    "bloom": lambda: tf.BloomForCausalLM(tf.BloomConfig(hidden_size=32, n_layer=2, n_head=4, vocab_size=VOCABULARY)),
    "resnet": lambda: tf.ResNetForImageClassification(
        tf.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1])
    ),
}
"""Models whose attention implementation is not chosen here."""
_ENCODER_DECODER: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "decoder_start_token_id": 0,
    "forced_eos_token_id": None,
}
POSITIONS: dict[str, Callable[..., nn.Module]] = {
    "marian": lambda: tf.MarianMTModel(tf.MarianConfig(**_ENCODER_DECODER)),
    "pegasus": lambda: tf.PegasusForConditionalGeneration(tf.PegasusConfig(**_ENCODER_DECODER)),
    "xglm": lambda: tf.XGLMForCausalLM(
        tf.XGLMConfig(
            vocab_size=VOCABULARY, d_model=32, ffn_dim=48, num_layers=2, attention_heads=4, max_position_embeddings=64
        )
    ),
    "ctrl": lambda: tf.CTRLLMHeadModel(
        tf.CTRLConfig(vocab_size=VOCABULARY, n_positions=64, n_embd=32, dff=48, n_layer=2, n_head=4)
    ),
    "clip_vision": lambda: tf.CLIPVisionModel(tf.CLIPVisionConfig(**_BERT, image_size=16, patch_size=4)),
    "bart": lambda: tf.BartForConditionalGeneration(tf.BartConfig(**_ENCODER_DECODER, bos_token_id=2)),
}
"""Models with a class token or positions of their own kind, from constants or from parameters."""
GATED: dict[str, Callable[..., nn.Module]] = {
    "gpt_oss": _causal(
        "GptOss", **_LLAMA, head_dim=8, num_local_experts=4, num_experts_per_tok=2, pad_token_id=0, eos_token_id=1
    ),
    "qwen3_next": _causal(
        "Qwen3Next",
        **{**_LLAMA, "num_hidden_layers": 4},
        head_dim=8,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
        linear_num_value_heads=4,
        linear_num_key_heads=2,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
    ),
}
"""Models whose attention has sinks, or a gate."""


def build(
    name: str, attention: str | None = "sdpa", biases: bool = True, dtype: torch.dtype = torch.float32
) -> nn.Module:
    """A tiny model in evaluation mode; without biases all of them are zero, so that nothing absorbs relevance."""
    torch.manual_seed(0)
    others = {**NO_CHOICE, **POSITIONS, **GATED}
    model = others[name]() if name in others else ARCHITECTURES[name](attn_implementation=attention)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith("bias"):
                parameter.copy_(0.1 * torch.randn_like(parameter) if biases else torch.zeros_like(parameter))
    return model.eval().to(dtype)


def batch_for(name: str, samples: int = 2, tokens: int = 7, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Inputs for the model of that name, without labels."""
    generator = torch.Generator().manual_seed(1)
    if name in ("vit", "clip_vision"):
        return {"pixel_values": torch.randn(samples, 3, 16, 16, generator=generator).to(dtype)}
    if name == "resnet":
        return {"pixel_values": torch.randn(samples, 3, 32, 32, generator=generator).to(dtype)}
    ids = torch.randint(3, VOCABULARY, (samples, tokens), generator=generator)
    encoder_decoder = name in ("t5", "marian", "pegasus", "bart")
    return {"input_ids": ids, "decoder_input_ids": ids} if encoder_decoder else {"input_ids": ids}


def forward(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Logits ``[batch, classes]``: of a classifier, or at the last token; of a model without a head what it pools."""
    caches = hasattr(model.config, "use_cache")  # type: ignore[union-attr]
    output = model(**batch, **({"use_cache": False} if caches else {}))
    logits: Tensor = output.logits if hasattr(output, "logits") else output.pooler_output
    return logits[:, -1] if logits.dim() == 3 else logits


def largest_sum(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """The largest logits of all samples, as a value to explain."""
    return forward(model, batch).amax(-1).sum()


class Single(nn.Module):
    """A function as a model."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class Counting(nn.Module):
    """A layer that writes into a buffer whenever it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 3)
        self.register_buffer("runs", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        self.runs += 1
        return self.layer(x)


def mixture(name: str) -> Any:
    """A model of experts in evaluation mode, whose implementation can be chosen."""
    torch.manual_seed(0)
    sizes = {**_LLAMA, "num_experts_per_tok": 2}
    if name == "mixtral":
        model = tf.MixtralForCausalLM(tf.MixtralConfig(**sizes, num_local_experts=4))
    elif name == "qwen2_moe":
        more = {"num_experts": 4, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 24}
        model = tf.Qwen2MoeForCausalLM(tf.Qwen2MoeConfig(**sizes, **more))
    else:
        model = tf.GptOssForCausalLM(tf.GptOssConfig(**sizes, num_local_experts=4, head_dim=8))
    return model.eval()


def padded_text(padding: int, samples: int = 2, tokens: int = 16) -> dict[str, Tensor]:
    """Labelled text with so many places of padding behind it, the same for any number of them."""
    ids = torch.randint(3, VOCABULARY, (samples, tokens), generator=torch.Generator().manual_seed(1))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    return {name: F.pad(entry, (0, padding), value=-100 if name == "labels" else 0) for name, entry in batch.items()}
