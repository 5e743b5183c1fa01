"""The models of the panel: each is made and trained here in seconds to a minute."""

import copy
import functools
import math
from typing import Any

import torch
import transformers as tf
from torch import Tensor, nn

from tests.benchmarks.panel_data import (
    Data,
    character_guess,
    character_windows,
    characters,
    counted_sequences,
    digits,
    eras,
    friedman,
    language_model,
    marked_sequences,
    masked_chains,
    reversed_sequences,
    tagged,
    token_guess,
    token_windows,
    words,
)
from tests.benchmarks.panel_training import (
    Case,
    accuracy,
    accuracy_from_the_third_token,
    class_loss,
    likelihood,
    minus_squares,
    own_loss,
    sequence_accuracy,
    squared_loss,
    train,
)


class RowReader(nn.Module):
    """An LSTM that reads an image row by row."""

    def __init__(self) -> None:
        super().__init__()
        self.rows, self.head = nn.LSTM(8, 64, num_layers=2, batch_first=True), nn.Linear(64, 10)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.rows(images)[0][:, -1])
        return logits


class PostNorm(nn.Module):
    """torch's own encoder, normed after each part, on the rows of an image."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.place = nn.Linear(8, 48), nn.Parameter(0.1 * torch.randn(1, 8, 48))
        layer = nn.TransformerEncoderLayer(48, 4, 96, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
        self.head = nn.Linear(48, 10)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.encoder(self.embed(images) + self.place).mean(1))
        return logits


def conv_bn(inputs: int, outputs: int, size: int, **options: Any) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, size, bias=False, **options), nn.BatchNorm2d(outputs))


class ResidualNet(nn.Module):
    """Residual blocks of convolutions with batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(1, 24, 3, padding=1)
        self.first = nn.ModuleList([conv_bn(24, 24, 3, padding=1) for _ in range(3)])
        self.second = nn.ModuleList([conv_bn(24, 24, 3, padding=1) for _ in range(3)])
        self.head = nn.Linear(24, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        for one, two in zip(self.first, self.second, strict=True):
            x = (two(one(x).relu()) + x).relu()
        logits: Tensor = self.head(x.mean((2, 3)))
        return logits


def plain_cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(32 * 16, 64), nn.ReLU(), nn.Linear(64, 10),
    )  # fmt: skip


def depthwise_cnn() -> nn.Module:
    layers: list[nn.Module] = [conv_bn(1, 24, 3, padding=1), nn.ReLU()]
    for inputs, outputs, stride in ((24, 32, 1), (32, 48, 2), (48, 48, 1)):
        layers += [conv_bn(inputs, inputs, 3, padding=1, groups=inputs, stride=stride), nn.ReLU()]
        layers += [conv_bn(inputs, outputs, 1), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(48, 10))


def mlp(inputs: int, outputs: int) -> nn.Module:
    return nn.Sequential(
        nn.Linear(inputs, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, outputs)
    )  # fmt: skip


_BERT: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "max_position_embeddings": 64,
}
_LLAMA: dict[str, Any] = {
    "hidden_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 192,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
}

_SMALL_LLAMA: dict[str, Any] = {
    "hidden_size": 24,
    "num_hidden_layers": 1,
    "intermediate_size": 48,
    "pad_token_id": None,
}


def _bert(kind: str, vocabulary: int, **options: Any) -> nn.Module:
    model: nn.Module = getattr(tf, kind)(tf.BertConfig(**{**_BERT, "vocab_size": vocabulary, **options}))
    return model


def _distilbert() -> nn.Module:
    config = tf.DistilBertConfig(
        vocab_size=words()[2], dim=64, n_layers=3, n_heads=4, hidden_dim=128, max_position_embeddings=64,
        dropout=0.0, attention_dropout=0.0, seq_classif_dropout=0.0, num_labels=4,
    )  # fmt: skip
    return tf.DistilBertForSequenceClassification(config)


def _vit() -> nn.Module:
    config = tf.ViTConfig(
        image_size=8, patch_size=2, num_channels=1, hidden_size=64, num_hidden_layers=3, num_attention_heads=4,
        intermediate_size=128, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, num_labels=10,
    )  # fmt: skip
    return tf.ViTForImageClassification(config)


def _t5() -> nn.Module:
    config = tf.T5Config(
        vocab_size=24,
        d_model=64,
        d_kv=16,
        d_ff=128,
        num_layers=2,
        num_heads=4,
        dropout_rate=0.0,
        decoder_start_token_id=0,
    )
    return tf.T5ForConditionalGeneration(config)


def _mixture() -> nn.Module:
    config = tf.MixtralConfig(
        vocab_size=characters()[1], **{**_LLAMA, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2},
        num_local_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    return tf.MixtralForCausalLM(config)


@functools.cache
def _turned_vit() -> dict[str, Tensor]:
    """A ViT that has learnt digits that lie on their left side: what the LoRA case starts from."""
    torch.manual_seed(100)
    model = _vit()
    turned = [
        {"pixel_values": batch["pixel_values"].rot90(1, (2, 3)), "labels": batch["labels"]}
        for batch in digits((1, 8, 8), "pixel_values")(100).train
    ]
    case = Case("turned", _vit, lambda seed: Data(turned, turned, turned), class_loss, accuracy, 0.1, 10)
    for _ in train(case, model, turned, case.epochs, case.rate, 100):
        pass
    return model.state_dict()


def _lora() -> nn.Module:
    """The same with adapters of rank 8 at queries and values, and a classifier of its own, to learn digits upright."""
    from peft import LoraConfig, get_peft_model

    model = _vit()
    model.load_state_dict(_turned_vit())
    config = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], modules_to_save=["classifier"])
    adapted: nn.Module = get_peft_model(model, config)
    return adapted


def _smollm2() -> nn.Module:
    model: nn.Module = copy.deepcopy(language_model()[0])
    return model


def cases() -> list[Case]:
    """All of them, the quickest first."""
    vocabulary = characters()[1]
    guess = character_guess()
    return [
        Case("mlp", lambda: mlp(64, 10), digits((64,)), class_loss, accuracy, 0.1, 12),
        Case("regression", lambda: mlp(10, 1), friedman, squared_loss, minus_squares, -1.0, 25),
        Case("lstm", RowReader, digits((8, 8)), class_loss, accuracy, 0.1, 15, 4e-3),
        Case("cnn", plain_cnn, digits((1, 8, 8)), class_loss, accuracy, 0.1, 8),
        Case("resnet", ResidualNet, digits((1, 8, 8)), class_loss, accuracy, 0.1, 8, 4e-3),
        Case("depthwise", depthwise_cnn, digits((1, 8, 8)), class_loss, accuracy, 0.1, 12, 4e-3),
        Case("encoder", PostNorm, digits((8, 8)), class_loss, accuracy, 0.1, 15),
        Case("vit", _vit, digits((1, 8, 8), "pixel_values"), class_loss, accuracy, 0.1, 15),
        Case(
            "bert-sure", lambda: _bert("BertForSequenceClassification", 100, num_labels=2), marked_sequences,
            class_loss, accuracy, 0.5, 8,
        ),
        Case(
            "bert-unsure", lambda: _bert("BertForSequenceClassification", words()[2], num_labels=4), eras,
            class_loss, accuracy, 0.25, 4,
        ),
        Case("distilbert", _distilbert, eras, class_loss, accuracy, 0.25, 4),
        Case(
            "bert-tags", lambda: _bert("BertForTokenClassification", 100, num_labels=4), tagged,
            own_loss, sequence_accuracy, 0.25, 8,
        ),
        Case("t5", _t5, reversed_sequences, own_loss, sequence_accuracy, 0.05, 20),
        Case(
            "bert-masked", lambda: _bert("BertForMaskedLM", 62), masked_chains, own_loss, likelihood, -math.log(60), 12,
        ),
        Case(
            "llama", lambda: tf.LlamaForCausalLM(tf.LlamaConfig(vocab_size=vocabulary, **_LLAMA)),
            character_windows(96, 6000), own_loss, likelihood, guess, 2,
        ),
        Case(
            "llama-sure",
            lambda: tf.LlamaForCausalLM(tf.LlamaConfig(vocab_size=16, **{**_LLAMA, **_SMALL_LLAMA})),
            counted_sequences, own_loss, accuracy_from_the_third_token, 1 / 16, 30, 3e-3,
        ),
        Case("mixture", _mixture, character_windows(96, 6000), own_loss, likelihood, guess, 1.5),
        Case("lora", _lora, digits((1, 8, 8), "pixel_values"), class_loss, accuracy, 0.1, 15, 4e-3),
        *(
            Case(name, _smollm2, token_windows(manual), own_loss, likelihood, functools.partial(token_guess, manual), 0)
            for name, manual in (("smollm2-speeches", False), ("smollm2-manual", True))
        ),
    ]  # fmt: skip
