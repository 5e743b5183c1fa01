"""What each attribute of a configuration becomes in a tiny model, by its name alone."""

import re
from collections.abc import Callable
from typing import Any

HIDDEN, HEADS, HEAD, LAYERS, VOCABULARY, POSITIONS, IMAGE, PATCH = 32, 4, 8, 2, 64, 64, 32, 4

Size = Callable[[int, dict[str, Any]], int]


def _at_most(limit: int) -> Size:
    return lambda value, _: min(value, limit)


def _key_value_heads(value: int, attributes: dict[str, Any]) -> int:
    """Grouped as in the original: as many as heads, one, or half of them."""
    heads = [
        attributes[name] for name in ("num_attention_heads", "n_head", "n_heads", "num_heads") if name in attributes
    ]
    return HEADS if value >= max(heads, default=value) else 1 if value == 1 else HEADS // 2


def _window(value: int, attributes: dict[str, Any]) -> int:
    """Of pixels where patches are merged, else of tokens or patches; stages halve these until two are left."""
    return min(value, 4 * PATCH if "spatial_merge_size" in attributes else 2 if "depths" in attributes else 4)


def _image(value: int, attributes: dict[str, Any]) -> int:
    return min(value, 2 * IMAGE if "depths" in attributes else IMAGE)


def stage_width(value: int) -> int:
    """Of a stage's channels, which other lists name as well: by what they were alone."""
    return value if value < 16 else 16 if value < 256 else 32 if value < 512 else 64


def _inner(value: int, attributes: dict[str, Any]) -> int:
    """What is twice as wide as the stream stays so, since some layers count on it; the rest is no multiple of it."""
    widths = [attributes[name] for name in ("hidden_size", "d_model", "n_embd") if name in attributes]
    return min(value, 2 * HIDDEN if any(value == 2 * width for width in widths if isinstance(width, int)) else 48)


SIZES: list[tuple[str, Size]] = [
    (r"chunk_size_feed_forward", _at_most(POSITIONS)),
    (r"rotary_dim", _at_most(HEAD // 2)),
    # Heads
    (
        r".*(key_value|kv)_(attention_)?heads?|num_kv_heads|n_kv_heads?|n_head_kv|multi_query_group_num",
        _key_value_heads,
    ),
    (r"linear_num_key_heads", _at_most(2)),
    (r"(.*_)?(num_)?(attention_|value_|query_)?heads|n_heads?|.*n_heads|(en|de)coder_attention_heads", _at_most(HEADS)),
    (r"qk_head_dim", _at_most(2 * HEAD)),
    (
        r".*head_(dim|size)|.*_head_dim.*|d_kv|kv_channels|attention_head_size|d_head|attention_key_channels|head_width",
        _at_most(HEAD),
    ),
    # Depth
    (
        r"(.*_)?(num_|n_)?(hidden_|attention_|attn_)?layers?(_num)?|n_layers?|num_blocks|.*_depth|depth|num_hidden_groups"
        r"|[lxr]_layers|num_block_layers",
        _at_most(LAYERS),
    ),
    (
        r"first_k_dense_replace|num_dense_layers|moe_layer_start_index|num_adapter_layers|num_nextn_predict_layers",
        _at_most(1),
    ),
    # Vocabularies and positions
    (r"adapter_(in|out)_dim|adapter_input_size", _at_most(HIDDEN)),
    (r"coordinate_size", _at_most(HEAD // 2)),  # four of these and two of those are as wide as the stream
    (r"shape_size", _at_most(HEAD)),
    (r"num_codebooks", _at_most(2)),
    (r".*vocab_size.*|.*_vocab|n_vocab|vocabulary_size", _at_most(VOCABULARY)),
    (
        r"max_(\w+_)?position(al)?_embeddings|n_positions|max_sequence_length|(max_)?seq(uence)?_len(gth)?|n_ctx|context_length"
        r"|max_(source|target)_positions|original_max_position_embeddings|max_seq_len",
        _at_most(POSITIONS),
    ),
    # Experts
    (
        r".*(experts_per_tok|top_k|topk|moe_k)(en)?|top_k_experts|num_selected_experts|num_experts_per_token",
        _at_most(2),
    ),
    (r"n_groups?|topk_groups?|num_expert_groups?", _at_most(1)),
    (r".*shared_experts", _at_most(1)),
    (r".*experts|zero_expert_num|.*expert_num|num_local_experts", _at_most(4)),
    # Widths
    (r"attention_hidden_size", _inner),
    (r".*lora_(rank|dim)|.*_rank|rank", _at_most(16)),
    (r".*(state_size|d_state|state_dim)", _at_most(8)),
    (
        r".*(intermediate|ffn|inner|feed_?forward|mlp_hidden)_?(size|dim|channels)?.*|.*_ffn(_\w+)?|d_ff|dff|n_inner|d_inner"
        r"|mlp_dim|expert_dim|shared_expert.*size|.*intermediate_size|intermediate_size.*|expert_ffn_hidden_size",
        _inner,
    ),
    (
        r".*hidden_(size|dim)(_\w+)?|d_model|n_embd|.*embed_?dim|embedding_(size|dim)|.*_embed(ding)?_(size|dim)|width|dim"
        r"|.*_width|.*projection_dim|proj(ection|ector)?_\w*(dim|size)|output_dim|.*_feat_dim|emb_dim|.*emb_size|lru_width"
        r"|.*projection_size|.*proj_size|d_latents|feature_size|.*_hidden_dims?|mask_dim|.*feature_size|.*_pyramid_width",
        _at_most(HIDDEN),
    ),
    (r"num_filters", _at_most(2)),  # of a wave, doubled or so in each of several stages
    # Windows
    (r"window_size", _window),
    (r"sliding_window(_\w+)?|attention_window(_size)?|local_attention|window_size|.*_window", _at_most(4)),
    (r"chunk_(left|right)_context", _at_most(1)),  # of a chunk of that length
    (r"context_size|attention_chunk_size|chunk_size|.*chunk_length|block_size|(mamba_)?chunk_size", _at_most(4)),
    # Images
    (r"mm_tokens_per_image", _at_most(16)),
    (r"base_channels", _at_most(HIDDEN)),
    (r".*image_size|img_size|crop_size", _image),
    (r"stem_out_channels", lambda value, _: stage_width(value)),
    (r".*patch_size", _at_most(PATCH)),
    (r"latent_query_num", _at_most(4)),
    # Detection
    (r"num_queries|num_proposals|num_detection_tokens|two_stage_num_proposals", _at_most(5)),
]
"""Patterns of names, and what is made of a value; the first that matches the whole name counts."""

_COMPILED = [(re.compile(pattern), size) for pattern, size in SIZES]


def small(name: str, value: int, attributes: dict[str, Any]) -> int:
    """What an integer becomes."""
    for pattern, size in _COMPILED:
        if pattern.fullmatch(name):
            return size(value, attributes)
    return value
