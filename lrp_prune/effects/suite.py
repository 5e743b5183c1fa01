"""A suite: named entries, of one's own or built in, each measured by itself."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lrp_prune.arguments import check_integer
from lrp_prune.effects import generated, kinds
from lrp_prune.effects.answers import Answers
from lrp_prune.effects.entries import Choice, Entry, Likelihood, Losses, line_name, value_of
from lrp_prune.effects.limits import ALLOWED, checked_limits
from lrp_prune.effects.neutral import neutral
from lrp_prune.effects.rows import ROWS, padded
from lrp_prune.effects.windows import up_to
from lrp_prune.tasks import IndirectObject
from lrp_prune.tasks.prompts import continuation, tokens
from lrp_prune.tasks.task import Task

KINDS: tuple[str, ...] = (
    *kinds.TEXTS,
    *generated.TEXTS,
    "copying",
    "facts in context",
    "indirect objects",
    "neutral sentences",
    "answers",
)
"""What is built in."""


class Suite(Mapping[str, Entry]):
    """Named entries of which each is measured by itself: what a correction is to leave as it is.

    Args:
        entries: by name: texts (a list of strings, which ``tokenizer`` cuts into windows), tokens ``[windows, tokens]``, batches
            of a causal language model (mappings with ``input_ids``), a :class:`~lrp_prune.tasks.Task`, a function from the model
            to losses ``[samples]`` (for any other model), or an :class:`Entry`.
        tokenizer: the model's, for texts.
        windows: how many windows of each text, at most.
        length: tokens in each.
        seed: of the places that windows are cut from.
        missing: what could not be had, and why; it is shown with the figures.
        allowed: how much worse each may become, by name or pattern, as a share (:meth:`SideEffects.beyond`).

    Raises:
        ValueError: for entries that are none of these, or texts without a tokenizer or too short for two windows.

    Example:
        >>> own = Suite({"counting": torch.arange(12).view(2, 6)})
        >>> own["counting"].samples, list(own)
        (2, ['counting'])
    """

    def __init__(
        self,
        entries: Mapping[str, Any],
        tokenizer: Any = None,
        *,
        windows: int = 8,
        length: int = 256,
        seed: int = 0,
        missing: Mapping[str, str] | None = None,
        allowed: Mapping[str, float] | float = ALLOWED,
    ) -> None:
        self.missing = dict(missing or {})
        self._entries: dict[str, Entry] = {}
        for name, given in entries.items():
            try:
                self._entries[name] = _entry(given, tokenizer, windows, length, seed)
            except ValueError as error:
                raise ValueError(f"{name!r}: {error}") from error
        self.allowed = self.limits(allowed)

    @classmethod
    def halves(
        cls,
        tokenizer: Any,
        own: Mapping[str, Sequence[str]] | None = None,
        *,
        kinds: Sequence[str] = KINDS,
        windows: int = 8,
        length: int = 256,
        samples: int = 32,
        answer_tokens: int = 40,
        seed: int = 0,
        allowed: Mapping[str, float] | float = ALLOWED,
    ) -> tuple["Suite", "Suite"]:
        """What is built in, and one's own texts, in two suites that have no text in common: to select by, and to test on.

        Texts are parted by their source: speeches, topics, files and modules are on one side each, and paragraphs that several
        have are on one side too; what is generated has templates, names and items of its own on each side, copying has tokens of
        its own. What is read depends on the packages that are installed: figures of two environments differ, those of before and
        after do not.

        Args:
            tokenizer: the model's.
            own: texts by name, each text a document; parted like the others. One that has the name of a kind is in its place.
            kinds: which of :data:`KINDS`.
            windows: windows of each kind of text, at most; at least 2, for an interval.
            length: tokens in a window.
            samples: facts, copied sequences (half as many) and prompts (24 at most).
            answer_tokens: tokens generated for each prompt.
            seed: of all that is chosen.
            allowed: the limits of both.

        Returns:
            The suite to select by and the one to test on. What is missing is in :attr:`missing`, with the way to get it.

        Raises:
            ValueError: for an unknown kind, own texts of fewer than two documents, a number that is too small, a limit of what is
                not measured, or if nothing is left.
        """
        unknown = [name for name in kinds if name not in KINDS]
        if unknown or isinstance(kinds, str):
            raise ValueError(f"kinds must be some of {KINDS}, got {unknown or kinds!r}")
        for argument, number, least in (
            ("windows", windows, 2),
            ("length", length, 4),
            ("samples", samples, 2),
            ("answer_tokens", answer_tokens, 1),
        ):
            check_integer(argument, number, least)
        build = _Builder(tokenizer, windows, length, samples, answer_tokens, seed)
        for name in kinds:
            if name not in (own or {}):
                build.add(name)
        for name, texts in (own or {}).items():
            build.add_own(name, texts)
        if not build.found[1]:
            raise ValueError(
                "the suite is empty: " + "; ".join(f"{name}: {why}" for name, why in build.missing.items())
            )
        first, second = (cls(entries, missing=build.missing, allowed=allowed) for entries in build.found)
        return first, second

    def __getitem__(self, name: str) -> Entry:
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __repr__(self) -> str:
        return f"Suite({', '.join(self)})"

    def __or__(self, other: "Suite") -> "Suite":
        """Both; entries and limits of the second where they have the same name."""
        if not isinstance(other, Suite):
            return NotImplemented
        return Suite(
            {**self, **other}, missing={**self.missing, **other.missing}, allowed={**self.allowed, **other.allowed}
        )

    def only(self, names: Iterable[str]) -> "Suite":
        """The entries of these names.

        Raises:
            ValueError: for a name that is none.
        """
        chosen = list(names)
        for name in chosen:
            if name not in self:
                raise ValueError(f"the suite has no {name!r}, it has {', '.join(self)}")
        allowed = {
            pattern: limit
            for pattern, limit in self.allowed.items()
            if any(fnmatchcase(line, pattern) for line in self._lines(chosen))
        }
        return Suite({name: self[name] for name in chosen}, missing=self.missing, allowed=allowed)

    def limits(self, allowed: Mapping[str, float] | float) -> dict[str, float]:
        """Limits by name or pattern, each of which is of something that is measured.

        Raises:
            ValueError: for one that is not, with what is missing and why; or one that is no share.
        """
        try:
            return checked_limits(allowed, self._lines(self))
        except ValueError as error:
            missing = "".join(f"; {name!r} is missing: {why}" for name, why in self.missing.items())
            raise ValueError(f"{error}{missing}") from error

    def _lines(self, names: Iterable[str]) -> list[str]:
        return [line_name(name, line) for name in names for line in self[name].lines]

    def measures(self) -> dict[str, Callable[[nn.Module], float]]:
        """A function from the model to the value of each entry, lower is better; what is only described has none."""
        return {name: partial(value_of, entry) for name, entry in self.items() if entry.directed}

    @property
    def fingerprint(self) -> str:
        """A hash of all tokens, by which it is seen whether two figures are of the same samples."""
        digest = hashlib.sha256()
        for name, entry in self.items():
            digest.update(name.encode())
            for part in entry.parts:
                given = part if isinstance(part, Mapping) else {"part": part}
                for key, value in given.items():
                    digest.update(f"{key}{value.tolist() if isinstance(value, Tensor) else value}".encode())
        return digest.hexdigest()[:16]


def _entry(given: Any, tokenizer: Any, windows: int, length: int, seed: int) -> Entry:
    if isinstance(given, Entry):
        return given
    if isinstance(given, Task):
        return Choice(given)
    if isinstance(given, Tensor):
        return Likelihood(torch.split(given, ROWS))
    if callable(given):
        return Losses(given)
    if isinstance(given, str | Mapping) or not isinstance(given, Iterable):
        raise ValueError(
            "an entry is a list of texts, tokens [windows, tokens], batches, a task, or a function from the model to losses, got "
            f"{type(given).__name__}"
        )
    items = list(given)
    if not any(isinstance(item, str) for item in items):
        return Likelihood(items)
    return Likelihood(torch.split(_windows(items, tokenizer, windows, length, seed), ROWS))


def _windows(texts: Sequence[str], tokenizer: Any, count: int, length: int, seed: int) -> Tensor:
    if tokenizer is None:
        raise ValueError("texts need the model's tokenizer: pass tokenizer=")
    found = up_to(texts, tokenizer, count, length, seed)
    if len(found) < 2:
        raise ValueError(
            f"{len(texts)} texts have {len(found)} windows of {length} tokens: give more text, or a shorter length"
        )
    return found


class _Builder:
    """Collects the entries of both halves, and what is missing."""

    def __init__(self, tokenizer: Any, windows: int, length: int, samples: int, answer_tokens: int, seed: int) -> None:
        self.tokenizer, self.windows, self.length, self.samples = tokenizer, windows, length, samples
        self.answer_tokens, self.seed = answer_tokens, seed
        self.found: tuple[dict[str, Any], dict[str, Any]] = ({}, {})
        self.missing: dict[str, str] = {}

    def add(self, name: str) -> None:
        """One that is built in, or the reason why it is not there."""
        special: dict[str, Callable[[int], Entry]] = {
            "copying": self._copying,
            "facts in context": self._facts,
            "neutral sentences": self._neutral,
            "answers": self._answers,
        }
        try:
            if name in kinds.TEXTS:
                entries = self._texts(kinds.halved(kinds.TEXTS[name][0]()))
            elif name in generated.TEXTS:
                make = generated.TEXTS[name]
                entries = self._texts(tuple(list(make(half, self.seed, 4 * self.windows)) for half in (0, 1)))
            elif name == "indirect objects":
                entries = [Choice(task) for task in IndirectObject(self.tokenizer, self.samples, self.seed).split()]
            else:
                entries = [special[name](half) for half in (0, 1)]
        except ImportError as error:
            self.missing[name] = f"{error.name or error} is not installed: {kinds.TEXTS[name][1]}"
        except (ValueError, OSError) as error:
            self.missing[name] = str(error)
        else:
            for half, entry in zip(self.found, entries, strict=True):
                half[name] = entry

    def add_own(self, name: str, texts: Sequence[str]) -> None:
        """One's own texts."""
        if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
            raise ValueError(f"own[{name!r}] must be a list of texts: only texts can be parted into halves")
        try:
            entries = self._texts(kinds.halved((text, text) for text in texts))
        except ValueError as error:
            raise ValueError(f"own[{name!r}]: {error}") from error
        for half, entry in zip(self.found, entries, strict=True):
            half[name] = entry

    def _texts(self, halves: Sequence[Sequence[str]]) -> list[Entry]:
        cut = [_windows(texts, self.tokenizer, self.windows, self.length, self.seed) for texts in halves]
        return [Likelihood(torch.split(ids, ROWS)) for ids in cut]

    def _copying(self, half: int) -> Entry:
        special = set(getattr(self.tokenizer, "all_special_ids", ()))
        size = len(self.tokenizer) if hasattr(self.tokenizer, "__len__") else 0
        vocabulary = [token for token in range(size) if token not in special]
        if len(vocabulary) < 4:
            raise ValueError(
                "the tokenizer does not say how many tokens it has (len(tokenizer)), of which some are copied"
            )
        length = min(64, self.length // 2)
        rows = generated.given_twice(half, self.seed, max(self.samples // 2, 2), length, vocabulary)
        return Likelihood(padded(rows))

    def _facts(self, half: int) -> Entry:
        rows = []
        for asked in generated.facts(half, self.seed, self.samples):
            ids, answer = tokens(self.tokenizer, asked.prompt), continuation(self.tokenizer, asked.prompt, asked.answer)
            if answer:
                rows.append(([*ids, *answer], [-100] * len(ids) + list(answer)))
        if len(rows) < 2:
            raise ValueError("the tokenizer does not continue a prompt by an answer's tokens")
        return Likelihood(padded(rows))

    def _neutral(self, half: int) -> Entry:
        rows = [tokens(self.tokenizer, text) for text in neutral(half, self.seed)]
        return Likelihood(padded((row, row) for row in rows if len(row) > 1))

    def _answers(self, half: int) -> Entry:
        prompts = [tokens(self.tokenizer, text) for text in generated.beginnings(half, self.seed, self.samples)]
        return Answers(prompts, self.tokenizer, self.answer_tokens)
