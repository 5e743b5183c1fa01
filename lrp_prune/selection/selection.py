"""The k smallest of many tensors, exactly, without a sort and without a concatenated copy.

The k-th smallest key is found by radix selection (the most significant digits first, one histogram for each): the
interval that holds it shrinks to one key. Two things make it fast. A strided sample first tells an interval that is
narrow and almost surely right, and one pass over the data counts what is below, checks that guess (a wrong one costs
time, never exactness) and collects the few keys inside, on which the radix passes then run. All temporaries are of a
chunk's size, or a small share of the entries for the collected keys.

All that depends on *all* entries goes through counts, so that processes which hold parts of the tensors select
together: each calls :func:`smallest` with its part, a ``reduce`` that sums over processes, and a ``preceding`` that
says how many ties lie before its own.
"""

import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from lrp_prune.selection import bits, keys
from lrp_prune.selection.keys import ORDERS, KeyFormat, LazyValues

_DIGIT = 16
_BINS = 1 << _DIGIT
# A prime, so that the sample does not stay within some columns.
_STRIDE = 251
_SMALLEST_SAMPLE = 256
_SAMPLE_DEVIATIONS = 6.0
# Keys inside the interval are collected up to this number, or this share of the entries if that is more.
_COLLECTED = 1 << 20
_COLLECTED_SHARE = 1 / 32

Reduce = Callable[[Tensor], Tensor]


def _alone(counts: Tensor) -> Tensor:
    return counts


def _in_order(ties: Tensor) -> Tensor:
    return ties.cumsum(0) - ties


def smallest(
    values: Sequence[Tensor | LazyValues],
    k: int,
    *,
    order: str = "absolute",
    kept: Sequence[Tensor | None] | None = None,
    names: Sequence[str] | None = None,
    dtype: torch.dtype | None = None,
    reduce: Reduce = _alone,
    preceding: Reduce = _in_order,
) -> "Chosen":
    r"""Choose exactly the ``k`` smallest entries of all tensors together; equal ones by position.

    Entry :math:`i` is chosen iff :math:`|\{j : v_j < v_i\}| + |\{j < i : v_j = v_i\}| < k` with :math:`v = |x|` for the
    absolute order and :math:`v = x` for the signed one; the order of entries is that of the list, then that of the
    flattened tensor. Entries that are already pruned are chosen before all others.

    Args:
        values: tensors of any shape, floating-point type and device, or :class:`lrp_prune.selection.keys.LazyValues`,
            which are computed chunk by chunk in each of about three passes.
        k: the number of entries to choose, with the already pruned ones, over all processes.
        order: ``"absolute"`` or ``"signed"`` (the most negative first).
        kept: per tensor the packed mask (:func:`lrp_prune.selection.bits.pack`) of entries that are not pruned yet, or
        None.
        names: what an error calls the tensors.
        dtype: float32 or float64, to compare in; by default float64 if one of the tensors has it. No value of a type
            that is at most as wide changes.
        reduce: sums a tensor of int64 counts ``[any]`` over the processes that select together.
        preceding: from the number of ties in each own tensor, int64 ``[len(values)]``, to how many ties lie before that
            tensor's (or part's) first entry in the order of all processes.

    Returns:
        How many entries of each tensor are chosen, and masks, which are made when they are asked for.

    Raises:
        ValueError: if a value is not finite, ``k`` is out of range, or more than ``k`` entries are pruned already.

    Example:
        >>> tensors = [torch.tensor([3.0, -1.0, 2.0]), torch.tensor([[1.0, -4.0]])]
        >>> found = smallest(tensors, 2)
        >>> found.counts.tolist(), [bits.unpack(mask, tensor.shape).tolist() for mask, tensor in zip(found.masks(), tensors)]
        ([1, 1], [[True, False, True], [[False, True]]])
    """
    if order not in ORDERS:
        raise ValueError(f"order must be one of {ORDERS}, got {order!r}")
    if dtype is None:
        wide = any(tensor.dtype == torch.float64 for tensor in values)
        dtype = torch.float64 if wide else torch.float32
    form = KeyFormat(order == "absolute", dtype)
    kept = kept or [None] * len(values)
    entries = _Entries(values, form, kept, names or [f"tensor {i}" for i in range(len(values))])

    survey = reduce(entries.survey())
    total, pruned = int(survey[-2]), int(survey[-1])
    if not 0 <= k <= total:
        raise ValueError(f"k must be in [0, {total}], the number of entries, got {k}")
    if pruned > k:
        raise ValueError(
            f"{pruned} of {total} entries are pruned already, more than the {k} asked for: "
            "sparsity is total, ask for at least as much, or leave out the existing masks"
        )
    rank = k - pruned
    low, high = _bracket(survey[:-2], rank, total - pruned, form)
    below, inside = entries.take_census(low, high, reduce)
    if not below < rank <= below + inside:
        low, high = form.minimum, form.infinity
        below = 0
        entries.collected = None
    if rank == 0:  # nothing lies below the smallest key, and none of its ties is chosen
        nothing = torch.zeros_like(entries.pruned)
        return Chosen(entries, form.minimum, nothing, nothing + 1, entries.pruned)
    while high - low > 1:
        shift = max((high - low - 1).bit_length() - _DIGIT, 0)
        base = low >> shift
        counts = reduce(entries.histogram(low, high, shift, ((high - 1) >> shift) - base + 1))
        cumulative = below + counts.cumsum(0)
        digit = int(torch.searchsorted(cumulative, rank))
        below = int(cumulative[digit] - counts[digit])
        low, high = max(low, (base + digit) << shift), min(high, (base + digit + 1) << shift)
    under, ties = entries.counts_at(low)
    quotas = (rank - below - preceding(ties)).clamp(min=0).minimum(ties)
    return Chosen(entries, low, quotas, ties, entries.pruned + under + quotas)


class Chosen:
    """Which entries are the smallest.

    Args:
        entries: of which.
        key: that of the last chosen one.
        quotas: how many of each tensor with this key are chosen.
        ties: how many have it.
        counts: how many entries of each tensor are chosen in all, with those that were pruned before; of what is here.
    """

    def __init__(self, entries: "_Entries", key: int, quotas: Tensor, ties: Tensor, counts: Tensor) -> None:
        self._entries, self._key, self._quotas, self._ties = entries, key, quotas, ties
        self.counts = counts

    def masks(self) -> list[Tensor]:
        """Of each the packed mask of what is *not* chosen, uint8 ``[ceil(entries / 8)]`` on the CPU; a pass over the entries."""
        entries, ends = self._entries, zip(self._quotas.tolist(), self._ties.tolist(), strict=True)
        return [entries.kept_after(index, self._key, quota, ties) for index, (quota, ties) in enumerate(ends)]


def _bracket(sample: Tensor, rank: int, free: int, form: KeyFormat) -> tuple[int, int]:
    """The interval of keys that holds the one of ``rank`` according to a sample's histogram, with a wide margin."""
    size = int(sample.sum())
    if size < _SMALLEST_SAMPLE:
        return form.minimum, form.infinity
    share = rank / free
    margin = _SAMPLE_DEVIATIONS * math.sqrt(share * (1 - share) / size) + _SAMPLE_DEVIATIONS / size
    cumulative = sample.cumsum(0)
    first = int(torch.searchsorted(cumulative, math.floor((share - margin) * size), right=True))
    last = int(torch.searchsorted(cumulative, min(math.ceil((share + margin) * size), size)))
    shift = _survey_shift(form)
    first = 0 if share <= margin else first
    high = form.infinity if share + margin >= 1 else form.minimum + ((last + 1) << shift)
    return form.minimum + (first << shift), min(high, form.infinity)


def _survey_shift(form: KeyFormat) -> int:
    return form.width - form.absolute - _DIGIT


class _Entries:
    """This process's tensors as keys, and the passes over them."""

    def __init__(
        self,
        values: Sequence[Tensor | LazyValues],
        form: KeyFormat,
        kept: Sequence[Tensor | None],
        names: Sequence[str],
    ) -> None:
        self.values, self.form, self.kept, self.names = values, form, kept, names
        self.total = 0
        # The keys inside the census's interval, per tensor and all together; None if there were too many to keep.
        self.collected: tuple[Tensor, tuple[Tensor, ...]] | None = None
        # How many of each tensor are pruned already, and how many free ones lie below that interval.
        self.pruned, self._under = (torch.zeros(len(kept), dtype=torch.int64, device="cpu") for _ in range(2))

    def _flat(self, index: int) -> Tensor | LazyValues:
        value = self.values[index]
        if not value.dtype.is_floating_point:
            raise ValueError(f"{self.names[index]} has type {value.dtype}: only floating-point values can be ranked")
        return value if isinstance(value, LazyValues) else value.detach().reshape(-1)

    def _chunks(self, index: int, *, check: bool = False) -> Iterator[tuple[int, Tensor]]:
        flat, kept = self._flat(index), self.kept[index]
        for start, chunk in self.form.chunks(flat):
            if check and not self.form.finite(chunk):
                raise _NotFiniteError(self.names[index])
            if kept is not None:
                keys.replace_pruned(chunk, kept, start, self.form.last)
            yield start, chunk

    def survey(self) -> Tensor:
        """Histogram of a sample's keys by their first digit; then the number of entries; then that of pruned ones."""
        shift = _survey_shift(self.form)
        result = torch.zeros(_BINS + 2, dtype=torch.int64, device="cpu")
        for index, kept in enumerate(self.kept):
            flat = self._flat(index)
            sample = self.form.of(flat[::_STRIDE].contiguous())
            result[-2] += flat.numel()
            if kept is not None:
                if kept.numel() != bits.num_bytes(flat.numel()):
                    raise ValueError(f"the existing mask of {self.names[index]} has not its {flat.numel()} entries")
                self.pruned[index] = flat.numel() - bits.count(kept)
                result[-1] += self.pruned[index]
                positions = np.arange(0, flat.numel(), _STRIDE)
                free = kept.cpu().numpy()[positions >> 3] >> (positions & 7).astype(np.uint8) & 1
                sample = sample[torch.from_numpy(free.astype(np.bool_)).to(sample.device)]
            # What is not finite is found in the census; here it must only not leave the histogram.
            sample = sample.clamp(self.form.minimum, self.form.infinity)
            result[:-2] += keys.histogram(sample, self.form.minimum >> shift, shift, _BINS)
        self.total = int(result[-2])
        return result

    def take_census(self, low: int, high: int, reduce: Reduce) -> tuple[int, int]:
        """How many free entries of all processes are below ``low`` and in ``[low, high)``; collects the own ones
        inside.

        Every process takes part in the reduction before one of them raises, so that none is left waiting.
        """
        counts = torch.zeros(3, dtype=torch.int64, device="cpu")
        budget = max(_COLLECTED, int(self.total * _COLLECTED_SHARE))
        collected: list[list[Tensor]] | None = [[] for _ in self.kept]
        broken = None
        try:
            for index in range(len(self.kept)):
                for _, chunk in self._chunks(index, check=True):
                    below, inside, found = keys.between(chunk, low, high, collect=collected is not None)
                    counts[0] += below
                    counts[1] += inside
                    self._under[index] += below
                    if collected is not None and found is not None:
                        collected[index].append(found)
                        if counts[1] > budget:
                            collected = None
        except _NotFiniteError as error:
            counts[2], broken = 1, error.name
        counts = reduce(counts)
        if counts[2]:
            raise ValueError(
                f"{broken or 'a tensor of another process'} has values that are infinite or NaN: nothing was selected"
            )
        self.collected = None
        if collected is not None:
            numbers = [sum(part.numel() for part in parts) for parts in collected]
            empty = torch.empty(0, dtype=torch.int32 if self.form.width == 32 else torch.int64, device="cpu")
            together = torch.cat([empty, *(part.cpu() for parts in collected for part in parts)])
            self.collected = together, torch.split(together, numbers)
        return int(counts[0]), int(counts[1])

    def _keys_of(self, index: int) -> Iterator[Tensor]:
        if self.collected is not None:
            yield self.collected[1][index]
        else:
            yield from (chunk for _, chunk in self._chunks(index))

    def histogram(self, low: int, high: int, shift: int, bins: int) -> Tensor:
        """How many keys of ``[low, high)`` lie in each of the ``bins`` intervals of ``2 ** shift`` keys."""
        result = torch.zeros(bins, dtype=torch.int64, device="cpu")
        scanned = (chunk for index in range(len(self.kept)) for _, chunk in self._chunks(index))
        for chunk in scanned if self.collected is None else [self.collected[0]]:
            _, inside, found = keys.between(chunk, low, high)
            if inside and found is not None:
                result += keys.histogram(found, low >> shift, shift, bins)
        return result

    def counts_at(self, key: int) -> tuple[Tensor, Tensor]:
        """How many free entries of each tensor are below a key, and how many have it, int64 ``[tensors]`` each."""
        counts = torch.zeros(2, len(self.kept), dtype=torch.int64, device="cpu")
        for index in range(len(self.kept)):
            for chunk in self._keys_of(index):
                below, inside, _ = keys.between(chunk, key, key + 1, collect=False)
                counts[0, index] += below
                counts[1, index] += inside
        if self.collected is not None:
            counts[0] += self._under
        return counts[0], counts[1]

    def kept_after(self, index: int, key: int, quota: int, ties: int) -> Tensor:
        """A tensor's packed mask without what is below ``key`` and the first ``quota`` of its ``ties`` with it."""
        all_ties = quota == ties
        partial = 0 if all_ties else quota
        flat, kept = self._flat(index), self.kept[index]
        result = torch.empty(bits.num_bytes(flat.numel()), dtype=torch.uint8, device="cpu")
        for start, chunk in self.form.chunks(flat):
            first, last = start // 8, bits.num_bytes(start + chunk.numel())
            if partial and kept is not None:
                keys.replace_pruned(chunk, kept, start, self.form.last)
            if chunk.device.type == "cpu":
                array = chunk.numpy()
                above = torch.from_numpy(array > key if all_ties else array >= key)
            else:
                above = chunk > key if all_ties else chunk >= key
            if partial:
                tied = (chunk == key).nonzero().view(-1)[:partial]
                above[tied] = False
                partial -= tied.numel()
            result[first:last] = bits.pack(above)
        if kept is not None:
            result &= kept.cpu()
        return result


class _NotFiniteError(Exception):
    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name
