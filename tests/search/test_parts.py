"""Data in three parts: nothing that judges is known before."""

import logging

import pytest
import torch

from lrp_prune.search import Parts, parted


def batches(number: int, seed: int = 0) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(3, 2, generator=generator), torch.arange(3)) for _ in range(number)]


@pytest.mark.parametrize("number", [3, 4, 7, 20])
def test_each_batch_is_in_one_part_and_none_is_empty(number: int) -> None:
    given = batches(number)
    found = parted(given, seed=1)
    assert all(found) and sorted(id(batch) for part in found for batch in part) == sorted(map(id, given))


def test_the_seed_says_which_and_the_shares_how_many() -> None:
    given = batches(20)
    first, again, other = (parted(iter(given), seed=seed) for seed in (0, 0, 1))
    assert first.digest() == again.digest() != other.digest()
    assert [len(part) for part in parted(given, shares=(0.1, 0.2, 0.7))] == [2, 4, 14]


def test_named_parts_are_taken_as_they_are() -> None:
    given = dict(zip(Parts._fields, (batches(2, seed) for seed in range(3)), strict=True))
    found = parted({name: iter(part) for name, part in given.items()})
    assert all(mine is theirs for name in given for mine, theirs in zip(getattr(found, name), given[name], strict=True))
    assert found.digest() != parted({**given, "test": batches(2, 3)}).digest()


@pytest.mark.parametrize("one, other", [("reference", "test"), ("selection", "test"), ("reference", "selection")])
def test_parts_with_samples_in_common_are_refused(one: str, other: str) -> None:
    given = dict(zip(Parts._fields, (batches(2, seed) for seed in range(3)), strict=True))
    with pytest.raises(ValueError, match=f"the parts {one!r} and {other!r} have a batch in common"):
        parted({**given, other: [*given[other], given[one][0]]})
    copied = [tuple(tensor.clone() for tensor in batch) for batch in given[one]]
    divided = [(inputs[1:], labels[1:]) for inputs, labels in copied]
    with pytest.raises(ValueError, match=f"4 of 4 samples of the part {other!r} are in {one!r}"):
        parted({**given, other: divided})


def test_few_equal_samples_are_told(caplog) -> None:
    given = dict(zip(Parts._fields, (batches(20, seed) for seed in range(3)), strict=True))
    given["test"][0][0][1] = given["selection"][3][0][1]
    with caplog.at_level(logging.WARNING, "lrp_prune"):
        parted(given)
    assert [record.message for record in caplog.records] == [
        "1 of 60 samples of the part 'test' equal some in 'selection'"
    ]


@pytest.mark.parametrize(
    "given, message",
    [
        (batches(2), "there are only 2: give smaller batches, or the parts by name"),
        ({"reference": batches(1), "test": batches(1)}, "parts must be .*'selection'.*got"),
        (dict.fromkeys(Parts._fields, ()), "the part 'reference' has no batch"),
        (
            {**dict.fromkeys(Parts._fields, batches(1)), "test": torch.ones(2, 2)},
            "the part 'test' must be an iterable of batches",
        ),
        ((torch.ones(4, 2), torch.ones(4)), "batches must be an iterable of batches"),
    ],
)
def test_what_cannot_be_parted_is_refused(given, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parted(given)


@pytest.mark.parametrize("shares", [(0.5, 0.5), (0.5, 0.5, 0.5), (1.0, 0.0, 0.0)])
def test_shares_are_three_of_a_whole(shares) -> None:
    with pytest.raises(ValueError, match="three positive numbers of sum 1"):
        parted(batches(5), shares=shares)
