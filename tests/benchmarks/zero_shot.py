"""Zero-shot tasks of `lm-eval` for compression_table.py: needs the extra `tasks`, and a network for tasks of a hub.

    pip install -c constraints.txt -e '.[tasks]'
    python tests/benchmarks/compression_table.py --tasks arc_easy piqa winogrande --sparsities 0.5
    python tests/benchmarks/compression_table.py --tasks mine --task-folder my_tasks  # of local data: no network

A folder that was pruned and saved by any of the examples is judged without any of this: `lm_eval --model hf --model_args
pretrained=pruned --tasks arc_easy`.
"""

import logging
import warnings
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

MEASURES = ("acc_norm", "acc")
"""The first of these that a task has counts: accuracy with likelihoods by length, or as they are."""


def check_installed() -> None:
    """Raises ImportError if `lm-eval` is missing."""
    if find_spec("lm_eval") is None:
        raise ImportError("zero-shot tasks are judged by lm-eval: pip install -c constraints.txt -e '.[tasks]'")


class Tasks:
    """Tasks that a model is judged by.

    Args:
        names: of tasks or groups that `lm-eval` knows, or that the folder has.
        folder: of tasks of one's own, a YAML file each.
        limit: at most so many questions of each.
        batch_size: answers that are judged at a time.

    Raises:
        ImportError: `lm-eval` is missing.
        ValueError: a task is not known.
    """

    def __init__(
        self, names: Sequence[str], folder: Path | None = None, limit: int | None = None, batch_size: int = 8
    ) -> None:
        check_installed()
        from lm_eval.tasks import TaskManager

        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        self.names, self._limit, self._batch_size = list(names), limit, batch_size
        if folder is not None:  # by itself, which is there at once
            self._manager = TaskManager(include_path=str(folder), include_defaults=False)
        if folder is None or self._unknown():
            self._manager = TaskManager(include_path=None if folder is None else str(folder))
        if unknown := self._unknown():
            raise ValueError(f"lm-eval knows no task {', '.join(unknown)}: `lm_eval ls tasks` lists those that it has")

    def _unknown(self) -> list[str]:
        return [name for name in self.names if name not in self._manager.all_tasks]

    def accuracies(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> dict[str, float]:
        """The accuracy at each task, in [0, 1].

        Raises:
            ValueError: a task has no accuracy.
        """
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM

        judged = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=self._batch_size)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found: dict[str, Any] = simple_evaluate(
                model=judged,
                tasks=self.names,
                task_manager=self._manager,
                limit=self._limit,
                bootstrap_iters=0,
                log_samples=False,
            )
        values = {**found["results"], **found.get("groups", {})}
        return {name: _accuracy(name, values[name]) for name in self.names}


def _accuracy(name: str, values: dict[str, Any]) -> float:
    for measure in MEASURES:
        if f"{measure},none" in values:
            return float(values[f"{measure},none"])
    known = sorted(value for value in values if "," in value and "stderr" not in value)
    raise ValueError(f"the task {name} has none of {', '.join(MEASURES)} but {', '.join(known)}")
