"""What a default configuration leaves open, or what its attributes' names do not tell."""

from typing import Any

from transformers import PreTrainedConfig, ResNetConfig

from tests.support.architectures.sizes import HEAD, HEADS, VOCABULARY

_LONG, _MIDDLE, _SHORT = ([[size, 1], [1, 1], [size // 2, 0]] for size in (7, 5, 3))
"""Kernel, stride and padding."""
_INTRACLASS = {
    "reduce_channel": [1, 1, 0],
    "return_channel": [1, 1, 0],
    **{
        f"{kind}_{ratio}ratio": [part[::-1] if turned else part for part in parts]
        for ratio, parts in (("long", _LONG), ("mid", _MIDDLE), ("short", _SHORT))
        for kind, turned in (("vertical_long_to_small_conv", False), ("horizontal_small_to_long_conv", True))
    },
    **{
        f"symmetric_conv_long_{ratio}ratio": [size, 1, size // 2]
        for ratio, size in (("long", 7), ("mid", 5), ("short", 3))
    },
}

UNSET: dict[str, Any] = {
    "head_dim": HEAD,
    "num_key_value_heads": HEADS,
    "vocab_size": VOCABULARY,
    "pad_token_id": 0,
    "num_experts_per_tok": 2,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": HEAD,
    "indexer_budget": 4,
    "indexer_compress_ratio": 2,
    "upsample_out_channels": [16, 16],
    "conv_out_channels": [16],
    "deepstack_layer_map": [[0, 0]],
    "image_token_index": VOCABULARY - 1,
    "video_token_index": VOCABULARY - 2,
    "video_temporal_patch_size": 2,
    "moe_intermediate_size": 48,
    "num_experts": 4,
    "top_k_experts": 2,
    "kernel_list": [3, 2, 2],
    "downsample_rate": "1/2",
    "scale_factor_list": [1, 2, 4, 8],
    "intraclass_block_config": _INTRACLASS,
}
"""Values of attributes that are None in a default configuration although models need them."""

_ROTARY = {"rope_type": "default", "rope_theta": 10000.0}
_READING_ORDER = {
    "hidden_size": 32,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "coordinate_size": 4,
    "shape_size": 8,
    "global_pointer_head_size": 8,
    "num_classes": 2,
}
_STAGES = {
    "model_type": "pp_lcnet_v4",
    "block_configs": [
        [[3, 12, 12, 1, True]],
        [[3, 12, 16, 2, False]],
        [[3, 16, 16, [2, 2], True]],
        [[3, 16, 32, [2, 2], False]],
    ],
    "stem_channels": [3, 8, 12],
    "out_features": ["stage1", "stage2", "stage3", "stage4"],
}
_SIGLIP = {
    "model_type": "siglip_vision_model",
    "hidden_size": 128,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 4,
}
TYPES: dict[str, dict[str, Any]] = {
    # Numbers that have to fit each other.
    "reformer": {"axial_pos_embds": False, "attn_layers": ["local", "lsh"]},
    "mamba2": {"num_heads": 8},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "zamba": {"layers_block_type": ["linear_attention", "hybrid"] * 2, "num_hidden_layers": 4},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"], "num_hidden_layers": 3},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 10000.0},
        "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "cohere_compass_text": {"rope_parameters": {"full_attention": _ROTARY}},
    "neomme": {"head_dim": 16, "num_attention_heads": 2, "num_key_value_heads": 2},
    "gemma4_assistant_text": {"hidden_size_per_layer_input": 0},
    "glm5_next_text": {"index_topk": 4, "index_kpool": 2},
    "squeezebert": {f"{name}_groups": 2 for name in ("q", "k", "v", "post_attention", "intermediate", "output")},
    "cpmant": {"dim_ff": 48, "position_bias_num_buckets": 8, "position_bias_max_distance": 16},
    "canine": {"num_hash_buckets": 64, "local_transformer_stride": 4, "downsampling_rate": 2},
    "lxmert": {"num_qa_labels": 5},
    "bros": {"hidden_size": 64},
    "dots3_note_text": {"head_dim": 16},
    "oneformer": {"conv_dim": 32},
    "step3p5": {"sliding_window": 4},
    "pp_ocrv5_server_det": {"neck_out_channels": 32},
    "lilt": {"hidden_size": 48, "num_attention_heads": 4},
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
    "deepseek_ocr2_text": {"mlp_layer_types": ["dense", "sparse"]},
    "ernie4_5_vl_moe_text": {"rope_parameters": {**_ROTARY, "mrope_section": [1, 1, 2]}},
    "emu3": {
        "vocabulary_map": {
            "<image>": 60,
            "<|extra_200|>": 59,
            **{f"<|visual token {index:06d}|>": 41 + index for index in range(8)},
        }
    },
    "emu3_vqgan": {"codebook_size": 8},
    "aria": {"projector_patch_to_query_dict": {64: 8}},
    "chameleon": {
        "vocabulary_map": {"<image>": 60, **{f"IMGIMG{letter}Z": 41 + index for index, letter in enumerate("ABCDEFGH")}}
    },
    "pix2struct_vision_model": {"patch_embed_hidden_size": 48},
    "kosmos_2_5_vision_model": {"patch_embed_hidden_size": 48},
    "mllama_vision_model": {"vision_output_dim": 64},
    "paddleocr_vl_text": {"rope_parameters": {**_ROTARY, "mrope_section": [2, 1, 1]}},
    "granite4_vision": {"vision_config": _SIGLIP},  # a head of the queries is 64 wide
    "blip_2_qformer": {"num_attention_heads": 4},
    "llama4_vision_model": {
        "intermediate_size": 128,
        "vision_output_dim": 32,
        "projector_input_dim": 32,
        "projector_output_dim": 32,
    },
    # Widths of convolutions.
    "bit": {"num_groups": 4},
    "mobilenet_v1": {"depth_multiplier": 0.1},
    "mobilenet_v2": {"depth_multiplier": 0.2, "finegrained_output": False},
    "efficientnet": {
        "width_coefficient": 1.0,
        "depth_coefficient": 0.3,
        "in_channels": (32, *[16] * 6),
        "out_channels": (16,) * 7,
        "hidden_dim": 1280,
        "image_size": 64,
    },
    "levit": {"patch_size": 16, "image_size": 64},
    "mobilevitv2": {"image_size": 64},
    "pp_lcnet_v4": {"stem_channels": (3, 48, 96)},
    "detr": {"encoder_attention_heads": 8, "decoder_attention_heads": 8},
    "lw_detr": {"projector_scale_factors": [1.0]},
    "mimi": {"upsample_groups": 32},
    "shieldgemma2": {"yes_token_index": 6, "no_token_index": 7},
    "fun_asr_nano": {
        "adaptor_config": {
            "hidden_size": 32,
            "num_attention_heads": 4,
            "intermediate_size": 8,
            "projector_hidden_size": 32,
        }
    },
    "audio-spectrogram-transformer": {"max_length": 32, "num_mel_bins": 16, "frequency_stride": 4, "time_stride": 4},
    "pp_doclayout_v2": {"class_thresholds": [0.5, 0.5], "class_order": [0, 1], "reading_order_config": _READING_ORDER},
    "pp_ocrv6_small_det": {
        "backbone_config": _STAGES,
        "layer_list_out_channels": [12, 16, 16, 32],
        "neck_out_channels": 16,
    },
    "pp_ocrv6_medium_det": {"backbone_config": _STAGES, "neck_out_channels": 32},
    "perceiver": {
        "num_latents": 8,
        "num_self_attends_per_block": 2,
        "num_self_attention_heads": 4,
        "num_cross_attention_heads": 4,
    },
    "pp_doclayout_v3": {"x4_feat_dim": 16},
    "moonshine_streaming": {"num_key_value_heads": 4},
    "cvt": {"depth": (1, 2, 3), "num_heads": (1, 2, 2)},
    # Which layers a head reads.
    "beit": {"num_hidden_layers": 4, "out_indices": [1, 2, 3, 4]},
    "data2vec-vision": {"num_hidden_layers": 4, "out_indices": [1, 2, 3, 4]},
    "dpt": {"num_hidden_layers": 4, "backbone_out_indices": [0, 1, 2, 3]},
    "lw_detr_vit": {"num_windows": 4},
}
"""Type -> attributes that are set."""


def missing(config: PreTrainedConfig) -> dict[str, Any]:
    """Attributes that are given to a configuration beside those that are made small."""
    found = {name: value for name, value in UNSET.items() if vars(config).get(name, 0) is None}
    if vars(config).get("sliding_window", 0) is None and "sliding_attention" in (
        getattr(config, "layer_types", 0) or ()
    ):
        found["sliding_window"] = 4
    return {**found, **TYPES.get(config.model_type, {})}


def backbone(config: PreTrainedConfig) -> PreTrainedConfig:
    """A ResNet of transformers in place of a backbone that is another library's."""
    stages = len(getattr(config, "out_indices", None) or [1])
    names = [f"stage{index}" for index in range(5 - min(stages, 4), 5)]
    return ResNetConfig(embedding_size=16, hidden_sizes=[16, 16, 32, 32], depths=[1, 1, 1, 1], out_features=names)
