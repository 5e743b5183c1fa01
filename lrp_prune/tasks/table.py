"""A task of the user's own, from rows, a CSV or a JSON file."""

import csv
import json
import os
import random
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lrp_prune.tasks.prompts import Encoded, Prompt, Tokenizer, encode
from lrp_prune.tasks.task import Task, divided

COLUMNS: tuple[str, ...] = ("clean", "counterfactual", "answers", "distractors")
"""What each row must have; ``template`` may be added, and is then what :meth:`TableTask.split` keeps apart."""


class TableTask(Task):
    """A task from a table of clean prompt, counterfactual prompt, answers and distractors.

    Args:
        tokenizer: any tokenizer of Hugging Face.
        rows: mappings with the columns ``clean``, ``counterfactual``, ``answers``, ``distractors`` and optionally
            ``template``. Answers and distractors are a text or a list of texts, with the space before them.
        metric: see :data:`~lrp_prune.tasks.METRICS`.

    Raises:
        ValueError: naming the row, if a column is missing, the prompts differ in length, or an answer is not one token.

    Example:
        >>> vocabulary = "the cat dog says meow woof".split()
        >>> def tokenizer(text, add_special_tokens=True):
        ...     return {"input_ids": [vocabulary.index(word) for word in text.split()]}
        >>> rows = [{"clean": "the cat says", "counterfactual": "the dog says", "answers": " meow", "distractors": " woof"}]
        >>> TableTask(tokenizer, rows).batches()[0]["answers"]
        tensor([[4]])
    """

    def __init__(
        self, tokenizer: Tokenizer, rows: Iterable[Mapping[str, Any]], metric: str = "logit_difference"
    ) -> None:
        super().__init__([_encoded(tokenizer, row, number) for number, row in enumerate(rows, 1)], metric)

    @classmethod
    def _of(cls, samples: Sequence[Encoded], metric: str) -> "TableTask":
        task = cls.__new__(cls)
        Task.__init__(task, samples, metric)
        return task

    @classmethod
    def from_csv(
        cls, tokenizer: Tokenizer, path: str | os.PathLike[str], metric: str = "logit_difference", separator: str = "|"
    ) -> "TableTask":
        """Read a CSV file with a header line; several answers or distractors in a cell are divided by ``separator``."""
        with open(path, newline="", encoding="utf-8-sig") as file:
            rows: list[dict[str, Any]] = [dict(row) for row in csv.DictReader(file)]
        for row in rows:
            for column in ("answers", "distractors"):
                if isinstance(row.get(column), str):
                    row[column] = row[column].split(separator)
        return cls(tokenizer, rows, metric)

    @classmethod
    def from_json(
        cls, tokenizer: Tokenizer, path: str | os.PathLike[str], metric: str = "logit_difference"
    ) -> "TableTask":
        """Read a JSON file that holds a list of rows.

        Raises:
            ValueError: if it holds something else.
        """
        rows = json.loads(Path(path).read_text(encoding="utf-8"))
        if not isinstance(rows, list):
            raise ValueError(f"{path} holds a {type(rows).__name__}, expected a list of rows")
        return cls(tokenizer, rows, metric)

    def split(self, held_out: float = 0.5, seed: int = 0) -> tuple["TableTask", "TableTask"]:
        """By template, where the table has more than one; else by rows, equal rows on one side."""
        templates = list(dict.fromkeys(sample.prompt.template for sample in self.samples))
        if len(templates) > 1:
            chosen = [set(part) for part in divided(templates, held_out, seed, 1, "templates")]
            parts = [[sample for sample in self.samples if sample.prompt.template in part] for part in chosen]
        else:
            prompts = list(dict.fromkeys(sample.clean for sample in self.samples))
            rows = [set(part) for part in divided(prompts, held_out, seed, 1, "different rows")]
            parts = [[sample for sample in self.samples if sample.clean in part] for part in rows]
        return self._of(parts[0], self.metric), self._of(parts[1], self.metric)

    def resampled(self, seed: int, samples: int | None = None) -> "TableTask":
        """Rows drawn with replacement (a bootstrap sample); None: as many as there are."""
        choice = random.Random(seed)
        number = len(self) if samples is None else samples
        return self._of([choice.choice(self.samples) for _ in range(number)], self.metric)


def _encoded(tokenizer: Tokenizer, row: Mapping[str, Any], number: int) -> Encoded:
    missing = [column for column in COLUMNS if not row.get(column)]
    if missing:
        raise ValueError(f"row {number} has no {missing[0]!r}: each row needs {', '.join(COLUMNS)}")
    answers, distractors = (
        tuple(row[column]) if isinstance(row[column], list | tuple) else (row[column],)
        for column in ("answers", "distractors")
    )
    for text in (row["clean"], row["counterfactual"], *answers, *distractors):
        if not isinstance(text, str):
            raise ValueError(f"row {number} holds {text!r} where text is expected: write {str(text)!r}")
    try:
        return encode(
            tokenizer,
            Prompt(row["clean"], row["counterfactual"], answers, distractors, str(row.get("template") or "")),
        )
    except ValueError as error:
        raise ValueError(f"row {number}: {error}") from error
