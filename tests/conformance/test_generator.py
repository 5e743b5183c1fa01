"""Tiny models are small in every dimension, the same each time, and get a batch that fits."""

import pytest
import torch
import transformers as tf

from tests.conformance.columns.case import Case
from tests.support.architectures.batches import NoBatchError, batch_for
from tests.support.architectures.building import attentions, build, number_of_parameters, tiny_config
from tests.support.architectures.mappings import MAPPINGS, pairs, types_of
from tests.support.architectures.shrinking import shrunk
from tests.support.architectures.sizes import stage_width

pytestmark = pytest.mark.slow


def test_every_mapping_has_types() -> None:
    assert all(types_of(mapping) for mapping in MAPPINGS)
    assert ("causal-lm", "llama") in pairs(None, "llama") and ("ctc", "wav2vec2") in pairs(None, "ctc/wav2*")
    assert {mapping for mapping, _ in pairs(["ctc"])} == {"ctc"}


def test_one_layer_of_each_sort_is_kept() -> None:
    config = shrunk(tf.Qwen3NextConfig())
    assert config.layer_types == ["linear_attention", "full_attention"] and config.num_hidden_layers == 2
    config = shrunk(tf.DeepseekV3Config())
    assert config.num_hidden_layers == 2 and config.first_k_dense_replace == 1


def test_key_value_heads_are_grouped_as_they_were() -> None:
    found = {name: tiny_config(name).num_key_value_heads for name in ("llama", "qwen3", "gemma")}
    assert found == {"llama": 4, "qwen3": 4, "gemma": 4}
    assert shrunk(tf.MistralConfig()).num_key_value_heads == 2
    assert shrunk(tf.GemmaConfig(num_attention_heads=8, num_key_value_heads=1)).num_key_value_heads == 1


def test_what_is_inside_is_small_as_well_and_stays_what_it_was() -> None:
    config = tiny_config("paligemma")
    assert config.text_config.hidden_size == config.vision_config.hidden_size == 32
    assert config.text_config.num_key_value_heads == 1  # which the type by itself has 16 of
    assert config.text_config.vocab_size > config.image_token_id > 40


def test_widths_of_stages_depend_on_what_they_were_alone() -> None:
    assert [stage_width(width) for width in (3, 48, 96, 256, 512, 1024, 2048)] == [3, 16, 16, 32, 64, 64, 64]
    config = tiny_config("d_fine")
    assert config.encoder_in_channels[0] == config.backbone_config.stage_out_channels[1]


@pytest.mark.parametrize(("mapping", "name"), [("causal-lm", "llama"), ("image-classification", "resnet")])
def test_a_model_is_the_same_each_time_and_its_biases_are_zero(mapping: str, name: str) -> None:
    first, second = build(mapping, name), build(mapping, name)
    for (key, one), other in zip(first.named_parameters(), second.parameters(), strict=True):
        assert torch.equal(one, other)
        assert bool(one.any()) != key.endswith("bias"), key
        assert one.dtype == torch.float64
    assert number_of_parameters(first) < 100_000
    assert any(
        bool(entry.any()) for key, entry in build(mapping, name, biases=True).named_parameters() if key.endswith("bias")
    ) or (name == "llama")


def test_both_implementations_of_attention_are_known_where_there_are_two() -> None:
    assert attentions("causal-lm", "llama") == ["eager", "sdpa"]
    assert attentions("causal-lm", "gpt_oss") == ["eager"]


def test_a_batch_has_places_for_its_images() -> None:
    model = build("image-text-to-text", "llava")
    batch = batch_for("image-text-to-text", model)
    assert batch["pixel_values"].dtype == torch.float64
    assert int((batch["input_ids"] == model.config.image_token_id).sum()) == 2 * 64
    again = batch_for("image-text-to-text", model)
    assert all(torch.equal(batch[name], again[name]) for name in batch)


def test_sounds_and_codebooks_have_their_tokens() -> None:
    """A token for each frame of a sound, or one of text and one of each codebook."""
    batch = batch_for("seq-to-seq", build("seq-to-seq", "voxtral_realtime"))
    assert batch["input_ids"].shape == batch["labels"].shape == (2, 8) and "input_features" in batch
    model = build("speech-seq-to-seq", "kyutai_speech_to_text")
    batch = batch_for("speech-seq-to-seq", model)
    assert batch["input_ids"].shape == (2, 9, model.config.num_codebooks + 1)
    assert torch.equal(batch["labels"], batch["input_ids"][..., 0])


def test_a_type_that_gives_no_number_in_double_precision_is_looked_at_in_single() -> None:
    case = Case("token-classification", "canine")
    assert [variant.name for variant in case.variants] == ["eager in float32"]
    assert case.dtype == torch.float32 and bool(case.logits(case.first.model)[0].isfinite().all())


def test_attention_that_computes_something_else_in_double_precision_is_looked_at_in_single() -> None:
    names = [variant.name for variant in Case("universal-segmentation", "eomt").variants]
    assert names == ["eager", "sdpa in float32"]


def test_a_model_that_accepts_nothing_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("causal-lm", "llama")
    model.model.embed_tokens.weight.data = torch.zeros(2, 2, dtype=torch.float64)
    with pytest.raises(NoBatchError, match="LlamaForCausalLM: IndexError: index out of range"):
        batch_for("causal-lm", model)
