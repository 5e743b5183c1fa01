"""Greedy answers of a model to prompts."""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lrp_prune.models.outputs import answer_of
from lrp_prune.models.subject import subject_of

Prompts = Tensor | Sequence[Sequence[int]]


def greedy(model: nn.Module, prompts: Prompts, tokens: int) -> list[list[int]]:
    """Greedy answers to prompts, each up to the end of its text.

    By the model's own ``generate`` where it has one, else token by token from the whole text. Prompts of different lengths are
    padded on the left where the model is told of places and of padding, else those of one length are answered together: a
    recurrent model reads padding as text.

    Args:
        model: a causal language model, or an encoder-decoder, which reads the prompts.
        prompts: token ids.
        tokens: how many are generated for each, at most.
    """
    inner: Any = subject_of(model).module
    rows = prompts.tolist() if isinstance(prompts, Tensor) else [list(prompt) for prompt in prompts]
    answers: list[list[int]] = [[] for _ in rows]
    padded = _takes_padding(inner)
    groups: dict[int, list[int]] = {}
    for place, row in enumerate(rows):
        groups.setdefault(0 if padded else len(row), []).append(place)
    for places in groups.values():
        for place, answer in zip(places, _answered(inner, [rows[place] for place in places], tokens), strict=True):
            answers[place] = answer
    return answers


def _takes_padding(inner: Any) -> bool:
    if not callable(getattr(inner, "generate", None)) or _encodes(inner):
        return False
    return {"attention_mask", "position_ids"} <= set(inspect.signature(inner.forward).parameters)


def _encodes(inner: Any) -> bool:
    return bool(getattr(getattr(inner, "config", None), "is_encoder_decoder", False))


def _answered(inner: Any, rows: Sequence[Sequence[int]], tokens: int) -> list[list[int]]:
    device = next((parameter.device for parameter in inner.parameters()), None)
    configured = getattr(getattr(inner, "generation_config", None), "eos_token_id", None)
    ends = {configured} if isinstance(configured, int) else set(configured or ())
    fill, width = min(ends, default=0), max(map(len, rows))
    ids = torch.tensor([[fill] * (width - len(row)) + list(row) for row in rows], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
    if callable(getattr(inner, "generate", None)):
        ids = inner.generate(ids, attention_mask=mask, max_new_tokens=tokens, do_sample=False, pad_token_id=fill)
        width = 1 if _encodes(inner) else width  # what an encoder-decoder generates begins with its start token
    else:
        for _ in range(tokens):
            following = answer_of(inner, {"input_ids": ids}).logits[:, -1].argmax(-1, keepdim=True)
            ids = torch.cat([ids, following], 1)
    found: list[list[int]] = ids[:, width:].tolist()
    return [row[: next((place for place, token in enumerate(row) if token in ends), len(row))] for row in found]
