"""What a Hugging Face model was made for, by transformers' own tables."""

import functools
import importlib
from typing import Any, NamedTuple

from torch import nn


class Kind(NamedTuple):
    """A task, and the targets by which a model for it can be explained, the usual one first; none where there is none."""

    task: str
    targets: tuple[str, ...] = ()


GENERATION = Kind("language model", ("next_token", "token", "last_token"))
_CLASSES = ("class", "multi_label", "regression", "last_token")
SEQUENCE_CLASSIFIER = Kind("sequence classifier", _CLASSES)
SEGMENTATION = Kind("segmentation model", ("token", "multi_label"))
_KNOWN: tuple[tuple[str, Kind], ...] = (
    ("SEQ_TO_SEQ_CAUSAL_LM", GENERATION),
    ("SPEECH_SEQ_2_SEQ", GENERATION),
    # Before the causal ones: what is in both tables (XLM) is trained on masked tokens.
    ("MASKED_LM", Kind("masked language model", ("token", "last_token"))),
    ("CAUSAL_LM", GENERATION),
    ("IMAGE_TEXT_TO_TEXT", GENERATION),
    ("MULTIMODAL_LM", GENERATION),
    ("CAUSAL_IMAGE_MODELING", GENERATION),
    ("TOKEN_CLASSIFICATION", Kind("token classifier", ("token", "last_token"))),
    ("SEMANTIC_SEGMENTATION", SEGMENTATION),
    ("SEQUENCE_CLASSIFICATION", SEQUENCE_CLASSIFIER),
    ("IMAGE_CLASSIFICATION", Kind("image classifier", _CLASSES)),
    ("AUDIO_CLASSIFICATION", Kind("audio classifier", _CLASSES)),
    ("VIDEO_CLASSIFICATION", Kind("video classifier", _CLASSES)),
    ("TIME_SERIES_CLASSIFICATION", Kind("time series classifier", _CLASSES)),
    ("TIME_SERIES_REGRESSION", Kind("time series regression model", ("regression",))),
    ("MULTIPLE_CHOICE", Kind("multiple choice model", ("class", "last_token"))),
    ("NEXT_SENTENCE_PREDICTION", Kind("next sentence model", ("class", "last_token"))),
    ("QUESTION_ANSWERING", Kind("question answering model", ("span",))),
    ("DOCUMENT_QUESTION_ANSWERING", Kind("question answering model", ("span",))),
)
_NO_TASK = frozenset({"TEXT_ENCODING", "IMAGE", "BACKBONE"})
_PREFIX, _SUFFIX = "MODEL_FOR_", "_MAPPING_NAMES"


@functools.cache
def _tables() -> dict[str, dict[str, tuple[str, ...]]]:
    """By name of the task: its classes by type of model."""
    auto: Any = importlib.import_module("transformers.models.auto.modeling_auto")
    names = [name for name in dir(auto) if name.startswith(_PREFIX) and name.endswith(_SUFFIX)]
    return {
        name.removeprefix(_PREFIX).removesuffix(_SUFFIX): {
            kind: (found,) if isinstance(found, str) else tuple(found) for kind, found in getattr(auto, name).items()
        }
        for name in names
    }


@functools.cache
def _kinds() -> dict[str, Kind]:
    """By name of a class, the first that knows it of: tasks that can be explained, other tasks, pretraining."""
    known = dict(_KNOWN)
    others = [name for name in _tables() if name not in known and name not in _NO_TASK and name != "PRETRAINING"]
    kinds: dict[str, Kind] = {}
    for table in (*known, *others, "PRETRAINING"):
        kind = known.get(table) or Kind(f"model for {table.lower().replace('_', ' ')}")
        for classes in _tables().get(table, {}).values():
            for name in classes:
                kinds.setdefault(name, kind)
    return kinds


def kind_of(model: nn.Module) -> Kind | None:
    """What a ``PreTrainedModel`` was made for: by its class, or the first of its bases that transformers lists."""
    kinds = _kinds()
    return next((kinds[base.__name__] for base in type(model).__mro__ if base.__name__ in kinds), None)


def is_decoder_type(model_type: str) -> bool:
    """Whether all models of this type read from left to right: they continue text, and do nothing else with it."""
    tables = _tables()
    return model_type in tables.get("CAUSAL_LM", {}) and not any(
        model_type in tables.get(table, {}) for table in ("MASKED_LM", "SEQ_TO_SEQ_CAUSAL_LM")
    )
