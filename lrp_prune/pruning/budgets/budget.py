"""What a budget is, and how shares are found that keep the sparsity of all."""

import io
import math
from collections.abc import Mapping, Sequence

from torch import nn

from lrp_prune.attribution.sharded import shardings_of
from lrp_prune.models.subject import subject_of
from lrp_prune.names import named_parameters
from lrp_prune.pruning.compensation.stages import stages_of
from lrp_prune.selection.scopes import check_sparsity, number_to_prune

MOST = 0.99
"""No tensor is to lose more than this by a budget."""


class Budget(dict[str, float]):
    """The share of each tensor that is to be pruned: a ``sparsity`` by name, wherever one is taken.

    :func:`lrp_prune.prune`, :func:`lrp_prune.select` and :class:`~lrp_prune.callbacks.RelevancePruning` select from each tensor
    by itself then, by whatever method, and N:M scopes written ``"N:8"`` keep of each 8 inputs what the share says.

    Args:
        shares: parameter -> share in [0, 1).
        sizes: parameter -> number of its entries.

    Raises:
        ValueError: if a share is none, or of a tensor whose size is not known.

    Example:
        >>> budget = Budget({"a.weight": 0.25, "b.weight": 0.75}, {"a.weight": 100, "b.weight": 100})
        >>> budget.sparsity, budget.in_steps(8)
        (0.5, {'a.weight': 0.25, 'b.weight': 0.75})
    """

    def __init__(self, shares: Mapping[str, float], sizes: Mapping[str, int]) -> None:
        super().__init__({name: check_sparsity(share, f"the share of {name}") for name, share in shares.items()})
        missing = [name for name in shares if name not in sizes]
        if missing:
            raise ValueError(
                f"the size of {missing[0]!r} is not given: a budget knows how large each of its tensors is"
            )
        self.sizes = {name: int(sizes[name]) for name in shares}

    @property
    def sparsity(self) -> float:
        """The share of all its tensors together."""
        entries = sum(self.sizes[name] for name in self)
        return sum(share * self.sizes[name] for name, share in self.items()) / max(entries, 1)

    def in_steps(self, size: int) -> "Budget":
        """The same in multiples of ``1 / size``, for ``scope="N:size"``; the share of all stays as near as steps allow.

        Each share is rounded down, and those that lost most are given a step more while that brings all together closer to
        what it was (the method of largest remainders).

        Raises:
            ValueError: if the size is no number of inputs.

        Example:
            >>> Budget({"a": 0.3, "b": 0.7}, {"a": 80, "b": 80}).in_steps(4)
            {'a': 0.25, 'b': 0.75}
        """
        if isinstance(size, bool) or not isinstance(size, int) or size < 2:
            raise ValueError(f"size must be the M of N:M, an integer of at least 2, got {size!r}")
        steps = {name: min(math.floor(share * size + 1e-9), size - 1) for name, share in self.items()}
        lost = sum((share - steps[name] / size) * self.sizes[name] for name, share in self.items())
        short = [name for name, share in self.items() if share * size - steps[name] > 1e-9]
        for name in sorted(short, key=lambda name: steps[name] / size - self[name]):
            weight = self.sizes[name] / size
            if steps[name] < size - 1 and abs(lost - weight) < abs(lost):
                steps[name] += 1
                lost -= weight
        return Budget({name: number / size for name, number in steps.items()}, self.sizes)

    def __reduce__(self) -> tuple[type["Budget"], tuple[dict[str, float], dict[str, int]]]:
        return Budget, (dict(self), self.sizes)

    def __str__(self) -> str:
        from rich.box import SIMPLE_HEAD
        from rich.console import Console
        from rich.table import Table

        table = Table(box=SIMPLE_HEAD)
        table.add_column("tensor", overflow="fold")
        table.add_column("entries", justify="right")
        table.add_column("goes", justify="right")
        for name, share in self.items():
            table.add_row(name, f"{self.sizes[name]:,}", f"{share:.1%}")
        table.add_row("all together", f"{sum(self.sizes.values()):,}", f"{self.sparsity:.1%}")
        buffer = io.StringIO()
        Console(file=buffer, width=100).print(table)
        return "\n".join(line.rstrip() for line in buffer.getvalue().splitlines() if line.strip())


def of_groups(
    groups: Sequence[Sequence[str]], shares: Sequence[float], sizes: Mapping[str, int], sparsity: float
) -> Budget:
    """The budget of groups with one share each, in whole entries, and of all together exactly what is asked for.

    Example:
        >>> of_groups([["a", "b"], ["c"]], [0.25, 0.75], {"a": 3, "b": 3, "c": 6}, 0.5)
        {'a': 0.3333333333333333, 'b': 0.3333333333333333, 'c': 0.6666666666666666}
    """
    exact = {name: share * sizes[name] for group, share in zip(groups, shares, strict=True) for name in group}
    counts = {name: math.floor(entries) for name, entries in exact.items()}
    short = number_to_prune(sparsity, sum(sizes[name] for name in exact)) - sum(counts.values())
    for name in sorted(exact, key=lambda name: counts[name] - exact[name])[: max(short, 0)]:
        counts[name] += 1
    return Budget({name: count / sizes[name] for name, count in counts.items()}, {name: sizes[name] for name in exact})


def spread_around(wanted: Sequence[float], sizes: Sequence[int], sparsity: float, spread: float) -> list[float]:
    r"""Shares that grow linearly with what is wanted, within ``spread`` of a common middle, and are ``sparsity`` of all.

    :math:`s_i = \min(\max(c + 2 d \frac{w_i - \min w}{\max w - \min w}, 0), 0.99)` with the :math:`c` for which
    :math:`\sum n_i s_i = s \sum n_i`.

    Args:
        wanted: :math:`w`, of each group; more of those with more is pruned.
        sizes: :math:`n`, entries of each group.
        sparsity: :math:`s`, of all.
        spread: :math:`d`, half of the distance between the least and the most pruned group.

    Raises:
        ValueError: if the sparsity or the spread is none, or what is wanted is not finite.

    Example:
        >>> spread_around([0.0, 1.0, 0.5], [10, 10, 10], 0.5, 0.25)
        [0.25, 0.75, 0.5]
    """
    check_budgeted(sparsity)
    if isinstance(spread, bool) or not isinstance(spread, int | float) or not 0 <= spread < 1:
        raise ValueError(f"spread must be a number in [0, 1), got {spread!r}")
    if not all(map(math.isfinite, wanted)):
        raise ValueError("what a budget is made from is not finite: is a weight or an activation infinite or NaN?")
    low, high = min(wanted), max(wanted)
    above = [2 * spread * (value - low) / (high - low) if high > low else spread for value in wanted]
    total = sparsity * sum(sizes)

    def shares(offset: float) -> list[float]:
        return [min(max(offset + value, 0.0), MOST) for value in above]

    below, beyond = -2 * spread - 1.0, MOST + 1.0
    for _ in range(100):  # bisection: the sum grows with the offset
        middle = (below + beyond) / 2
        if sum(share * size for share, size in zip(shares(middle), sizes, strict=True)) < total:
            below = middle
        else:
            beyond = middle
    return [round(share, 12) for share in shares((below + beyond) / 2)]


def check_budgeted(sparsity: float) -> None:
    """Refuse what no budget can have as the sparsity of all.

    Raises:
        ValueError: and says why.
    """
    if check_sparsity(sparsity) > MOST:
        raise ValueError(
            f"a budget leaves each tensor at least {1 - MOST:.0%}: sparsity {sparsity:g} is more than it can be"
        )


def check_whole(model: nn.Module) -> None:
    """Refuse a model whose tensors no process has as a whole.

    Raises:
        ValueError: and says when to make a budget.
    """
    if any(sharding.is_divided for sharding in shardings_of(subject_of(model).module).values()):
        raise ValueError(
            "a budget is made of whole tensors: make it before the model is divided among processes, and pass it on"
        )


def groups_by(model: nn.Module, names: Sequence[str], by: str) -> list[list[str]]:
    """The tensors that share one number: those of a block (a module that repeats, else a layer), or each alone.

    Raises:
        ValueError: if ``by`` is neither, there is no tensor, or the model is divided among processes.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
        >>> groups_by(model, ["0.weight", "2.weight"], "block")
        [['0.weight'], ['2.weight']]
    """
    if by not in ("block", "tensor"):
        raise ValueError(f"by must be 'block' or 'tensor', got {by!r}")
    if not names:
        raise ValueError("there is no tensor to make a budget for: was everything excluded, or nothing scored?")
    check_whole(model)
    if by == "tensor":
        return [[name] for name in names]
    module = subject_of(model).module
    parameters = {name: parameter for name, parameter in named_parameters(module).items() if name in set(names)}
    groups, left = [], dict.fromkeys(names)
    for stage in stages_of(module, parameters).values():
        inside = {id(parameter) for parameter in stage.parameters()}
        group = [name for name in left if id(parameters[name]) in inside]
        for name in group:
            del left[name]
        groups += [group] if group else []
    return [*groups, *([name] for name in left)]
