"""What a rule is: how one operation hands relevance to its inputs, in gradient x input form.

A rule is an object that is called with a :class:`Call` and returns the operation's result, built so that the ordinary gradient
of the graph, times the input, is the relevance. What else there is to know of it, it declares. Papers: AttnLRP (Achtibat et
al. 2024, arXiv 2402.05602), CP-LRP (Ali et al. 2022, arXiv 2202.07304); the gradient form follows Arras et al. 2025 (arXiv
2502.15886).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from lrp_prune.engine.call import Call, detached


@dataclass(frozen=True)
class Rule:
    """The plain gradient, and the base of all rules: epsilon -> 0 for linear operations, a Taylor expansion for the others.

    Rules are equal where they do the same. What a rule declares:

    * ``kinds``: the kinds of operation that it can be for; None for all;
    * ``needs``: what has to be known of activations, ``"gates"`` (what came out of an activation function) and
      ``"statistics"`` (what is a root, norm or deviation), and of calls, ``"places"`` (the module that runs, and its depth);
    * ``stops``: whether no relevance goes to some of the operands that are activations;
    * ``scores_weights``: whether the relevance of a weight under it is known.
    """

    kinds: ClassVar[tuple[str, ...] | None] = None
    scores_weights: ClassVar[bool] = True

    def __call__(self, call: Call) -> Any:
        """The operation's result."""
        return call.run()

    @property
    def needs(self) -> frozenset[str]:
        """What has to be known of its calls."""
        return frozenset()

    @property
    def stops(self) -> bool:
        """Whether no relevance goes to some of the operands."""
        return False

    @property
    def is_plain_for_one(self) -> bool:
        """Whether a product of one activation has its plain gradient."""
        return type(self) is Rule

    def of_factors(self, call: Call) -> Any:
        """The result of a product of many: of all entries of a tensor, or a power of two activations."""
        return call.run()


@dataclass(frozen=True)
class Stop(Rule):
    """The result is a constant: no relevance goes through."""

    scores_weights: ClassVar[bool] = False

    def __call__(self, call: Call) -> Any:
        result = call.with_operands([detached(value) for value in call.operands()]).run()
        return type(result)(map(detached, result)) if isinstance(result, tuple | list) else detached(result)

    @property
    def stops(self) -> bool:
        return True


@dataclass(frozen=True)
class Skip(Rule):
    """Dropout is off: the result is the input, and no random number is drawn."""

    scores_weights: ClassVar[bool] = False

    def __call__(self, call: Call) -> Any:
        return call.operand(0)


@dataclass(frozen=True)
class Own(Rule):
    """A function of the user's, of which nothing else is known."""

    function: Callable[..., Any]

    scores_weights: ClassVar[bool] = False

    def __call__(self, call: Call) -> Any:
        return self.function(call)

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"gates", "places"})


gradient, stop, skip = Rule(), Stop(), Skip()
