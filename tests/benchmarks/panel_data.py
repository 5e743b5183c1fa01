"""The data of the panel: made here, or shipped by packages; what is held out, nothing but the judgement sees."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from sys import path
from typing import Any

import torch
from sklearn.datasets import load_digits, make_friedman1
from torch import Tensor

Batch = Any
Split = list[Batch]


@dataclass
class Data:
    """Batches to train on, to calibrate with (of the training data), and to judge by, which nothing else sees."""

    train: Split
    reference: Split
    held_out: Split


def batched(size: int, *columns: Any) -> Split:
    """Tuples of tensors in batches of equal size; a mapping of tensors gives mappings."""
    if len(columns) == 1 and isinstance(columns[0], dict):
        length = len(next(iter(columns[0].values())))
        starts = range(0, length, size)
        return [{name: tensor[start : start + size] for name, tensor in columns[0].items()} for start in starts]
    return [tuple(column[start : start + size] for column in columns) for start in range(0, len(columns[0]), size)]


def split(columns: Any, size: int, seed: int, held_out: float = 0.25, reference: int = 4) -> Data:
    """Shuffled and parted; the reference is of the training part."""
    mapping = isinstance(columns, dict)
    length = len(next(iter(columns.values())) if mapping else columns[0])
    order = torch.randperm(length, generator=torch.Generator().manual_seed(seed))
    cut = round(length * (1 - held_out))

    def part(indices: Tensor) -> Split:
        if mapping:
            return batched(size, {name: tensor[indices] for name, tensor in columns.items()})
        return batched(size, *(column[indices] for column in columns))

    train = part(order[: cut - cut % size])
    return Data(train, train[:reference], part(order[cut:]))


@functools.cache
def _digits() -> tuple[Tensor, Tensor]:
    images, labels = load_digits(return_X_y=True)
    return torch.tensor(images, dtype=torch.float32) / 16 - 0.3, torch.tensor(labels)


def digits(shape: Sequence[int], name: str | None = None) -> Callable[[int], Data]:
    """8 x 8 images of handwritten digits in some shape, in pairs or under the name that the model calls them by."""

    def make(seed: int) -> Data:
        images, labels = _digits()
        images = images.reshape(-1, *shape)
        return split((images, labels) if name is None else {name: images, "labels": labels}, 32, seed)

    return make


@functools.cache
def speeches() -> str:
    """State of the Union addresses, one after the other."""
    path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))
    from language_model import load_documents

    return "\n".join(load_documents())


@functools.cache
def characters() -> tuple[Tensor, int]:
    """The speeches as numbers of characters; rare ones share one."""
    text = speeches()[:1_500_000]
    counts: dict[str, int] = {}
    for character in text:
        counts[character] = counts.get(character, 0) + 1
    known = sorted(character for character, count in counts.items() if count > 200)
    index = {character: number + 2 for number, character in enumerate(known)}  # 0 is padding, 1 is a mask
    return torch.tensor([index.get(character, 1) for character in text]), len(known) + 2


def character_windows(length: int, number: int) -> Callable[[int], Data]:
    """Windows of text; what is held out is of other speeches."""

    def make(seed: int) -> Data:
        ids, _ = characters()
        cut = round(0.85 * len(ids))
        generator = torch.Generator().manual_seed(seed)
        starts = torch.randint(cut - length, (number,), generator=generator)
        later = torch.randint(cut, len(ids) - length, (256,), generator=torch.Generator().manual_seed(0))
        windows = torch.stack([ids[start : start + length] for start in (*starts.tolist(), *later.tolist())])
        train = batched(16, {"input_ids": windows[:number], "labels": windows[:number]})
        return Data(train, train[:6], batched(16, {"input_ids": windows[number:], "labels": windows[number:]}))

    return make


def masked_chains(seed: int) -> Data:
    """Walks through 60 states with four ways on from each; a fifth of the states is hidden, to be guessed from both sides."""
    ways = torch.randint(2, 62, (62, 4), generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(seed + 1)
    ids = torch.empty(8192, 24, dtype=torch.int64)
    ids[:, 0] = torch.randint(2, 62, (8192,), generator=generator)
    for place in range(1, 24):
        ids[:, place] = ways[ids[:, place - 1], torch.randint(4, (8192,), generator=generator)]
    hidden = torch.rand(ids.shape, generator=generator) < 0.2
    return split({"input_ids": ids.masked_fill(hidden, 1), "labels": ids.masked_fill(~hidden, -100)}, 32, seed)


def counted_sequences(seed: int) -> Data:
    """Counting modulo 16 from anywhere, in steps of one, two or three: after two tokens all others are beyond doubt."""
    generator = torch.Generator().manual_seed(seed + 1)
    start, step = torch.randint(16, (4096, 1), generator=generator), torch.randint(1, 4, (4096, 1), generator=generator)
    ids = (start + step * torch.arange(20)) % 16
    return split({"input_ids": ids, "labels": ids}, 32, seed)


def marked_sequences(seed: int) -> Data:
    """Two classes that a few tokens tell apart beyond doubt: a classifier is soon sure of everything."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(2, (2048,), generator=generator)
    ids = torch.randint(20, 100, (2048, 20), generator=generator)
    for row, label in enumerate(labels.tolist()):
        places = torch.randperm(20, generator=generator)[:4]
        ids[row, places] = torch.randint(10 * label, 10 * label + 10, (4,), generator=generator)
    return split({"input_ids": ids, "labels": labels}, 32, seed)


@functools.cache
def words() -> tuple[Tensor, Tensor, int]:
    """Windows of 32 words of speeches, the quarter of the time line that each is from, and the number of words."""
    said = speeches().lower().split()
    counts: dict[str, int] = {}
    for word in said:
        counts[word] = counts.get(word, 0) + 1
    known = sorted(counts, key=lambda word: -counts[word])[:2000]
    index = {word: number + 1 for number, word in enumerate(known)}
    ids = torch.tensor([index.get(word, 0) for word in said])
    windows = ids[: len(ids) // 32 * 32].view(-1, 32)
    eras = (torch.arange(len(windows)) * 4 / len(windows)).long()
    return windows, eras, len(known) + 1


def eras(seed: int) -> Data:
    """From which quarter of the time line some words are, a fifth of the labels wrong: nothing is ever sure."""
    windows, labels, _ = words()
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(windows), generator=generator)[:6144]
    labels = labels[chosen]
    wrong = torch.rand(labels.shape, generator=generator) < 0.2
    labels = torch.where(wrong, torch.randint(4, labels.shape, generator=generator), labels)
    return split({"input_ids": windows[chosen], "labels": labels}, 32, seed)


def tagged(seed: int) -> Data:
    """A tag for each token, by its own kind and that of the token before."""
    generator = torch.Generator().manual_seed(seed)
    kinds = torch.randint(4, (100,), generator=torch.Generator().manual_seed(0))
    ids = torch.randint(100, (2048, 16), generator=generator)
    own = kinds[ids]
    before = torch.cat([torch.zeros_like(own[:, :1]), own[:, :-1]], 1)
    return split({"input_ids": ids, "labels": (own + before) % 4}, 32, seed)


def reversed_sequences(seed: int) -> Data:
    """Six numbers to be said backwards."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, 22, (6144, 6), generator=generator)
    return split({"input_ids": ids, "labels": ids.flip(1)}, 64, seed)


def friedman(seed: int) -> Data:
    """Friedman's first function of ten numbers, of which five matter."""
    inputs, values = make_friedman1(2048, noise=0.3, random_state=seed)
    values = (values - 14.4) / 4.9
    columns = torch.tensor(inputs, dtype=torch.float32) * 2 - 1, torch.tensor(values, dtype=torch.float32)[:, None]
    return split(columns, 32, seed)


@functools.cache
def language_model() -> Any:
    from language_model import load_model

    return load_model()


def token_windows(manual: bool) -> Callable[[int], Data]:
    """Windows of SmolLM2's tokens, of speeches or of Python's manual; what is held out is of other texts."""

    def make(seed: int) -> Data:
        speeches()  # its folder is on the path from here on
        from pydoc_data.topics import topics

        from language_model import batches, load_documents, split_documents, windows

        tokenizer = language_model()[1]
        calibration, held_out = split_documents(list(topics.values()) if manual else load_documents())
        reference = batches(windows(calibration, tokenizer, 8, 256, seed=seed), 1)
        return Data(reference, reference, batches(windows(held_out, tokenizer, 12, 256, seed=0), 1))

    return make


def token_guess(manual: bool) -> float:
    """The log-likelihood of tokens by their frequency alone in what is held out: no model does worse with good reason."""
    ids = torch.cat([batch["input_ids"].flatten() for batch in token_windows(manual)(0).held_out])
    shares = torch.bincount(ids).double() / len(ids)
    return float((shares * shares.clamp(min=1e-12).log()).sum())


def character_guess() -> float:
    """The log-likelihood of characters by their frequency alone."""
    ids, size = characters()
    shares = torch.bincount(ids, minlength=size).double() / len(ids)
    return float((shares * shares.clamp(min=1e-9).log()).sum())
