"""The table of compression: what each way to prune a language model costs in perplexity, processor time and memory.

    python tests/benchmarks/compression_table.py                       # everything; takes most of a day on two cores
    python tests/benchmarks/compression_table.py --ways wanda sparsegpt "lrp, exact" --sparsities 0.5 2:4 --seeds 0
    python tests/benchmarks/compression_table.py --report              # table and figure of what is there
    python tests/benchmarks/compression_table.py --results docs/compression.jsonl --report  # of what the docs have
    python tests/benchmarks/compression_table.py --tasks arc_easy piqa  # zero-shot tasks besides, see zero_shot.py

SmolLM2, by itself on each kind of text: all ways see the same windows of it to calibrate on, and are measured on the same
windows of other documents. Relevance is collected once for a seed and used at each sparsity; its seconds and its peak count in
every one. Each result is written as soon as it is there and not computed again. `sparsegpt`, `wanda (paper)` and `ria` are
independent implementations from their papers (sparsegpt.py); everything else is the package. Linux only: the peak is read from
`/proc/self/status`.
"""

import argparse
import ctypes
import gc
import json
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from matplotlib.ticker import LogLocator, NullFormatter
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))
sys.path.append(str(Path(__file__).resolve().parents[2]))
import language_model
from presenting import aligned, colour, new_figure, titled

import lrp_prune
from lrp_prune import Relevance, Scope
from lrp_prune.effects import kinds
from lrp_prune.pruning import LeastSquares, budgets, scorer
from tests.benchmarks import sparsegpt
from tests.benchmarks.zero_shot import Tasks

Batches = list[dict[str, Tensor]]
Level = str
"""A share of the weights such as `0.5`, or a pattern such as `2:4`."""
LEVELS: tuple[Level, ...] = ("0.3", "0.5", "0.6", "0.7", "2:4")
TEXTS = {"speeches": kinds.speeches, "documentation": kinds.documentation}
REFERENCES = {"wanda (paper)": sparsegpt.wanda, "ria": sparsegpt.ria, "sparsegpt": sparsegpt.sparsegpt}
OURS: dict[str, tuple[str, dict[str, Any]]] = {
    "magnitude": ("magnitude", {"recalibrate": False}),
    "wanda": ("wanda", {}),
    "owl + wanda": ("wanda", {"recalibrate": False}),
    "gradient": ("gradient", {"recalibrate": False}),
    "lrp, selected only": ("lrp", {"recalibrate": False}),
    "lrp": ("lrp", {}),
    "lrp, column by column": ("lrp", {"compensation": "obs"}),
    "lrp, exact": ("lrp", {"compensation": "exact"}),
    "lrp, exact, to the dense model's inputs": ("lrp", {"compensation": LeastSquares(dense=1.0)}),
}
"""Of each way of the package the method whose scores it takes, and options of `prune`."""
WAYS = (*OURS, *REFERENCES)
DASHES, STARS = ("o-", "o--"), ("*", "d")
"""How the package's ways are drawn, and the independent implementations."""


def pattern_of(level: Level) -> sparsegpt.Pattern | None:
    """The two numbers of a pattern."""
    if ":" not in level:
        return None
    n, m = level.split(":")
    return int(n), int(m)


def share_of(level: Level) -> float:
    """How much is removed."""
    pattern = pattern_of(level)
    return float(level) if pattern is None else 1 - pattern[0] / pattern[1]


class Measured:
    """Seconds of the processor, and megabytes beyond what was held before, within a `with` block."""

    seconds = 0.0
    megabytes = 0.0

    def __enter__(self) -> "Measured":
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # what is free, and still the process's, would hide what is taken
        Path("/proc/self/clear_refs").write_text("5")
        self._held, self._start = _status("VmRSS"), time.process_time()
        return self

    def __exit__(self, *error: object) -> None:
        self.seconds, self.megabytes = time.process_time() - self._start, _status("VmHWM") - self._held


def _status(name: str) -> float:
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(f"{name}:")) / 1024


class Scores:
    """Relevance by method, collected once, and what that took."""

    def __init__(self, model: nn.Module, reference: Batches) -> None:
        self._model, self._reference = model, reference
        self._known: dict[str, tuple[Relevance, Measured]] = {}

    def of(self, method: str) -> tuple[Relevance, Measured]:
        """Those of the model as it is; it has to be the dense one."""
        if method not in self._known:
            self._known.clear()  # one at a time is held
            with Measured() as measured:
                scores = scorer(method, self._model)
                for batch in tqdm(self._reference, desc=method, leave=False, disable=None):
                    scores.update(batch)
                relevance = scores.compute()
            self._known[method] = relevance, measured
        return self._known[method]


def prune_(way: str, level: Level, model: nn.Module, ids: Tensor, scores: Scores) -> tuple[float, float]:
    """Prunes the model; seconds, and the peak in megabytes beyond the model and its relevance."""
    pattern, share = pattern_of(level), share_of(level)
    if way in REFERENCES:
        with Measured() as measured:
            REFERENCES[way](model, ids, share, pattern=pattern)
        return measured.seconds, measured.megabytes
    method, options = OURS[way]
    relevance, before = scores.of(method)
    scope = None if pattern is None else Scope(level)
    with Measured() as measured:
        sparsity: Any = share
        if way == "owl + wanda":
            sparsity = budgets.outlier_weighted(model, (), share, relevance=relevance, progress=False)
        batches = language_model.batches(ids, 1)
        lrp_prune.prune(model, batches, sparsity, method, scope, relevance=relevance, progress=False, **options)
    return before.seconds + measured.seconds, max(before.megabytes, measured.megabytes)


class Results:
    """A file of results, one JSON object a line."""

    def __init__(self, file: Path) -> None:
        self.file = file
        lines = file.read_text().splitlines() if file.exists() else []
        self.rows = {_key(row): row for row in map(json.loads, lines)}

    def add(self, row: dict[str, Any]) -> None:
        """Keep one, in the file as well."""
        self.rows[_key(row)] = row
        with self.file.open("a") as lines:
            lines.write(json.dumps(row) + "\n")

    def lacks(self, key: tuple[str, str, Level, int], tasks: Tasks | None) -> bool:
        """Whether something of a row is still to be measured."""
        row = self.rows.get(key)
        return row is None or not set(tasks.names if tasks else ()) <= set(row.get("tasks", ()))

    def of(self, text: str, way: str, level: Level, what: str = "perplexity") -> list[float]:
        """One value a seed, in their order."""
        found = sorted((key[3], row[what]) for key, row in self.rows.items() if key[:3] == (text, way, level))
        return [value for _, value in found]

    def dense(self, text: str) -> float:
        """The perplexity of the dense model."""
        return self.of(text, "dense", "0")[0]

    def texts(self) -> list[str]:
        """Those of which there is something, in the order of the table."""
        return [text for text in TEXTS if any(key[0] == text for key in self.rows)]

    def table(self, text: str) -> str:
        """Means over seeds with the lowest and the highest, seconds and peak (medians over all that was measured)."""
        levels = [level for level in LEVELS if any(self.of(text, way, level) for way in WAYS)]
        lines = [f"| {text}: dense {self.dense(text):.2f} | " + " | ".join(map(_title, levels)) + " | seconds | MB |"]
        lines.append("|---" * (3 + len(levels)) + "|")
        for way in WAYS:
            found = [self.of(text, way, level) for level in levels]
            if any(found):
                seconds, peak = (
                    sorted(value for level in levels for value in self.of(text, way, level, what))
                    for what in ("seconds", "megabytes")
                )
                costs = f"{seconds[len(seconds) // 2]:.0f} | {peak[len(peak) // 2]:,.0f}"
                lines.append(f"| {way} | " + " | ".join(map(_cell, found)) + f" | {costs} |")
        return "\n".join(lines)

    def zero_shot(self, text: str) -> str:
        """Mean accuracies at zero-shot tasks, over seeds; nothing if there are none."""
        found = [(key, row["tasks"]) for key, row in self.rows.items() if key[0] == text and "tasks" in row]
        names = list(dict.fromkeys(name for _, tasks in found for name in tasks))
        levels = [level for level in ("0", *LEVELS) if any(key[2] == level for key, _ in found)]
        lines = [
            f"| zero-shot, {text} | " + " | ".join(["removed", *names, "mean"]) + " |",
            "|---" * (3 + len(names)) + "|",
        ]
        for way in ("dense", *WAYS):
            for level in levels:
                cell = [tasks for key, tasks in found if key[1:3] == (way, level) and set(names) <= set(tasks)]
                if cell:
                    means = [mean(tasks[name] for tasks in cell) for name in names]
                    shown = " | ".join(f"{value:.3f}" for value in (*means, mean(means)))
                    lines.append(f"| {way} | {_title(level)} | {shown} |")
        return "\n".join(lines) if names else ""


def _key(row: dict[str, Any]) -> tuple[str, str, Level, int]:
    return row["text"], row["way"], row["level"], row["seed"]


def _title(level: Level) -> str:
    return level if ":" in level else f"{float(level):.0%}"


def _cell(values: Sequence[float]) -> str:
    if not values:
        return ""
    spread = f" ({min(values):.2f} to {max(values):.2f})" if len(values) > 1 else ""
    return f"{mean(values):.2f}{spread}"


def plot(results: Results, path: Path) -> None:
    """Perplexity as a multiple of the dense model's, by share of weights removed; patterns beside their share."""
    texts = results.texts()
    figure, axes = new_figure(4.6 * len(texts) + 1.6, 3.8, len(texts))
    for each, text in zip(axes, texts, strict=True):
        dense = results.dense(text)
        for index, way in enumerate(WAYS):
            points = [(share_of(level), results.of(text, way, level), level) for level in LEVELS]
            found = [(share, mean(values) / dense, level) for share, values, level in points if values]
            line = [(share, value) for share, value, level in found if ":" not in level]
            stars = [(share, value) for share, value, level in found if ":" in level]
            label = way if each is axes[0] else None
            if line:
                each.plot(
                    *zip(*line, strict=True),
                    DASHES[way in REFERENCES],
                    color=colour("", index),
                    label=label,
                    markersize=3,
                )
            if stars:
                each.plot(
                    *zip(*stars, strict=True), STARS[way in REFERENCES], color=colour("", index), fillstyle="none"
                )
        titled(each, text, "weights removed (stars, diamonds: 2:4)", "times the dense model's perplexity")
        each.set_yscale("log")
        each.set_xticks(sorted({share_of(level) for level in LEVELS}))
        each.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        each.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
        each.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        each.yaxis.set_minor_formatter(NullFormatter())
    figure.legend(loc="outside right upper", fontsize="small", frameon=False)
    figure.savefig(path, dpi=150)


def measure(results: Results, options: argparse.Namespace) -> None:
    """Do what is missing, text by text and seed by seed."""
    tasks = Tasks(options.tasks, options.task_folder, options.task_limit) if options.tasks else None
    model, tokenizer = language_model.load_model(options.model)
    judge = partial(_judged, model, tokenizer, tasks)
    dense = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ways = [way for way in WAYS if way in options.ways]  # those of one method follow each other
    for text in options.texts:
        calibration, held_out = language_model.split_documents([document for _, document in TEXTS[text]()])
        test = language_model.windows(held_out, tokenizer, options.held_out_windows)
        if results.lacks((text, "dense", "0", 0), tasks):
            results.add({"text": text, "way": "dense", "level": "0", "seed": 0, **judge(test)})
        for seed in options.seeds:
            ids = language_model.windows(calibration, tokenizer, options.calibration_windows, seed=seed)
            scores = Scores(model, language_model.batches(ids, 1))
            cells = [(way, level) for way in ways for level in options.sparsities if _possible(way, level)]
            todo = [cell for cell in cells if results.lacks((text, *cell, seed), tasks)]
            for way, level in tqdm(todo, desc=f"{text}, seed {seed}", dynamic_ncols=True):
                torch.manual_seed(seed)
                seconds, megabytes = prune_(way, level, model, ids, scores)
                row = {**judge(test), "seconds": round(seconds, 1), "megabytes": round(megabytes)}
                model.load_state_dict(dense)
                results.add({"text": text, "way": way, "level": level, "seed": seed, **row})
                tqdm.write(f"{text}, {way}, {_title(level)}, seed {seed}: {row['perplexity']:.2f}, {seconds:.0f} s")


def _judged(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tasks: Tasks | None, test: Tensor
) -> dict[str, Any]:
    """What a model is worth: its perplexity, and its accuracies at tasks."""
    accuracies = {} if tasks is None else {"tasks": tasks.accuracies(model, tokenizer)}
    return {"perplexity": language_model.perplexity(model, test), **accuracies}


def _possible(way: str, level: Level) -> bool:
    """A budget of layers is none where each has the same pattern."""
    return way != "owl + wanda" or pattern_of(level) is None


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--texts", nargs="+", choices=list(TEXTS), default=list(TEXTS), help="kinds of text")
    add("--ways", nargs="+", choices=WAYS, default=list(WAYS), help="rows of the table")
    add("--sparsities", nargs="+", choices=LEVELS, default=list(LEVELS), help="columns of the table")
    add("--seeds", nargs="+", type=int, default=[0, 1, 2], help="of the choice of windows to calibrate on")
    add("--calibration-windows", type=int, default=32, help="windows of 512 tokens to calibrate on")
    add("--tasks", nargs="+", default=[], help="zero-shot tasks of lm-eval (the extra `tasks`), most need a network")
    add("--task-folder", type=Path, help="folder of tasks of one's own")
    add("--task-limit", type=int, help="at most so many questions of each task")
    add("--held-out-windows", type=int, default=24, help="windows of other documents to measure on")
    add("--model", default=language_model.PACKAGED_MODEL, help="the packaged model, or a hub name or folder")
    add("--output", type=Path, default=Path("outputs/compression"), help="folder of results and figure")
    add("--results", type=Path, help="file of results, which goes on; by default results.jsonl in that folder")
    add("--report", action="store_true", help="only table and figure of what is there")
    options = parser.parse_args(arguments)
    options.output.mkdir(parents=True, exist_ok=True)
    results = Results(options.results or options.output / "results.jsonl")
    if not options.report:
        measure(results, options)
    for text in results.texts():
        for table in filter(None, (results.table(text), results.zero_shot(text))):
            print(aligned(table), end="\n\n")
    plot(results, options.output / "compression.png")


if __name__ == "__main__":
    main()
