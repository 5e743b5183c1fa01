"""What a pruning method is: what it collects, how it scores, and how its scores are best compared."""

from abc import ABC
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

from torch import Tensor

_Own = TypeVar("_Own", bound="Method")


@dataclass(frozen=True)
class Collects:
    """What a method collects from reference samples.

    Args:
        statistic: what is summed up, see :func:`lrp_prune.attribute`; ``"input_norm"`` for the norm of what each weight is
            multiplied with, times the weight.
        composite: the rules by which it is propagated.
        skip_first: how many tokens at the beginning of each sample of a causal language model are left out.
        explains: whether a value that the model computes is explained by a backward pass; False if the forward alone tells.
        steps: in how many steps inputs go from zeros to what they are, with what flows through units summed up on the way; None:
            inputs are what they are.
    """

    statistic: Any
    composite: Any = "gradient"
    skip_first: int = 0
    explains: bool = True
    steps: int | None = None


class Scorable:
    """A tensor of weights, or a group of units, that a method is to score.

    Args:
        name: canonical name of the parameter, or of the group.
        shape: of the scores: that of the whole parameter, or ``[units]``.
        collected: what the method collected; None if it collects nothing. Of a tensor that is divided among processes, the part
            that is here.
        weight: computes :attr:`weight`.
        part: from a tensor of ``shape`` to what of it is here.
    """

    def __init__(
        self,
        name: str,
        shape: tuple[int, ...],
        collected: Tensor | None,
        weight: Callable[[], Tensor],
        part: Callable[[Tensor], Tensor] = lambda whole: whole,
    ) -> None:
        self.name, self.shape, self.collected, self.part = name, shape, collected, part
        self._weight = weight

    @property
    def weight(self) -> Tensor:
        """The weights here as the model uses them; of each unit the root mean square of all that it owns."""
        return self._weight()


class Method(ABC):
    """A way to score weights or units: the base of :class:`LRP`, :class:`Wanda` and all others, and of your own.

    Say what is collected (:meth:`collects`), what a score is (:meth:`score`), or both, and pass an instance as ``method``. What
    can be chosen is an argument of the constructor: plain values, so that a configuration file can give them.

    Attributes:
        name: in tables and logs, and as the ``statistic`` of its scores; by default the class's, in lower case.
        scope: what its scores of weights are best compared with, see :func:`lrp_prune.select`. Units have no rows: where a scope
            compares single weights, they are compared by layer.
        floor: of the scope ``"global"``: the share that each tensor keeps of the average density; None for the usual one.
        target: what is explained, see :func:`lrp_prune.attribute`; None to infer it. Of a method that explains nothing, a
            function of model and batch runs the model, and all else is left alone.

    Example:
        >>> import torch, lrp_prune
        >>> class Balanced(lrp_prune.Method):
        ...     '''The relevance of a weight, and its size.'''
        ...     name, scope = "balanced", "layer"
        ...     def collects(self, kinds):
        ...         return lrp_prune.pruning.Collects("abs_token", "epsilon")
        ...     def score(self, scorable):
        ...         return scorable.collected.sqrt() * scorable.weight.abs()
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> batches = [(torch.randn(16, 4), torch.randint(2, (16,)))]
        >>> lrp_prune.prune(model, batches, 0.5, Balanced()).sparsity_of("0.weight")
        0.5
    """

    name: ClassVar[str]
    scope: ClassVar[str] = "global"
    floor: ClassVar[float | None] = None
    target: Any = None

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "name" not in cls.__dict__:
            cls.name = cls.__name__.lower()

    def collects(self, kinds: tuple[str, ...]) -> Collects | None:
        """What is collected for weights (``("weight",)``) or these kinds of units; None if no data are needed.

        Which units there are shows in a forward only: there one batch is needed also without anything to collect.
        """
        return None

    def score(self, scorable: Scorable) -> Tensor:
        """The scores of one tensor: what is smallest is pruned. As it is here, it is what was collected.

        Returns:
            A tensor of the shape of ``scorable.weight``.
        """
        assert scorable.collected is not None  # see collected_by
        return scorable.collected

    def scope_for(self, kinds: tuple[str, ...]) -> str:
        """The scope that weights, or these kinds of units, are best compared in."""
        return self.scope if kinds == ("weight",) or self.scope in ("global", "layer") else "layer"

    def needs_data(self, kinds: tuple[str, ...]) -> bool:
        """Whether it has to see batches."""
        return collected_by(self, kinds) is not None or not kinds_without_data(kinds)

    def explains(self, kinds: tuple[str, ...]) -> bool:
        """Whether it explains a value that the model computes."""
        collected = collected_by(self, kinds)
        return collected is not None and collected.explains

    def with_target(self: _Own, target: Any) -> _Own:
        """The same method for another target."""
        # Made by hand: a subclass may have any constructor, or be frozen.
        made = object.__new__(type(self))
        made.__dict__.update(self.__dict__, target=target)
        return made

    def __str__(self) -> str:
        """The name, and what was chosen."""
        chosen = [
            f"{key}={_in_words(value)}" for key, value in sorted(vars(self).items()) if value != _default(self, key)
        ]
        return f"{self.name} ({', '.join(chosen)})" if chosen else self.name


def collected_by(method: Method, kinds: tuple[str, ...]) -> Collects | None:
    """What a method collects for these kinds.

    Raises:
        ValueError: if it says neither what it collects nor what a score is, or says it in another way.
    """
    found = method.collects(kinds)
    if found is not None and not isinstance(found, Collects):
        raise ValueError(f"method {method.name!r}: collects(kinds) must return a Collects or None, got {found!r}")
    if found is None and type(method).score is Method.score:
        what = " and ".join(f"{kind}s" for kind in kinds)
        raise ValueError(
            f"method {method.name!r} collects nothing for {what}, and has no score(scorable): define one of the two"
        )
    return found


def check_scores(method: Method, name: str, scores: Any, expected: tuple[int, ...]) -> None:
    """Refuse what a method gave as the scores of one tensor and nothing can be selected by.

    Raises:
        ValueError: if it is no tensor of floating-point numbers of that shape, or some are no numbers.
    """
    given = f"method {method.name!r} gives {name}"
    if not isinstance(scores, Tensor):
        raise ValueError(f"{given} a {type(scores).__name__} as scores: score(scorable) must return a tensor")
    if tuple(scores.shape) != expected:
        raise ValueError(f"{given} scores of shape {tuple(scores.shape)}, where {expected} is needed")
    if not scores.is_floating_point():
        raise ValueError(f"{given} scores of {scores.dtype}: return floating-point numbers")
    wrong = int(scores.isnan().sum())
    if wrong:
        raise ValueError(f"{given} {wrong} scores of {scores.numel()} that are no numbers (nan)")


def kinds_without_data(kinds: tuple[str, ...]) -> bool:
    """Whether it is known without a forward what there is to score: weights, and rows of embeddings."""
    return kinds in (("weight",), ("embedding",))


def _default(method: Method, key: str) -> Any:
    return getattr(type(method), key, None)


def _in_words(value: Any) -> str:
    """A value that is the same in each run: a function by its name, as its address is not."""
    if isinstance(value, str | int | float | list | tuple | dict) or value is None:
        return repr(value)
    named = getattr(value, "__qualname__", None) or getattr(value, "name", None)
    return named if isinstance(named, str) else type(value).__name__
