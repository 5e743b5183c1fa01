"""Padding, on either side, changes neither what is explained nor its relevance."""

from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor, nn
from torch.nn import functional as F

import lrp_prune
from lrp_prune.models import attended_labels, call_of, counted_tokens, logits_for
from lrp_prune.targets import ClassLabel
from tests.support.labelled_models import CASES, VOCABULARY

EXACT: dict[str, Any] = {"composite": "gradient", "statistic": "abs_token", "matmul_dtype": None}
GENERATOR = torch.Generator().manual_seed(2)
LONG = torch.randint(3, VOCABULARY, (1, 9), generator=GENERATOR)
SHORT = torch.randint(3, VOCABULARY, (1, 5), generator=GENERATOR)
LABELS = torch.tensor([0, 2])


def padded(side: str, pad: int = 0) -> dict[str, Tensor]:
    """Both texts in one batch."""
    width = (4, 0) if side == "left" else (0, 4)
    ids = torch.cat([F.pad(SHORT, width, value=pad), LONG])
    mask = torch.cat([F.pad(torch.ones_like(SHORT), width), torch.ones_like(LONG)])
    return {"input_ids": ids, "attention_mask": mask, "labels": LABELS}


def classifier(kind: str) -> nn.Module:
    """A classifier on top of a decoder or of an encoder."""
    if kind == "llama":
        torch.manual_seed(0)
        config = tf.LlamaConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            vocab_size=VOCABULARY,
            num_labels=3,
            pad_token_id=0,
        )
        return tf.LlamaForSequenceClassification(config).eval()
    return CASES[f"{kind} classes"].made()[0]


@pytest.mark.parametrize(
    ("kind", "side"), [("gpt2", "left"), ("gpt2", "right"), ("llama", "left"), ("llama", "right"), ("bert", "right")]
)
def test_a_classifier_explains_the_logit_of_the_text_whatever_is_beside_it(kind: str, side: str) -> None:
    model = classifier(kind)
    alone = [{"input_ids": ids, "labels": LABELS[place : place + 1]} for place, ids in enumerate((SHORT, LONG))]
    expected = sum(model(input_ids=each["input_ids"]).logits[0, int(each["labels"])] for each in alone)
    torch.testing.assert_close(ClassLabel()(model, padded(side)), expected, rtol=1e-4, atol=1e-6)
    one, other = lrp_prune.attribute(model, [padded(side)], **EXACT), lrp_prune.attribute(model, alone, **EXACT)
    assert one.target == other.target == "class"
    for name in other:
        torch.testing.assert_close(one[name], other[name], rtol=1e-3, atol=1e-5 * float(other[name].max()))


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_classifier_that_would_read_padding_is_refused(side: str) -> None:
    model, batch = classifier("gpt2"), padded(side, pad=7)  # not the token that the configuration says
    if side == "left":  # what is read last is no padding
        ClassLabel()(model, batch)
        return
    with pytest.raises(
        ValueError, match=r"last token that is not pad_token_id=0, which is padding in sample 0.*pads \(7\)"
    ):
        lrp_prune.attribute(model, [batch])
    model.config.pad_token_id = None
    with pytest.raises(ValueError, match="reads the last token, which is padding"):
        ClassLabel()(model, {name: value[:1] for name, value in batch.items()})


@pytest.mark.parametrize("name", ["bert classes", "bert token classification", "bert masked"])
def test_an_encoder_keeps_the_positions_of_its_training(name: str) -> None:
    model, batch = CASES[name].made()
    flipped = {key: value.flip(1) if value.dim() == 2 else value for key, value in batch.items()}
    assert not bool(flipped["attention_mask"][0, 0])
    given = {key: value for key, value in flipped.items() if key != "labels"}
    torch.testing.assert_close(logits_for(model, flipped), model(**given).logits)


@pytest.mark.parametrize("decoder", [False, True])
def test_models_that_count_attended_tokens_themselves_are_left_to_it(decoder: bool) -> None:
    torch.manual_seed(0)
    config = tf.RobertaConfig(
        is_decoder=decoder,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        vocab_size=VOCABULARY,
        num_labels=3,
        max_position_embeddings=20,
    )
    model, batch = tf.RobertaForSequenceClassification(config).eval(), padded("left", pad=1)
    assert "position_ids" not in call_of(model, batch).kwargs
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    torch.testing.assert_close(ClassLabel()(model, batch), logits[[0, 1], LABELS].sum())
    assert "position_ids" in call_of(classifier("gpt2"), batch).kwargs


def test_tokens_given_as_embeddings_are_tokens() -> None:
    model, batch = CASES["gpt2"].made()
    embedded = {"inputs_embeds": torch.randn(4, 10, 32), "attention_mask": batch["attention_mask"]}
    for given in (batch, embedded):
        attended, counted = attended_labels(model, given), counted_tokens(model, given, 1)
        assert attended is not None and counted is not None
        assert torch.equal(attended, batch["attention_mask"].bool())
        assert int(counted.sum()) == int(attended.sum()) - 4
