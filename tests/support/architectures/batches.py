"""A batch that fits a model, by the names of its forward's parameters and by its configuration.

Where neither tells a layout (whether sounds have their frames first or last, how many tokens an image takes), what is possible is
tried, and the first batch that the model accepts is taken.
"""

import inspect
import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lrp_prune.models import run
from tests.support.architectures.pictures import pictures
from tests.support.architectures.shrinking import WORDS
from tests.support.architectures.sizes import HIDDEN
from tests.support.architectures.sounds import sounds

SAMPLES, TOKENS, PLACES, LONGEST = 2, 9, 40, 400
"""Samples, tokens of each, how many tokens of an image or a sound are tried, and how many it may have."""


class NoBatchError(ValueError):
    """The generator knows no batch that the model accepts."""


class Batch:
    """Makes the entries of a batch for one model; random ones always the same."""

    def __init__(self, mapping: str, model: nn.Module) -> None:
        self.mapping, self.model, self.config = mapping, model, model.config
        self.samples, self.tokens = SAMPLES, TOKENS
        self.generator = torch.Generator().manual_seed(2)
        self.parameters = [
            name
            for name, parameter in inspect.signature(model.forward).parameters.items()
            if parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
        ]

    def ids(self, *shape: int) -> Tensor:
        """Ordinary tokens."""
        return torch.randint(WORDS.start, WORDS.stop, shape or (SAMPLES, TOKENS), generator=self.generator)

    def normal(self, *shape: int) -> Tensor:
        """Numbers in the model's precision."""
        return torch.randn(shape, generator=self.generator, dtype=torch.float64).to(next(self.model.parameters()).dtype)

    def below(self, limit: int, *shape: int) -> Tensor:
        """Integers from zero on."""
        return torch.randint(limit, shape, generator=self.generator)

    def takes(self, *names: str) -> bool:
        """Whether the forward has one of these parameters."""
        return any(name in self.parameters for name in names)

    def setting(self, *names: str, default: Any = None) -> Any:
        """The first of these attributes that the configuration, or one inside of it, has."""
        for config in nested(self.config):
            for name in names:
                value = getattr(config, name, None)
                if value is not None:
                    return value
        return default


def nested(config: Any) -> list[Any]:
    """A configuration and those inside of it, of images and sounds first."""
    inner = [value for value in vars(config).values() if hasattr(value, "to_dict")]
    inner.sort(key=lambda value: "text" in type(value).__name__.lower())
    return [config, *(found for value in inner for found in nested(value))]


def batch_for(mapping: str, model: nn.Module) -> dict[str, Any]:
    """Inputs and labels for a tiny model.

    Raises:
        NoBatchError: if none of those that are tried is accepted; says why the first was not.
    """
    batch, first = Batch(mapping, model), None
    hints: list[int] = []
    lengths: list[int] = []
    for entries in _possible(batch, hints, lengths):
        label(batch, entries)
        try:
            with torch.no_grad():
                run(model, entries)
        except Exception as error:
            first = first or error
            hints += _places_in(str(error))
            lengths += [
                int(found) for found in re.findall(rf"tensor a \({TOKENS}\) must match .* b \((\d+)\)", str(error))
            ]
            continue
        return entries
    raise NoBatchError(f"{type(model).__name__}: {type(first).__name__}: {first}") from first


def _possible(batch: Batch, hints: list[int], lengths: list[int]) -> Iterator[dict[str, Any]]:
    """Batches to try; meanwhile ``hints`` grows by how many places the model asked for, and ``lengths`` by how many tokens."""
    texts = {name: value for name, make in TEXTS.items() if batch.takes(name) and (value := make(batch)) is not None}
    media = [*pictures(batch), *sounds(batch)] or [{}]
    for entries in media:
        yield {**texts, **entries}
        if lengths and "input_ids" in texts:  # a token for each frame of a sound
            yield {**texts, **entries, "input_ids": batch.ids(SAMPLES, lengths[-1])}
    codebooks = batch.setting("num_codebooks")
    if codebooks and "input_ids" in texts:  # a token of text, and one of each codebook
        yield {**texts, "input_ids": batch.ids(SAMPLES, TOKENS, codebooks + 1)}
    token = batch.setting(
        "image_token_id", "image_token_index", "audio_token_id", "audio_token_index", "image_patch_id"
    )
    if "input_ids" not in texts or media == [{}]:
        return
    if token is not None:
        for places in dict.fromkeys(hints) or range(1, PLACES):
            for entries in media:
                yield {**texts, **entries, **_with_places(batch, texts["input_ids"], token, places)}
    yield texts


def _places_in(message: str) -> list[int]:
    """How many places for an image an error speaks of: of all samples together, or counting every channel."""
    found = [int(number) for number in re.findall(r"features:? (\d+)", message)]
    return [
        places
        for number in found
        for places in (number // SAMPLES, number // SAMPLES // HIDDEN, number)
        if 0 < places < LONGEST
    ]


def _with_places(batch: Batch, ids: Tensor, token: int, places: int) -> dict[str, Any]:
    """Tokens with as many places for what is no text after the first."""
    between = torch.full((len(ids), places), token)
    long = torch.cat([ids[:, :1], between, ids[:, 1:]], 1)
    kinds = {name: (long == token).long() for name in ("mm_token_type_ids",) if batch.takes(name)}
    return {"input_ids": long, **kinds}


def _input_ids(batch: Batch) -> Tensor | None:
    ids = batch.ids()
    if batch.mapping == "sequence-classification" and batch.takes("decoder_input_ids"):
        ids[:, -1] = batch.setting("eos_token_id", default=2)  # where such models read
    if batch.mapping == "question-answering" and batch.setting("sep_token_id") is not None:
        ids[:, [2, 4, -1]] = batch.setting("sep_token_id")
    return ids


def _decoder_ids(batch: Batch) -> Tensor | None:
    """Those of an encoder-decoder whose decoder is given something of its own."""
    return batch.ids() if batch.mapping in ("seq-to-seq", "speech-seq-to-seq", "image-text-to-text") else None


def _of_robot(batch: Batch, *shape: int) -> Tensor | None:
    """Nothing where what goes by such a name is something else, as the state of a recurrent layer."""
    return batch.normal(SAMPLES, *shape) if batch.setting("max_action_dim") else None


def _boxes(batch: Batch) -> Tensor:
    """Of words on a page: left, top, right, bottom."""
    corners = batch.below(20, SAMPLES, TOKENS, 2)
    return torch.cat([corners, corners + 1 + batch.below(20, SAMPLES, TOKENS, 2)], -1)


TEXTS: dict[str, Callable[[Batch], Any]] = {
    "input_ids": _input_ids,
    "decoder_input_ids": _decoder_ids,
    "bbox": _boxes,
    "inputs": lambda batch: batch.ids() if not batch.takes("input_ids", "pixel_values", "input_values") else None,
    "visual_feats": lambda batch: batch.normal(SAMPLES, 4, batch.config.visual_feat_dim),
    "visual_pos": lambda batch: batch.normal(SAMPLES, 4, batch.config.visual_pos_dim),
    "task_inputs": lambda batch: batch.ids(SAMPLES, batch.config.task_seq_len),
    "qformer_input_ids": lambda batch: batch.ids(),
    # Of a robot: where it is, and actions that are to be made of noise
    "state": lambda batch: _of_robot(batch, batch.setting("max_state_dim")),
    "noise": lambda batch: _of_robot(batch, batch.setting("chunk_size"), batch.setting("max_action_dim")),
    "timestep": lambda batch: (torch.arange(SAMPLES) + 1) / (SAMPLES + 1) if batch.setting("max_action_dim") else None,
}
"""Name of a parameter of forwards -> what is given for it; None for nothing."""


def label(batch: Batch, entries: dict[str, Any]) -> None:
    """Add what the samples' labels are, as a training has them."""
    ids = entries.get("input_ids")
    ids = ids[..., 0] if ids is not None and ids.dim() > 2 else ids
    if batch.mapping in ("causal-lm", "masked-lm", "image-text-to-text") and ids is not None:
        entries["labels"] = ids
    elif batch.mapping in ("seq-to-seq", "speech-seq-to-seq"):
        entries["labels"] = entries.get("decoder_input_ids", ids)
    elif batch.mapping.endswith("-classification") and batch.mapping != "token-classification":
        entries["labels"] = torch.arange(SAMPLES) % 2
    elif batch.mapping == "token-classification" and ids is not None:
        entries["labels"] = torch.arange(ids.numel()).view(ids.shape) % 2
    elif batch.mapping == "question-answering":
        entries["start_positions"], entries["end_positions"] = torch.tensor([2, 3]), torch.tensor([4, 5])
