"""A behaviour by examples: what shows it, what is to stay, and how much of it there is; in two halves."""

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from lrp_prune.correction.guard import Guard
from lrp_prune.correction.judging import IGNORED, SHOWN, Judge, Shows, Where, listed
from lrp_prune.effects import Entry, Likelihood, Shown, Suite
from lrp_prune.effects.entries import measuring, value_of
from lrp_prune.effects.generating import greedy
from lrp_prune.effects.rows import padded
from lrp_prune.pruning import LRP
from lrp_prune.targets import NextToken, TokenMargin
from lrp_prune.tasks.prompts import continuation, tokens

Tokens = tuple[int, ...]
Row = tuple[list[int], list[int]]
WANTED = "wanted answers"


@dataclass(frozen=True)
class Behaviour:
    """What a correction is to take away, by examples of which one half is to find it with and the other to test on.

    Made by :meth:`from_prompts` or :meth:`from_answers`, which part the samples: what has the same prompt is on one side.

    Attributes:
        name: in a word or two.
        batches: answers that show it, the tokens that do labelled.
        target: what is explained of these: by how much the labelled tokens win over all others.
        measure: from the model to how much of it there is, on the half to find it with; lower is better.
        tested: the same on the other half, with intervals.
        wanted: answers that are to stay as likely as they are, of either half; none if no wanted samples were given.
        said: how many samples there are.
    """

    name: str
    batches: list[dict[str, Tensor]]
    target: Any
    measure: Callable[[nn.Module], float]
    tested: Entry
    wanted: tuple[Mapping[str, Entry], Mapping[str, Entry]] = field(default=({}, {}))
    said: str = ""

    @classmethod
    def from_prompts(
        cls,
        model: nn.Module,
        tokenizer: Any,
        undesired: Iterable[str | Sequence[int]],
        shows: Shows,
        *,
        wanted: Iterable[str | Sequence[int]] = (),
        held_out: Iterable[str | Sequence[int]] | None = None,
        where: Where | None = None,
        avoid: Iterable[int] | None = None,
        name: str = "undesired",
        answer_tokens: int = 40,
        batch_size: int = 32,
    ) -> "Behaviour":
        """What the model answers to some prompts and should not.

        Greedy answers are generated, and of the prompts those are kept whose answers show the behaviour; of wanted ones those
        whose answers do not.

        Args:
            model: a causal language model.
            tokenizer: its own.
            undesired: prompts that may draw the behaviour, texts or token ids; with a chat template applied where there is one.
            shows: what shows it in an answer's text: a regular expression, or a function to True or False, or a share.
            wanted: prompts whose answers are to stay as they are.
            held_out: the undesired prompts to test on, in place of every second one: with other words, say.
            where: from an answer's text to the stretches of it that show the behaviour, ``(first, last)`` character; of a regular
                expression its matches. Only their tokens are explained; all of the answer's where nothing is said.
            avoid: ids of tokens that are no alternatives to those; the explained ones themselves if not given.
            name: of the behaviour.
            answer_tokens: how many are generated for each prompt.
            batch_size: prompts at once.

        Raises:
            ValueError: if fewer than two prompts of a half draw it, or a prompt is in both halves.
        """
        judge = Judge(shows, where)
        given, kept_out = listed(undesired, "undesired"), None if held_out is None else listed(held_out, "held_out")
        prompts, held, others = (
            [_ids(prompt, tokenizer) for prompt in each] for each in (given, kept_out or [], listed(wanted, "wanted"))
        )
        side = _sides([prompts, others]) if kept_out is None else _given_sides(prompts, held, others)
        asked = list(side)
        answers: dict[Tokens, list[int]] = {}
        with measuring(model):
            for start in range(0, len(asked), batch_size):
                part = asked[start : start + batch_size]
                answers.update(zip(part, greedy(model, part, answer_tokens), strict=True))
        shown = {
            prompt: judge(tokenizer.decode(answer, skip_special_tokens=True)) for prompt, answer in answers.items()
        }
        halves = [
            [prompt for prompt in dict.fromkeys([*prompts, *held]) if side[prompt] == half and shown[prompt] >= SHOWN]
            for half in (0, 1)
        ]
        tried = [sum(side[prompt] == half for prompt in {*prompts, *held}) for half in (0, 1)]
        said = ", ".join(
            f"{len(half)} of {count} prompts to {use} draw it"
            for half, count, use in zip(halves, tried, ("find it with", "test on"), strict=True)
        )
        if min(map(len, halves)) < 2:
            raise ValueError(f"of {name!r} {said}, and each half needs two: give more prompts, or look at shows")
        labels = {prompt: judge.labels(answers[prompt], tokenizer.decode) for prompt in halves[0]}
        rows = [
            ([*prompt, *answers[prompt]], [IGNORED] * len(prompt) + label)
            for prompt, label in labels.items()
            if any(token != IGNORED for token in label)
        ]
        if not rows:
            raise ValueError(f"where marks no token in any of {len(labels)} answers that show {name!r}")
        if avoid is None:
            avoid = {token for _, row in rows for token in row if token != IGNORED} if judge.where else ()
        first, second = (Shown(half, tokenizer, judge, answer_tokens, batch_size) for half in halves)
        stay = [(prompt, answers[prompt]) for prompt in dict.fromkeys(others) if shown[prompt] < SHOWN]
        return cls(
            name,
            padded(rows),
            TokenMargin(avoid),
            lambda corrected: value_of(first, corrected),
            second,
            _wanted([(prompt, answer) for prompt, answer in stay if answer], side),
            said,
        )

    @classmethod
    def from_answers(
        cls,
        tokenizer: Any,
        undesired: Iterable[tuple[str, str]],
        wanted: Iterable[tuple[str, str]] = (),
        *,
        name: str = "undesired",
    ) -> "Behaviour":
        """What the model should not answer, and what it should, in your own words.

        How much of the behaviour there is, is the probability of an undesired answer's tokens (the geometric mean).

        Args:
            tokenizer: the model's.
            undesired: prompts with answers, as they are to be read on: with the space that an answer begins with.
            wanted: likewise; the same prompts with other answers, or others.
            name: of the behaviour.

        Raises:
            ValueError: if there are fewer than two undesired samples in a half, or an answer has no tokens of its own.
        """
        bad, good = (
            [_pair(pair, tokenizer, argument) for pair in listed(given, argument)]
            for given, argument in ((undesired, "undesired"), (wanted, "wanted"))
        )
        side = _sides([[prompt for prompt, _ in bad], [prompt for prompt, _ in good]])
        halves = [[_row(*pair) for pair in bad if side[pair[0]] == half] for half in (0, 1)]
        if min(map(len, halves)) < 2:
            raise ValueError(
                f"each half of {name!r} needs two undesired answers, there are {len(halves[0])} and {len(halves[1])}: what has "
                "the same prompt is in one half"
            )
        found, tested = (Likelihood(padded(rows), directed=False) for rows in halves)
        said = f"{len(halves[0])} answers to find it with, {len(halves[1])} to test on"
        return cls(
            name,
            list(found.parts),
            TokenMargin(()),
            lambda model: 1 / value_of(found, model),
            tested,
            _wanted(good, side),
            said,
        )

    def __repr__(self) -> str:
        return f"Behaviour({self.name!r}: {self.said})"

    def for_callback(self, halves: tuple[Suite, Suite]) -> dict[str, Any]:
        """Arguments by which :class:`~lrp_prune.callbacks.ContrastiveCorrection` does in a validation what :func:`correct` does.

        Args:
            halves: suites to select by and to test on.
        """
        selection, test = self.suites(halves)
        return {
            "behaviour": self.name,
            "general": self.general(halves[0]),
            "undesired": self.batches,
            "undesired_target": self.target,
            "method": LRP("epsilon", "signed", NextToken(odds=0), skip_first=1),
            "guard": Guard(by="squared_token"),
            "undesired_metric": self.measure,
            "general_metric": selection,
            "suite": test,
        }

    def general(self, collecting: Suite) -> dict[str, Any]:
        """Batches by name of which general relevance is collected: the texts of a suite, and the wanted answers.

        Raises:
            ValueError: if there are none.
        """
        entries = {**collecting, **self.wanted[0]}
        sets = {name: each.parts for name, each in entries.items() if isinstance(each, Likelihood) and each.directed}
        if not sets:
            raise ValueError(
                f"relevance needs texts of what is to stay, there are none among {', '.join(entries) or 'no entries'}: take "
                "Suite.halves(tokenizer), or give wanted samples"
            )
        return {name: list(parts) for name, parts in sets.items()}

    def suites(self, halves: tuple[Suite, Suite]) -> tuple[Suite, Suite]:
        """Two suites, to select by and to test on, with the wanted answers of either half and, in the second, the behaviour."""
        (first, second), (stay, also) = halves, self.wanted
        for name in (self.name, *stay, *also):
            if name in first or name in second:
                raise ValueError(
                    f"the suite has an entry {name!r} already: give the behaviour, or the entry, another name"
                )
        tested = Suite({self.name: self.tested}, allowed={})
        return first | Suite(stay, allowed={}), tested | second | Suite(also, allowed={})


def _ids(prompt: str | Sequence[int], tokenizer: Any) -> Tokens:
    ids = tokens(tokenizer, prompt) if isinstance(prompt, str) else tuple(int(token) for token in prompt)
    if not ids:
        raise ValueError(f"a prompt needs at least one token, got {prompt!r}")
    return ids


def _pair(pair: Any, tokenizer: Any, argument: str) -> tuple[Tokens, list[int]]:
    if isinstance(pair, str) or not isinstance(pair, Sequence) or [type(text) for text in pair] != [str, str]:
        raise ValueError(f"{argument} must be pairs of texts, (prompt, answer), got {pair!r}")
    prompt, answer = pair
    ids = list(continuation(tokenizer, prompt, answer))
    if not ids:
        raise ValueError(
            f"{argument}: the tokenizer does not continue {prompt!r} by tokens of {answer!r}: let the answer begin with its "
            "space, and the prompt end without one"
        )
    return _ids(prompt, tokenizer), ids


def _row(prompt: Tokens, answer: Sequence[int]) -> Row:
    return [*prompt, *answer], [IGNORED] * len(prompt) + list(answer)


def _wanted(
    pairs: Sequence[tuple[Tokens, list[int]]], side: Mapping[Tokens, int]
) -> tuple[dict[str, Entry], dict[str, Entry]]:
    rows = [[_row(*pair) for pair in pairs if side[pair[0]] == half] for half in (0, 1)]
    first, second = ({WANTED: Likelihood(padded(some))} if some else {} for some in rows)
    return dict(first), dict(second)


def _sides(sets: Sequence[Sequence[Tokens]]) -> dict[Tokens, int]:
    """The half of each prompt: every second one of each set, in the order of a hash; what is in two sets is on one side."""
    side: dict[Tokens, int] = {}
    for several in sets:
        new = sorted({*several} - side.keys(), key=lambda ids: hashlib.sha256(str(ids).encode()).digest())
        side.update((ids, number % 2) for number, ids in enumerate(new))
    return side


def _given_sides(prompts: Sequence[Tokens], held_out: Sequence[Tokens], others: Sequence[Tokens]) -> dict[Tokens, int]:
    both = {*prompts} & {*held_out}
    if both:
        raise ValueError(f"{len(both)} held_out prompts are among those that the behaviour is found with")
    return {**_sides([others]), **dict.fromkeys(prompts, 0), **dict.fromkeys(held_out, 1)}
