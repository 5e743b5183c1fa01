"""The tasks that transformers has models for, and which of its types do each."""

from fnmatch import fnmatch
from typing import Any

import transformers
from transformers.models.auto import modeling_auto

MAPPINGS = {
    "causal-lm": "CAUSAL_LM",
    "masked-lm": "MASKED_LM",
    "seq-to-seq": "SEQ_TO_SEQ_CAUSAL_LM",
    "sequence-classification": "SEQUENCE_CLASSIFICATION",
    "token-classification": "TOKEN_CLASSIFICATION",
    "question-answering": "QUESTION_ANSWERING",
    "image-classification": "IMAGE_CLASSIFICATION",
    "object-detection": "OBJECT_DETECTION",
    "image-segmentation": "IMAGE_SEGMENTATION",
    "semantic-segmentation": "SEMANTIC_SEGMENTATION",
    "instance-segmentation": "INSTANCE_SEGMENTATION",
    "universal-segmentation": "UNIVERSAL_SEGMENTATION",
    "image-text-to-text": "IMAGE_TEXT_TO_TEXT",
    "speech-seq-to-seq": "SPEECH_SEQ_2_SEQ",
    "ctc": "CTC",
    "audio-classification": "AUDIO_CLASSIFICATION",
}
"""Short name -> the middle of the name of transformers' table."""


def types_of(mapping: str) -> list[str]:
    """The model types of a mapping, as transformers lists them."""
    return list(getattr(modeling_auto, f"MODEL_FOR_{MAPPINGS[mapping]}_MAPPING_NAMES"))


def pairs(mappings: list[str] | None = None, pattern: str = "*") -> list[tuple[str, str]]:
    """Every mapping with each of its types; of these what a pattern such as ``"llama*"`` or ``"ctc/*"`` matches."""
    found = [(mapping, name) for mapping in mappings or MAPPINGS for name in types_of(mapping)]
    return [pair for pair in found if fnmatch(pair[1], pattern) or fnmatch("/".join(pair), pattern)]


def class_for(mapping: str, config: Any) -> Any:
    """The class that does a task with a configuration."""
    table = getattr(modeling_auto, f"MODEL_FOR_{MAPPINGS[mapping]}_MAPPING")
    found = table[type(config)]
    return found[0] if isinstance(found, tuple | list) else found


_AUTO = {
    "seq-to-seq": "Seq2SeqLM",
    "speech-seq-to-seq": "SpeechSeq2Seq",
    "ctc": "CTC",
    "causal-lm": "CausalLM",
    "masked-lm": "MaskedLM",
}


def auto_class(mapping: str) -> Any:
    """The class by which users make a model for a task, such as ``AutoModelForCausalLM``."""
    words = "".join(word.capitalize() if word != "to" else "To" for word in mapping.split("-"))
    return getattr(transformers, f"AutoModelFor{_AUTO.get(mapping, words)}")
