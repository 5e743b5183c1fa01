"""At which of several places an explanation is, and that it is nowhere by chance."""

import pytest
import torch
import transformers as tf

import lrp_prune
from lrp_prune.metrics import perturbation_curve
from tests.support.small_models import batch_for
from tests.support.words import of_pieces


def test_what_answers_by_token_is_explained_where_it_is_asked() -> None:
    ids = batch_for("bert")["input_ids"]
    config = tf.BertConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, vocab_size=50
    )
    model = tf.BertForMaskedLM(config).eval()
    labels = torch.full_like(ids, -100)
    labels[0, 2], labels[1, 4] = 7, 8
    found = lrp_prune.explain(model, {"input_ids": ids, "labels": labels})
    logits = model(ids).logits[[0, 1], [2, 4]].detach()
    torch.testing.assert_close(found.values, logits.amax(-1))
    assert found.target.endswith("at token 2, 4")
    for silent in (model, tf.BertForTokenClassification(config).eval()):
        with pytest.raises(ValueError, match=r"something at each of several places.*give labels"):
            lrp_prune.explain(silent, {"input_ids": ids})
    tokenizer = of_pieces()
    tokenizer.mask_token = tokenizer.convert_ids_to_tokens(9)
    masked = ids.masked_fill(ids == 9, 8).index_fill(1, torch.tensor([3]), 9)
    found = lrp_prune.explain(model, {"input_ids": masked}, tokenizer=tokenizer)
    assert found.target.endswith("at token 3")


def test_what_has_places_and_no_last_one_is_refused() -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    images = {"pixel_values": torch.randn(2, 3, 16, 16)}
    detector = tf.YolosForObjectDetection(tf.YolosConfig(**sizes, image_size=[16, 16], patch_size=4)).eval()
    filling = tf.ViTForMaskedImageModeling(tf.ViTConfig(**sizes, image_size=16, patch_size=4, encoder_stride=4)).eval()
    for model, batch in ((detector, images), (filling, {**images, "bool_masked_pos": torch.zeros(2, 16).bool()})):
        with pytest.raises(ValueError, match=r"something at each of several places.*pass target=, a function"):
            lrp_prune.explain(model, batch)


@pytest.mark.parametrize("name", ["whisper", "speech_to_text"])
def test_decoders_whose_forward_shifts_the_labels_show_their_side(name: str) -> None:
    sizes = {
        "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
        "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "vocab_size": 50, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
        "decoder_start_token_id": 3, "max_target_positions": 16,
    }  # fmt: skip
    if name == "whisper":
        config = tf.WhisperConfig(**sizes, num_mel_bins=8, max_source_positions=10)
        model, sound = tf.WhisperForConditionalGeneration(config).eval(), torch.randn(2, 8, 20)
    else:
        config = tf.Speech2TextConfig(**sizes, input_feat_per_channel=8, conv_channels=16, max_source_positions=40)
        model, sound = tf.Speech2TextForConditionalGeneration(config).eval(), torch.randn(2, 20, 8)
    labels = torch.tensor([[7, 8, 9, -100], [5, 6, 7, 8]])
    found = lrp_prune.explain(model, {"input_features": sound, "labels": labels})
    assert found.inputs["decoder_input_ids"].labels == (("3", "7", "8"), ("3", "5", "6", "7"))
    assert not any("decoder.embed_tokens" in root for root in found.elsewhere)
    last = model(input_features=sound, labels=labels).logits[[0, 1], [2, 3]]
    torch.testing.assert_close(found.values, last.amax(-1).detach())


def test_texts_to_choose_from_are_shown_one_after_the_other() -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = tf.BertForMultipleChoice(tf.BertConfig(**sizes, vocab_size=50)).eval()
    ids = torch.randint(3, 50, (2, 3, 5), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, 1, 3:] = 0
    batch = {"input_ids": ids, "attention_mask": mask}
    found = lrp_prune.explain(model, batch, target=1).inputs["input_ids"]
    assert found.labels[0] == tuple(map(str, ids[0][mask[0].bool()].tolist()))
    assert found.labels[1] == tuple(map(str, ids[1].flatten().tolist()))
    with lrp_prune.attributing(model) as propagation:
        relevance = propagation.relevance(model(**batch).logits[:, 1].sum())["bert.embeddings.word_embeddings"]
    expected = relevance.sum(-1).reshape(2, 15) * mask.flatten(1)
    torch.testing.assert_close(found.relevance, expected.detach())
    with pytest.raises(ValueError, match="several texts that a sample has to choose from are not replaced"):
        perturbation_curve(model, [batch], "attnlrp")
