"""Exact selection over many tensors and per row, against full stable sorts."""

import math
import subprocess
import sys

import pytest
import torch

from lrp_prune.selection import bits, keys, selection
from lrp_prune.selection.rows import _kept, smallest_per_row
from lrp_prune.selection.selection import smallest

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def reference(tensors, k, order, kept=None):
    """What is kept, by a stable sort of everything: pruned entries first, then by value, then by position."""
    flat = torch.cat([tensor.reshape(-1).double() for tensor in tensors])
    flat = flat.abs() if order == "absolute" else flat + 0.0
    if kept is not None:
        alive = torch.cat([mask.reshape(-1) for mask in kept])
        flat = flat.masked_fill(~alive, -math.inf)
    result = torch.ones(flat.numel(), dtype=torch.bool)
    result[torch.sort(flat, stable=True).indices[:k]] = False
    parts = result.split([tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]


def chosen(tensors, k, **options):
    packed = smallest(tensors, k, **options).masks()
    return [bits.unpack(part, tensor.shape) for part, tensor in zip(packed, tensors, strict=True)]


def assert_same(found, expected):
    assert len(found) == len(expected)
    for mine, theirs in zip(found, expected, strict=True):
        assert torch.equal(mine, theirs)


def some_tensors(generator, kind, dtype, sizes):
    for size in sizes:
        values = torch.randn(size, generator=generator, dtype=torch.float64)
        if kind == "ties":
            values = (values * 2).round() / 2
        elif kind == "one value":
            values = torch.full_like(values, -0.75)
        elif kind == "zeros":
            values = torch.where(torch.rand(size, generator=generator) < 0.9, 0.0 * values, values)
        elif kind == "denormals":
            values = values * torch.finfo(dtype).smallest_normal / 8
        elif kind == "heavy tail":
            values = values.sign() * torch.exp(values * 4).clamp(max=6e4)
        yield values.to(dtype)


KINDS = ["normal", "ties", "one value", "zeros", "denormals", "heavy tail"]


@pytest.mark.parametrize("order", ["absolute", "signed"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_chosen_are_the_first_of_a_stable_sort(kind, dtype, order):
    generator = torch.Generator().manual_seed(len(kind))
    tensors = list(some_tensors(generator, kind, dtype, [(3, 5), (7,), (41, 13), (), (0,), (2, 3, 4, 5)]))
    total = sum(tensor.numel() for tensor in tensors)
    for k in [0, 1, 2, total // 3, total // 2, total - 1, total]:
        assert_same(chosen(tensors, k, order=order), reference(tensors, k, order))


@pytest.mark.parametrize("order", ["absolute", "signed"])
@pytest.mark.parametrize("kind", KINDS)
def test_large_tensors_over_chunk_boundaries(kind, order, monkeypatch):
    # Small limits, so that the sampled interval, its failure and the radix passes over all data each happen.
    monkeypatch.setattr(keys, "CHUNK", 1 << 10)
    monkeypatch.setattr(selection, "_STRIDE", 3)
    monkeypatch.setattr(selection, "_SMALLEST_SAMPLE", 64)
    generator = torch.Generator().manual_seed(7)
    tensors = list(some_tensors(generator, kind, torch.float32, [(1 << 10,), (1023, 3), ((1 << 13) + 5,), (1,)]))
    total = sum(tensor.numel() for tensor in tensors)
    for collected in (1 << 20, 16):
        monkeypatch.setattr(selection, "_COLLECTED", collected)
        monkeypatch.setattr(selection, "_COLLECTED_SHARE", 0.0)
        for k in [1, total // 100, total // 2, total * 9 // 10, total - 1]:
            assert_same(chosen(tensors, k, order=order), reference(tensors, k, order))


def test_a_sample_that_misleads_costs_no_exactness(monkeypatch):
    monkeypatch.setattr(selection, "_STRIDE", 2)
    monkeypatch.setattr(selection, "_SMALLEST_SAMPLE", 64)
    values = torch.rand(20_000, generator=torch.Generator().manual_seed(0))
    values[::2] += 100.0
    for k in [1, 5_000, 9_999, 10_000, 10_001, 15_000]:
        assert_same(chosen([values], k), reference([values], k, "absolute"))


@pytest.mark.slow
def test_random_lists_and_counts():
    generator = torch.Generator().manual_seed(3)
    for round_number in range(60):
        number = int(torch.randint(1, 6, (), generator=generator))
        sizes = [tuple(torch.randint(1, 30, (2,), generator=generator).tolist()) for _ in range(number)]
        kind = KINDS[round_number % len(KINDS)]
        tensors = list(some_tensors(generator, kind, DTYPES[round_number % 4], sizes))
        order = ["absolute", "signed"][round_number % 2]
        kept = [torch.rand(tensor.shape, generator=generator) < 0.8 for tensor in tensors]
        pruned = sum(int((~mask).sum()) for mask in kept)
        total = sum(tensor.numel() for tensor in tensors)
        k = int(torch.randint(pruned, total + 1, (), generator=generator))
        found = chosen(tensors, k, order=order, kept=[bits.pack(mask) for mask in kept])
        assert sum(int((~mask).sum()) for mask in found) == k
        assert_same(found, reference(tensors, k, order, kept))


def test_negative_zero_equals_zero():
    values = torch.tensor([0.0, -0.0, 0.0, -0.0, 1.0, -1.0])
    assert chosen([values], 2)[0].tolist() == [False, False, True, True, True, True]
    assert chosen([values], 3, order="signed")[0].tolist() == [False, False, True, True, True, False]


def test_tensors_of_different_types_are_compared_exactly():
    tensors = [torch.tensor([1.0, 3.0], dtype=torch.bfloat16), torch.tensor([1.0 + 1e-12, 0.5], dtype=torch.float64)]
    tensors.append(torch.tensor([1.0], dtype=torch.float16))
    assert_same(chosen(tensors, 3), reference(tensors, 3, "absolute"))


def test_views_are_read_in_logical_order():
    values = torch.randn(40, 30, generator=torch.Generator().manual_seed(1)).round(decimals=1)
    assert_same(chosen([values.t(), values[::2, 1:]], 700), reference([values.t(), values[::2, 1:]], 700, "absolute"))


@pytest.mark.parametrize("bad", [math.nan, -math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("order", ["absolute", "signed"])
def test_what_is_not_finite_is_refused_by_name(bad, order):
    values = torch.zeros(1000)
    values[777] = bad
    kept = torch.ones(1000, dtype=torch.bool)
    kept[777] = False
    for k in (1, 10, 1500):
        for mask in (None, bits.pack(kept)):
            with pytest.raises(ValueError, match="second has values that are infinite or NaN"):
                smallest([torch.ones(700), values], k, order=order, names=["first", "second"], kept=[None, mask])
    with pytest.raises(ValueError, match="second has values that are infinite or NaN"):
        smallest([torch.ones(700), values], 0, order=order, names=["first", "second"])
    with pytest.raises(ValueError, match="second has values that are infinite or NaN"):
        smallest_per_row(values.view(10, 100), 5, order=order, name="second")


def test_wrong_arguments_are_refused():
    values = [torch.ones(4)]
    with pytest.raises(ValueError, match=r"k must be in \[0, 4\].*got 5"):
        smallest(values, 5)
    with pytest.raises(ValueError, match="got -1"):
        smallest(values, -1)
    with pytest.raises(ValueError, match="order must be one of"):
        smallest(values, 1, order="descending")
    with pytest.raises(ValueError, match="3 of 4 entries are pruned already, more than the 2 asked for"):
        smallest(values, 2, kept=[torch.tensor([1], dtype=torch.uint8)])
    with pytest.raises(ValueError, match="has not its 4 entries"):
        smallest(values, 2, kept=[torch.tensor([1, 0], dtype=torch.uint8)])
    with pytest.raises(ValueError, match="only floating-point"):
        smallest([torch.ones(4, dtype=torch.int64)], 2)


def test_parts_of_two_processes_select_as_one():
    """Each rank holds half of the rows of each tensor; counts are summed, ties are ordered by tensor, then by rank."""
    import threading

    generator = torch.Generator().manual_seed(5)
    tensors = list(some_tensors(generator, "ties", torch.float32, [(40, 60), (10, 500), (2, 3)]))
    total = sum(tensor.numel() for tensor in tensors)
    barrier = threading.Barrier(2)
    posted = [None, None]

    def gather(rank, value):
        posted[rank] = value.clone()
        barrier.wait()
        both = [posted[0], posted[1]]
        barrier.wait()
        return both

    for k in [0, 1, total // 2, total - 3]:
        results = [None, None]

        def work(rank, k=k, results=results):
            def preceding(ties):
                table = torch.stack(gather(rank, ties), dim=1)
                return (table.view(-1).cumsum(0) - table.view(-1)).view(table.shape)[:, rank]

            parts = [tensor.chunk(2)[rank] for tensor in tensors]
            results[rank] = chosen(parts, k, reduce=lambda counts: sum(gather(rank, counts)), preceding=preceding)

        threads = [threading.Thread(target=work, args=(rank,)) for rank in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        together = [torch.cat([first, second]) for first, second in zip(*results, strict=True)]
        assert_same(together, reference(tensors, k, "absolute"))


def test_the_path_for_other_devices_gives_the_same(monkeypatch):
    """Tensors that say they are elsewhere take the torch path of each kernel."""

    class Elsewhere(torch.Tensor):
        @property
        def device(self):
            return type("Device", (), {"type": "other"})()

    generator = torch.Generator().manual_seed(2)
    values = next(iter(some_tensors(generator, "ties", torch.float32, [(1000,)])))
    for absolute in (True, False):
        form = keys.KeyFormat(absolute, torch.float32)
        here = form.of(values)
        there = form.of(values.as_subclass(Elsewhere))
        assert isinstance(there, Elsewhere)
        assert torch.equal(here, there.as_subclass(torch.Tensor))
        assert form.finite(there)
        for bad in (math.nan, math.inf, -math.inf):
            broken = torch.tensor([1.0, bad, -1.0])
            assert not form.finite(form.of(broken.as_subclass(Elsewhere)))
        for columns, k in ((1, 0), (20, 7), (100, 37), (100, 99)):
            matrix = here.view(-1, columns)
            expected = _kept(matrix.clone(), k)
            assert torch.equal(_kept(matrix.clone().as_subclass(Elsewhere), k).as_subclass(torch.Tensor), expected)
        assert keys.between(here, 0, 10**9, collect=False) == keys.between(there, 0, 10**9, collect=False)
        found = keys.between(there, 0, 10**9)[2].as_subclass(torch.Tensor)
        assert torch.equal(keys.between(here, 0, 10**9)[2], found)
        base = form.minimum >> 16
        counted = keys.histogram(there, base, 16, 1 << 16).as_subclass(torch.Tensor)
        assert torch.equal(keys.histogram(here, base, 16, 1 << 16), counted)


@pytest.mark.parametrize("columns", [1, 4, 16, 17, 100])
@pytest.mark.parametrize("order", ["absolute", "signed"])
@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_chosen_as_by_a_stable_sort_of_each(kind, order, columns):
    generator = torch.Generator().manual_seed(columns)
    values = next(iter(some_tensors(generator, kind, torch.bfloat16, [(37, columns)])))
    kept = torch.ones(values.shape, dtype=torch.bool)
    kept[:, : columns // 5] = False
    for mask in (None, kept):
        for k in sorted({columns // 5, columns // 2, columns - 1, columns} - ({0} if columns > 4 else set())):
            found = smallest_per_row(values, k, order=order, kept=mask)
            assert (found.sum(dim=1) == columns - k).all()
            rows = [reference([row], k, order, None if mask is None else [mask[0]])[0] for row in values]
            assert torch.equal(found, torch.stack(rows))


def test_a_row_that_lost_more_already_is_refused():
    kept = torch.tensor([[True, True, True], [True, False, False]])
    with pytest.raises(ValueError, match="a row of w has 2 of 3 entries pruned already, more than the 1 asked for"):
        smallest_per_row(torch.ones(2, 3), 1, kept=kept, name="w")


MEMORY = """
import torch
from lrp_prune.selection.selection import smallest
torch.set_num_threads(1)
def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) / 1024
values = [torch.randn(5_000_000, generator=torch.Generator().manual_seed(i)) for i in range(4)]
smallest([values[0][:100_000]], 50_000).masks()
before = peak()
masks = smallest(values, 10_000_000).masks()
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the peak memory from /proc")
def test_extra_memory_is_a_small_share_of_the_values():
    result = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True)
    # 20 M float32 values are 76 MiB and their masks 2.4; one copy of the values, or 1 byte a mask entry, would not fit.
    assert float(result.stdout) < 16
