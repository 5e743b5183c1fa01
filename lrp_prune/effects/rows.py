"""Prompts with answers, or texts, as padded batches."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

ROWS = 4
"""Long rows at once; of short ones four times as many."""


def padded(rows: Iterable[tuple[Sequence[int], Sequence[int]]], at_once: int = 4 * ROWS) -> list[dict[str, Tensor]]:
    """Batches of token ids with labels; padded on the right, rows of about the same length together."""
    ordered = sorted(rows, key=lambda row: len(row[0]))
    made = []
    for start in range(0, len(ordered), at_once):
        part = ordered[start : start + at_once]
        width = max(len(ids) for ids, _ in part)
        ids, mask, labels = (torch.full((len(part), width), fill, device="cpu") for fill in (0, 0, -100))
        for index, (row, label) in enumerate(part):
            ids[index, : len(row)], mask[index, : len(row)] = torch.tensor(row, device="cpu"), 1
            labels[index, : len(row)] = torch.tensor(label, device="cpu")
        made.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return made
