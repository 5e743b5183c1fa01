"""A configuration of any type, small in every dimension, by looking at the attributes of the default one.

Nothing is known of a type but what its configuration says: integers by their names (:mod:`.sizes`), lists with an entry for each
layer by keeping one layer of each sort, lists with an entry for each stage by making the stages narrow, nested configurations
each by itself, ids of special tokens by giving them places in the small vocabulary.
"""

import copy
import re
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedConfig

from tests.support.architectures.particulars import backbone, missing
from tests.support.architectures.sizes import HEAD, HEADS, HIDDEN, IMAGE, LAYERS, PATCH, VOCABULARY, small, stage_width

WORDS = range(5, 41)
"""Ids of ordinary tokens; special ones of tiny models are below and above."""
_DEPTHS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers", "encoder_layers", "num_encoder_layers", "depth")
_SORTS = 6
"""At most as many sorts of layers are kept."""
_LEFT = frozenset("id2label label2id _name_or_path transformers_version architectures".split())
_OF_LAYERS = (
    r"(\w+_)?out_indices|\w*attn_indexes|\w+_layers_indices|\w+_visual_indexes|cross_attention_layers"
    r"|\w+_ind(ic|ex)es|\w+_idxs"
)
"""Names of lists of layers."""


def shrunk(config: PreTrainedConfig, **given: Any) -> PreTrainedConfig:
    """A small configuration of the same type.

    Args:
        config: the default one.
        **given: attributes that are known already.
    """
    changes = {**_changes(config), **missing(config), **given}
    try:
        return type(config)(**changes)
    except Exception as error:
        # What follows from others by the type's own rules may be given as well, or not at all.
        first = error
    lists = [name for name, value in changes.items() if isinstance(value, list | tuple) and name not in given]
    try:
        return type(config)(**{name: value for name, value in changes.items() if name not in lists})
    except Exception:
        raise first from None


def _changes(config: PreTrainedConfig) -> dict[str, Any]:
    """The attributes that become others."""
    attributes = {name: value for name, value in vars(config).items() if name not in _LEFT}
    kept = _kept_layers(attributes)
    depth = _depth_of(attributes)
    changes: dict[str, Any] = {}
    for name, value in attributes.items():
        if isinstance(value, PreTrainedConfig):
            changes[name] = backbone(value) if value.model_type == "timm_backbone" else shrunk(value)
        elif _is_token(name):
            changes[name] = _token(name, value)
        elif kept and isinstance(value, list | tuple) and len(value) == depth:
            changes[name] = type(value)(_element(name, value[layer], attributes) for layer in kept)
        elif kept and name in _DEPTHS and value == depth:
            changes[name] = len(kept)
        elif name in _DEPTHS and isinstance(attributes.get("depths"), list | tuple):
            changes[name] = value  # there is one for each stage
        else:
            changes[name] = _value(name, value, attributes)
    usual = _usual(config)
    changed = {name: value for name, value in changes.items() if name not in usual or not _same(value, usual[name])}
    changed = _by_field(config, changed)
    if "_out_indices" in attributes:
        changed |= _outputs(attributes, changes)
    changed |= _with_sections(config, changes.get("rope_parameters"))
    if "_heterogeneity_spec" in attributes:
        changed["per_layer_config"] = _per_layer(attributes, kept)
    return changed


def _usual(config: PreTrainedConfig) -> dict[str, Any]:
    """What a configuration of this type has by default, which is not what one inside of another has."""
    try:
        return vars(type(config)())
    except Exception:
        return vars(config)


def _outputs(attributes: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Of a backbone, as many stages or layers as are read of the default one, the last."""
    wanted = attributes["_out_indices"]
    if "depths" in attributes:
        return {"out_indices": list(wanted)}
    name = next((name for name in _DEPTHS if isinstance(changes.get(name), int)), None)
    if name is None:
        return {"out_indices": list(wanted)}
    depth = max(changes[name], len(wanted))
    return {name: depth, "out_indices": list(range(depth - len(wanted) + 1, depth + 1))}


def _with_sections(config: PreTrainedConfig, rope: Any) -> dict[str, Any]:
    """Rotary positions in three axes, where a type has them, whose shares its code gives by itself."""
    sections = "mrope_section" in (getattr(config, "ignore_keys_at_rope_validation", None) or ())
    plain = isinstance(rope, Mapping) and not any(isinstance(entry, Mapping) for entry in rope.values())
    if not sections or not plain:
        return {}
    half = int(HEAD * rope.get("partial_rotary_factor", 1)) // 2
    return {"rope_parameters": {**rope, "mrope_section": _shared([2, 1, 1], half)}}


def _by_field(config: PreTrainedConfig, changed: Mapping[str, Any]) -> dict[str, Any]:
    """What a constructor takes; what a type computes from others it computes again."""
    fields = set(getattr(type(config), "__dataclass_fields__", changed))
    aliases = {name: alias for alias, name in type(config).attribute_map.items() if alias in fields}
    named = {name if name in fields else aliases.get(name): value for name, value in changed.items()}
    return {name: value for name, value in named.items() if name is not None}


def _per_layer(attributes: dict[str, Any], kept: Sequence[int]) -> dict[int, dict[str, Any]]:
    """What single layers have of their own."""
    of_layers = attributes["_heterogeneity_spec"].per_layer_overrides
    return {
        index: {name: _element(name, value, {**attributes, **own}) for name, value in own.items()}
        for index, layer in enumerate(kept)
        if (own := of_layers.get(layer, {}))
    }


def _same(new: Any, old: Any) -> bool:
    return type(new) is type(old) and not isinstance(new, PreTrainedConfig) and bool(new == old)


def _depth_of(attributes: Mapping[str, Any]) -> int | None:
    """How many layers there are, where they are no stages with layers of their own."""
    if "depths" in attributes:
        return None
    return next((attributes[name] for name in _DEPTHS if isinstance(attributes.get(name), int)), None)


def _kept_layers(attributes: Mapping[str, Any]) -> list[int]:
    """Of the layers that lists tell apart, the first of each sort, and at least as many as a tiny model has."""
    depth = _depth_of(attributes)
    lists = [
        value
        for name, value in attributes.items()
        if isinstance(value, list | tuple) and depth and depth > LAYERS and len(value) == depth
    ]
    if not lists or depth is None:
        return []
    own = getattr(attributes.get("_heterogeneity_spec"), "per_layer_overrides", {})
    sorts: dict[str, int] = {}
    for layer in range(depth):
        sorts.setdefault(repr([[value[layer] for value in lists], own.get(layer)]), layer)
    kept = sorted(sorts.values())[:_SORTS]
    return sorted({*kept, *range(LAYERS)}) if len(kept) < LAYERS else kept


def _value(name: str, value: Any, attributes: dict[str, Any]) -> Any:
    if isinstance(value, bool) or value is None or isinstance(value, str | float):
        return value
    if isinstance(value, int):
        return small(name, value, attributes)
    if isinstance(value, Mapping):
        return _mapping(name, value, attributes)
    if isinstance(value, list | tuple):
        return _sequence(name, value, attributes)
    return copy.deepcopy(value)


def _element(name: str, value: Any, attributes: dict[str, Any]) -> Any:
    """One layer's entry of a list."""
    own = re.sub(r"(_per_layer|_list)?s?$", "", name)
    if isinstance(value, int) and not isinstance(value, bool):
        for candidate in (name.replace("_per_layer", ""), name, own):
            found = small(candidate, value, attributes)
            if found != value:
                return found
    return value


def _mapping(name: str, value: Mapping[Any, Any], attributes: dict[str, Any]) -> dict[Any, Any]:
    if "rope" in name:
        return {key: _rope(key, entry) for key, entry in value.items()}
    return {
        key: _value(str(key), entry, {**attributes, **{str(k): v for k, v in value.items()}})
        for key, entry in value.items()
    }


def _rope(key: str, value: Any) -> Any:
    """Of rotary positions; sections are of half a head."""
    if isinstance(value, Mapping):
        return {inner: _rope(inner, entry) for inner, entry in value.items()}
    if key == "mrope_section":
        return _shared(value, HEAD // 2)
    if key in ("short_factor", "long_factor"):
        return list(value)[: HEAD // 2]
    return value


def _shared(parts: Sequence[int], total: int) -> list[int]:
    """As many parts, with this sum."""
    found = [max(1, part * total // sum(parts)) for part in parts]
    while sum(found) > total:
        found[found.index(max(found))] -= 1
    found[0] += total - sum(found)
    return found


def _sequence(name: str, value: Sequence[Any], attributes: dict[str, Any]) -> Any:
    """Of lists with an entry for each stage."""
    if name == "image_grid_pinpoints":
        return [[IMAGE, IMAGE]]
    if not value or not all(isinstance(entry, int) and not isinstance(entry, bool) for entry in value):
        if value and all(isinstance(entry, list | tuple) for entry in value):
            return type(value)(_sequence(name, entry, attributes) for entry in value)
        return value
    if name.startswith("vision_feature_layer"):
        return type(value)(max(layer, -LAYERS) if layer < 0 else min(layer, LAYERS - 1) for layer in value)
    if re.fullmatch(_OF_LAYERS, name):
        return type(value)(sorted({min(layer, LAYERS - 1) for layer in value}))
    if re.fullmatch(
        r".*depths?|layers|num_layers|num_blocks|n_attn_blocks|layer_depths|stage_num\w*|num_block_repeats", name
    ):
        return type(value)(min(entry, 1) for entry in value)
    if re.fullmatch(r"(num_)?(attention_)?heads|num_attention_heads", name):
        return type(value)(min(entry, 2) for entry in value)
    if re.fullmatch(r".*(image|img|crop|train)_size.*|max_image_size", name):
        return type(value)(small("image_size", entry, attributes) for entry in value)
    if re.fullmatch(r".*window_size", name):
        return type(value)(small("window_size", entry, attributes) for entry in value)
    if name == "patch_size" and "patch_stride" not in attributes:
        return type(value)(min(entry, PATCH) for entry in value)
    if max(value) >= HIDDEN and re.search(r"dim|size|width|channel|filters", name):
        return type(value)(map(stage_width, value))
    return value


def _is_token(name: str) -> bool:
    return bool(re.fullmatch(r".*token_(id|index|ids)|image_patch_id", name))


_SPECIAL: dict[str, int] = {}


def _token(name: str, value: Any) -> Any:
    """A special token's id in the small vocabulary: below the words those that all types have, above them the others."""
    usual = {"pad": 0, "bos": 1, "eos": 2, "unk": 3, "sep": 4, "cls": 1, "decoder_start": 0}
    if isinstance(value, list | tuple):
        return type(value)(_token(f"{name}{index}", entry) for index, entry in enumerate(value))
    if not isinstance(value, int) or isinstance(value, bool):
        return value
    stem = re.sub(r"_(token_)?(id|index|ids)\d*$", "", name)
    if stem in usual:
        return usual[stem]
    if "vision_feature" in name or "layer" in name or "ignore" in name:
        return value
    return _SPECIAL.setdefault(stem, VOCABULARY - 1 - len(_SPECIAL) % (VOCABULARY - WORDS.stop))


__all__ = ["HEADS", "WORDS", "shrunk"]
