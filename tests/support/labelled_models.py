"""Tiny models for many tasks, batches with labels, and the value that is to be explained of each, computed independently."""

from collections.abc import Callable
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
import transformers as tf
from torch import Tensor, nn
from torch.nn import functional as F

from tests.support.likelihood import how_likely

VOCABULARY = 50
SAMPLES, TOKENS = 4, 10
_BERT: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": VOCABULARY,
}
_T5: dict[str, Any] = {
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_heads": 4,
    "vocab_size": VOCABULARY,
    "decoder_start_token_id": 0,
    "pad_token_id": 0,
    "eos_token_id": 2,
}
_BART: dict[str, Any] = {
    "d_model": 32,
    **{f"{part}_{what}": value for part in ("encoder", "decoder") for what, value in (("layers", 2), ("ffn_dim", 48))},
    **{f"{part}_attention_heads": 4 for part in ("encoder", "decoder")},
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
}
_GPT2: dict[str, Any] = {
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "vocab_size": VOCABULARY,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 1,
}
_IMAGES: dict[str, Any] = {**_BERT, "image_size": 16, "patch_size": 4}
_SEGFORMER: dict[str, Any] = {
    "num_encoder_blocks": 2,
    "depths": [1, 1],
    "sr_ratios": [2, 1],
    "hidden_sizes": [8, 16],
    "patch_sizes": [3, 3],
    "strides": [2, 2],
    "num_attention_heads": [1, 2],
    "mlp_ratios": [2, 2],
    "decoder_hidden_size": 16,
}

Batch = dict[str, Tensor]
Expected = Callable[[nn.Module, Batch], Tensor]


class Case(NamedTuple):
    """A model, a batch for it, the name of what is explained, and its value by other means."""

    build: Callable[[], nn.Module]
    batch: Callable[[torch.Generator], Batch]
    target: str
    expected: Expected

    def made(self) -> tuple[nn.Module, Batch]:
        """The model in evaluation mode, and the batch."""
        torch.manual_seed(0)
        return self.build().eval(), self.batch(torch.Generator().manual_seed(1))


def _text(generator: torch.Generator, tokens: int = TOKENS, pad: int = 0) -> Batch:
    ids = torch.randint(3, VOCABULARY, (SAMPLES, tokens), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, 6:] = 0
    return {"input_ids": ids.masked_fill(mask == 0, pad), "attention_mask": mask}


def _tagged(generator: torch.Generator) -> Batch:
    batch = _text(generator)
    tags = torch.randint(0, 5, (SAMPLES, TOKENS), generator=generator)
    return {**batch, "labels": tags.masked_fill(batch["attention_mask"] == 0, -100)}


def _masked(generator: torch.Generator) -> Batch:
    batch = _text(generator)
    chosen = (torch.rand(SAMPLES, TOKENS, generator=generator) < 0.3) & (batch["attention_mask"] == 1)
    labels = batch["input_ids"].masked_fill(~chosen, -100)
    return {**batch, "input_ids": batch["input_ids"].masked_fill(chosen, 2), "labels": labels}


def _continued(generator: torch.Generator) -> Batch:
    batch = _text(generator)
    return {**batch, "labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)}


def _translated(generator: torch.Generator, pad: int = 0) -> Batch:
    labels = torch.randint(3, VOCABULARY, (SAMPLES, 7), generator=generator)
    labels[1, 5:] = -100
    return {**_text(generator, pad=pad), "labels": labels}


def _classified(labels: Callable[[torch.Generator], Tensor], pad: int = 0) -> Callable[[torch.Generator], Batch]:
    def batch(generator: torch.Generator) -> Batch:
        given = _text(generator, pad=pad)
        last = given["attention_mask"].sum(1) - 1
        given["input_ids"][torch.arange(SAMPLES), last] = 2  # the end of the text, which encoder-decoders read
        return {**given, "labels": labels(generator)}

    return batch


def _classes(generator: torch.Generator) -> Tensor:
    return torch.tensor([0, 2, 1, 1])


def _pictured(labels: Callable[[torch.Generator], Tensor]) -> Callable[[torch.Generator], Batch]:
    return lambda generator: {
        "pixel_values": torch.randn(SAMPLES, 3, 16, 16, generator=generator),
        "labels": labels(generator),
    }


def _pixels(classes: int) -> Callable[[torch.Generator], Tensor]:
    def labels(generator: torch.Generator) -> Tensor:
        drawn = torch.randint(0, classes, (SAMPLES, 16, 16), generator=generator)
        return drawn.masked_fill(torch.rand(SAMPLES, 16, 16, generator=generator) < 0.1, 255)

    return labels


def by_labels(model: nn.Module, batch: Batch, ignored: int = -100, shift: int = 0) -> Tensor:
    """How likely the labels are by logits whose mean log-probability is minus the model's own loss."""
    output, labels = model(**batch), batch["labels"][:, shift:]
    logits = output.logits[:, : output.logits.shape[1] - shift]
    if logits.dim() == 4:
        logits = F.interpolate(logits, labels.shape[1:], mode="bilinear").movedim(1, -1)
    loss = F.cross_entropy(logits.flatten(0, -2), labels.flatten(), ignore_index=ignored)
    torch.testing.assert_close(loss, output.loss)
    return how_likely(logits, labels, ignored)


def by_shifted_labels(model: nn.Module, batch: Batch) -> Tensor:
    """The same of labels that are about the next token."""
    return by_labels(model, batch, shift=1)


def _by_pixel_labels(model: nn.Module, batch: Batch) -> Tensor:
    return by_labels(model, batch, 255)


def _logits(model: nn.Module, batch: Batch) -> Tensor:
    logits: Tensor = model(**{name: value for name, value in batch.items() if name != "labels"}).logits
    return logits


def by_class(model: nn.Module, batch: Batch) -> Tensor:
    """The logits of the classes."""
    return _logits(model, batch)[torch.arange(len(batch["labels"])), batch["labels"]].sum()


def by_signs(model: nn.Module, batch: Batch) -> Tensor:
    """Logits of set labels minus those of others."""
    logits, labels = _logits(model, batch), batch["labels"]
    return logits[labels == 1].sum() - logits[labels == 0].sum()


def _by_pixel_signs(model: nn.Module, batch: Batch) -> Tensor:
    logits, labels = F.interpolate(_logits(model, batch), (16, 16), mode="bilinear")[:, 0], batch["labels"]
    return logits[labels == 1].sum() - logits[labels == 0].sum()


def by_size(model: nn.Module, batch: Batch) -> Tensor:
    """The absolute values of the outputs."""
    return _logits(model, batch).abs().sum()


def _by_span(model: nn.Module, batch: Batch) -> Tensor:
    output = model(**{name: value for name, value in batch.items() if "positions" not in name})
    rows = torch.arange(SAMPLES)
    ends = batch["end_positions"] < TOKENS
    start: Tensor = output.start_logits[rows, batch["start_positions"]].sum()
    return start + output.end_logits[rows[ends], batch["end_positions"][ends]].sum()


def _answered(generator: torch.Generator) -> Batch:
    batch = _classified(_classes, pad=1)(generator)
    del batch["labels"]
    return {**batch, "start_positions": torch.tensor([1, 2, 3, 4]), "end_positions": torch.tensor([2, 2, 5, 40])}


def _bert(head: str, **config: Any) -> Callable[[], nn.Module]:
    return lambda: getattr(tf, f"BertFor{head}")(tf.BertConfig(**_BERT, **config))


CASES: dict[str, Case] = {
    "bert token classification": Case(_bert("TokenClassification", num_labels=5), _tagged, "token", by_labels),
    "electra token classification": Case(
        lambda: tf.ElectraForTokenClassification(tf.ElectraConfig(**_BERT, embedding_size=32, num_labels=5)),
        _tagged,
        "token",
        by_labels,
    ),
    "distilbert token classification": Case(
        lambda: tf.DistilBertForTokenClassification(
            tf.DistilBertConfig(dim=32, hidden_dim=48, n_layers=2, n_heads=4, vocab_size=VOCABULARY, num_labels=5)
        ),
        _tagged,
        "token",
        by_labels,
    ),
    "t5 token classification": Case(
        lambda: tf.T5ForTokenClassification(tf.T5Config(**_T5, num_labels=5)), _tagged, "token", by_labels
    ),
    "bert masked": Case(_bert("MaskedLM"), _masked, "token", by_labels),
    "gpt2": Case(lambda: tf.GPT2LMHeadModel(tf.GPT2Config(**_GPT2)), _continued, "next_token", by_shifted_labels),
    "bart decoder": Case(lambda: tf.BartForCausalLM(tf.BartConfig(**_BART)), _continued, "token", by_labels),
    "t5": Case(lambda: tf.T5ForConditionalGeneration(tf.T5Config(**_T5)), _translated, "next_token", by_labels),
    "bart": Case(
        lambda: tf.BartForConditionalGeneration(tf.BartConfig(**_BART)),
        lambda generator: _translated(generator, pad=1),
        "next_token",
        by_labels,
    ),
    "bert classes": Case(_bert("SequenceClassification", num_labels=3), _classified(_classes), "class", by_class),
    "gpt2 classes": Case(
        lambda: tf.GPT2ForSequenceClassification(tf.GPT2Config(**_GPT2, num_labels=3)),
        _classified(_classes),
        "class",
        by_class,
    ),
    "t5 classes": Case(
        lambda: tf.T5ForSequenceClassification(tf.T5Config(**_T5, num_labels=3)),
        _classified(_classes),
        "class",
        by_class,
    ),
    "bart classes": Case(
        lambda: tf.BartForSequenceClassification(tf.BartConfig(**_BART, num_labels=3)),
        _classified(_classes, pad=1),
        "class",
        by_class,
    ),
    "bert several labels": Case(
        _bert("SequenceClassification", num_labels=3, problem_type="multi_label_classification"),
        _classified(lambda generator: torch.tensor([[0.0, 1, 1], [1, 0, 0], [0, 0, 0], [1, 1, 1]])),
        "multi_label",
        by_signs,
    ),
    "bert one value": Case(
        _bert("SequenceClassification", num_labels=1),
        _classified(lambda generator: torch.randn(SAMPLES, generator=generator)),
        "regression",
        by_size,
    ),
    "bert several values": Case(
        _bert("SequenceClassification", num_labels=3, problem_type="regression"),
        _classified(lambda generator: torch.randn(SAMPLES, 3, generator=generator)),
        "regression",
        by_size,
    ),
    "vit": Case(
        lambda: tf.ViTForImageClassification(tf.ViTConfig(**_IMAGES, num_labels=3)),
        _pictured(_classes),
        "class",
        by_class,
    ),
    "segformer": Case(
        lambda: tf.SegformerForSemanticSegmentation(tf.SegformerConfig(**_SEGFORMER, num_labels=4)),
        _pictured(_pixels(4)),
        "token",
        _by_pixel_labels,
    ),
    "segformer of one class": Case(
        lambda: tf.SegformerForSemanticSegmentation(tf.SegformerConfig(**_SEGFORMER, num_labels=1)),
        _pictured(_pixels(2)),
        "multi_label",
        _by_pixel_signs,
    ),
    "bert questions": Case(_bert("QuestionAnswering"), _answered, "span", _by_span),
    "bart questions": Case(lambda: tf.BartForQuestionAnswering(tf.BartConfig(**_BART)), _answered, "span", _by_span),
}


class Lightning(pl.LightningModule):
    """A model without a forward around it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.criterion = nn.CrossEntropyLoss()


class Logits(Lightning):
    """A forward with one parameter, which is the batch."""

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        logits: Tensor = self.model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        return logits


class HandsOn(Lightning):
    """Everything is handed on, as a training step does."""

    def forward(self, **batch: Tensor) -> Any:
        return self.model(**batch)
