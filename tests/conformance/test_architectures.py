"""A few types of every kind of architecture pass every column; all of them are looked at by the command."""

import pytest

from tests.conformance.checking import COLUMNS, check
from tests.conformance.record import failures

REPRESENTATIVE = [
    ("causal-lm", "bloom"),
    ("causal-lm", "deepseek_v3"),
    ("causal-lm", "gemma2"),
    ("causal-lm", "gpt2"),
    ("causal-lm", "llama"),
    ("causal-lm", "mamba"),
    ("causal-lm", "mixtral"),
    ("causal-lm", "rwkv"),
    ("masked-lm", "bert"),
    ("masked-lm", "deberta-v2"),
    ("seq-to-seq", "bart"),
    ("seq-to-seq", "t5"),
    ("sequence-classification", "distilbert"),
    ("token-classification", "roberta"),
    ("question-answering", "electra"),
    ("image-classification", "resnet"),
    ("image-classification", "swin"),
    ("image-classification", "vit"),
    ("object-detection", "detr"),
    ("semantic-segmentation", "segformer"),
    ("image-text-to-text", "llava"),
    ("image-text-to-text", "qwen2_vl"),
    ("speech-seq-to-seq", "whisper"),
    ("ctc", "wav2vec2"),
    ("audio-classification", "audio-spectrogram-transformer"),
]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("mapping", "name"), REPRESENTATIVE, ids=["/".join(pair) for pair in REPRESENTATIVE])
def test_a_type_passes_every_column(mapping: str, name: str) -> None:
    entry = check(mapping, name)
    assert not failures(entry), failures(entry)
    assert list(entry["columns"]) == list(COLUMNS)
