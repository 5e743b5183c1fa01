"""A task of token ids for the tiny models of :mod:`small_models`, and a model whose words are those of IOI prompts."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from lrp_prune.circuits import NODE_METHODS
from lrp_prune.effects import Suite
from lrp_prune.pruning import Method
from lrp_prune.tasks import TableTask
from lrp_prune.tasks.indirect_object import TEMPLATES
from lrp_prune.tasks.names import FEMALE, MALE
from tests.support.planted import word_tokenizer
from tests.support.small_models import llama


def numbers(text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
    """A tokenizer whose words are token ids."""
    return {"input_ids": [int(word) for word in text.split()]}


def small_task() -> TableTask:
    """Three prompts of two lengths."""
    return TableTask(
        numbers,
        [
            {"clean": "5 6 7 8 9", "counterfactual": "5 6 17 8 9", "answers": " 11", "distractors": " 12"},
            {"clean": "15 6 27 8 9", "counterfactual": "15 6 17 8 9", "answers": " 21", "distractors": [" 22", " 23"]},
            {"clean": "15 6 9", "counterfactual": "15 16 9", "answers": " 31", "distractors": " 32"},
        ],
    )


def ioi_model() -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """A tiny model with random weights and a tokenizer that has each word of the prompts as a token."""
    words = [word for text in TEMPLATES for word in text.split()] + [*FEMALE, *MALE]
    tokenizer = word_tokenizer([form for word in words for form in (word, f"{word},", f"{word}.")])
    torch.manual_seed(0)
    return llama(vocab_size=len(tokenizer)).eval(), tokenizer


def chosen(method: str, **options: object) -> Method:
    """A method by its name, with something chosen."""
    return replace(NODE_METHODS[method], **options)  # type: ignore[type-var]  # each of them is a dataclass


def ioi_behaviour(batches: Sequence[Any]) -> tuple[list[tuple[str, str]], list[tuple[str, str]], tuple[Suite, Suite]]:
    """Undesired and wanted answers in words of :func:`ioi_model`, and two suites of batches."""
    undesired = [(f"{first} {second}", f" {first}") for first, second in zip(MALE[:8], FEMALE[:8], strict=True)]
    wanted = [(prompt, f" {prompt.split()[1]}") for prompt, _ in undesired]
    return undesired, wanted, (Suite({"text": batches[:2]}), Suite({"text": batches[2:]}))
