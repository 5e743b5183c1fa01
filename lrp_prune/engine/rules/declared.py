r"""The rules of LRP for linear layers and convolutions, each declared by its terms.

All take a ``stabilizer``: what is added to the denominator, with its sign, so that outputs near zero do not amplify what they
hand on. What it takes is lost, and with 0 nothing is; zennit and others add 1e-6. Overview of the rules: Montavon et al. 2019,
*Layer-Wise Relevance Propagation: An Overview*.
"""

import math
from dataclasses import dataclass, replace

from lrp_prune.arguments import check_number
from lrp_prune.engine.rules.linear import Terms
from lrp_prune.engine.rules.terms import SIGNS, Constant, Group, Term

_POSITIVE = (Term("positive", "positive"), Term("negative", "negative"))
_NEGATIVE = (Term("positive", "negative"), Term("negative", "positive"))


_SIZE = "[0, inf)"


@dataclass(frozen=True)
class Epsilon(Terms):
    r"""LRP-epsilon: :math:`R_{ji} = x_i w_{ji} / (z_j + \epsilon \, \mathrm{sign}(z_j)) \, R_j`, with the sign of 0 taken as one.

    Bach et al. 2015. It takes the share :math:`\epsilon / (|z_j| + \epsilon)` of what an output has: the larger it is, the less
    is handed on by outputs near zero. With 0 it is the plain gradient, which is what ``"gradient"`` costs less for.

    Example:
        >>> import torch, lrp_prune
        >>> layer = torch.nn.Linear(4, 3, bias=False)
        >>> with lrp_prune.attributing(layer, lrp_prune.Composite("strong", {"linear": Epsilon(0.5)})) as propagation:
        ...     z = layer(torch.ones(1, 4))
        ...     relevance = propagation.relevance(z.sum())["input"]
        >>> torch.testing.assert_close(relevance.sum(), (z * z.abs() / (z.abs() + 0.5)).sum().detach())
    """

    epsilon: float = 1e-6

    def __post_init__(self) -> None:
        check_number("epsilon", self.epsilon, _SIZE)

    @property
    def groups(self) -> tuple[Group, ...]:
        return (Group((Term(),), stabilizer=self.epsilon),)


@dataclass(frozen=True)
class Gamma(Terms):
    r"""The generalised gamma rule favours contributions of the sign of the output by :math:`\gamma`.

    Montavon et al. 2019, for inputs and outputs of either sign Andeol et al. 2021. With 0 it is the plain gradient, and the
    larger it is, the more of what counters the output is left out. Relevance is conserved, but for what biases keep.

    Example:
        >>> import torch, lrp_prune
        >>> model = torch.nn.Sequential(torch.nn.Conv1d(1, 4, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(8, 2))
        >>> composite = lrp_prune.Composite("gamma", {"convolution": Gamma(0.25)}, base="epsilon")
        >>> batches = [(torch.randn(16, 1, 4), torch.randint(2, (16,)))]
        >>> list(lrp_prune.attribute(model, batches, composite=composite))
        ['0.weight', '3.weight']
    """

    gamma: float = 0.25
    stabilizer: float = 0.0

    def __post_init__(self) -> None:
        check_number("gamma", self.gamma, _SIZE)
        check_number("stabilizer", self.stabilizer, _SIZE)

    @property
    def groups(self) -> tuple[Group, ...]:
        of_sign = {"positive": _POSITIVE, "negative": _NEGATIVE}
        more = {sign: [replace(term, factor=self.gamma) for term in terms] for sign, terms in of_sign.items()}
        return tuple(Group((Term(), *more[sign]), outputs=sign, stabilizer=self.stabilizer) for sign in SIGNS)


@dataclass(frozen=True)
class AlphaBeta(Terms):
    r"""Positive contributions get :math:`\alpha` of the relevance, negative ones :math:`-\beta`, with :math:`\alpha - \beta = 1`.

    Bach et al. 2015. With 1 and 0 it is z+. Relevance is conserved where an output has contributions of both signs.
    """

    alpha: float = 2.0
    beta: float = 1.0
    stabilizer: float = 0.0

    def __post_init__(self) -> None:
        for name, value in (("alpha", self.alpha), ("beta", self.beta)):
            check_number(name, value, "(-inf, inf)")
        if self.beta < 0 or abs(self.alpha - self.beta - 1) > 1e-9:
            raise ValueError(f"alpha - beta must be 1 and beta at least 0, got {self.alpha} and {self.beta}")
        check_number("stabilizer", self.stabilizer, _SIZE)

    @property
    def groups(self) -> tuple[Group, ...]:
        positive = Group(_POSITIVE, self.alpha, stabilizer=self.stabilizer)
        negative = Group(_NEGATIVE, -self.beta, stabilizer=self.stabilizer)
        return (positive, negative) if self.beta else (positive,)


@dataclass(frozen=True)
class ZPlus(Terms):
    r"""LRP-z+: :math:`R_{ji} = (x_i w_{ji})^+ / (\sum_i (x_i w_{ji})^+ + b_j^+) \, R_j`, among positive contributions alone.

    Montavon et al. 2017 (deep Taylor decomposition), for inputs of either sign. Relevance is conserved where an output has a
    positive contribution, but for what biases keep.

    Example:
        >>> import torch, lrp_prune
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8, bias=False), torch.nn.ReLU(), torch.nn.Linear(8, 2, bias=False))
        >>> composite = lrp_prune.Composite("z_plus", {"linear": ZPlus()}, base="epsilon")
        >>> with lrp_prune.attributing(model, composite) as propagation:
        ...     value = model(torch.ones(1, 4)).max()
        ...     relevance = propagation.relevance(value)["input"]
        >>> bool((relevance * value.sign() >= 0).all())
        True
    """

    stabilizer: float = 0.0

    def __post_init__(self) -> None:
        check_number("stabilizer", self.stabilizer, _SIZE)

    @property
    def groups(self) -> tuple[Group, ...]:
        return (Group(_POSITIVE, stabilizer=self.stabilizer),)


@dataclass(frozen=True)
class Flat(Terms):
    r"""The flat rule: :math:`R_{ji} = R_j / \sum_i 1`, an equal share to each input, whatever it and its weight are.

    Lapuschkin et al. 2019. For the first layer, whose inputs it tells where relevance lies, and not to which of their entries
    it is due. Padding is no input, and biases get none: relevance is conserved. Entries of the input that are zero get theirs
    where the input is data; inside a model, after a ReLU, what goes to zeros ends there. Weights get theirs in either case.
    """

    stabilizer: float = 0.0

    def __post_init__(self) -> None:
        check_number("stabilizer", self.stabilizer, _SIZE)

    @property
    def groups(self) -> tuple[Group, ...]:
        return (Group((Term(1.0, power=0),), stabilizer=self.stabilizer, bias=False),)


@dataclass(frozen=True)
class WSquare(Terms):
    r"""The w² rule: :math:`R_{ji} = w_{ji}^2 / \sum_i w_{ji}^2 \, R_j`, by the size of weights, whatever the input is.

    Montavon et al. 2017, for a first layer whose inputs are unbounded. Biases get none: relevance is conserved. Of entries of
    the input that are zero holds what holds of :class:`Flat`.
    """

    stabilizer: float = 0.0

    def __post_init__(self) -> None:
        check_number("stabilizer", self.stabilizer, _SIZE)

    @property
    def groups(self) -> tuple[Group, ...]:
        return (Group((Term(1.0, power=2),), stabilizer=self.stabilizer, bias=False),)


@dataclass(frozen=True)
class ZBox(Terms):
    r"""The z^B rule for a first layer whose inputs lie between bounds :math:`l \le 0 \le h`.

    .. math:: R_{ji} = \frac{x_i w_{ji} - l_i w_{ji}^+ - h_i w_{ji}^-}{\sum_i (x_i w_{ji} - l_i w_{ji}^+ - h_i w_{ji}^-)} R_j

    Montavon et al. 2017. All contributions are positive while inputs keep within the bounds, and a bias has none, since its
    input does not vary: relevance is conserved. Of entries of the input that are zero holds what holds of :class:`Flat`.

    Args:
        low: the smallest value that inputs can have, or one for each channel (a black pixel, after normalisation).
        high: the largest.
        stabilizer: what is added to the denominator.

    Raises:
        ValueError: if a bound is no number, or on the wrong side of zero, or both are zero.

    Example:
        >>> import torch, lrp_prune
        >>> layer = torch.nn.Conv2d(3, 4, 3)
        >>> composite = lrp_prune.Composite("box", {"convolution": ZBox((-2.1, -2.0, -1.8), (2.2, 2.4, 2.6))})
        >>> with lrp_prune.attributing(layer, composite) as propagation:
        ...     value = layer(torch.zeros(1, 3, 8, 8)).sum()
        ...     relevance = propagation.relevance(value)["input"]
        >>> torch.testing.assert_close(relevance.sum(), value.detach())
    """

    low: Constant
    high: Constant
    stabilizer: float = 0.0

    def __post_init__(self) -> None:
        try:
            low, high = (
                tuple(map(float, bound)) if isinstance(bound, tuple | list) else float(bound)
                for bound in (self.low, self.high)
            )
        except (TypeError, ValueError):
            raise ValueError(
                f"low and high must be numbers, or one for each channel, got {self.low!r} and {self.high!r}"
            ) from None
        object.__setattr__(self, "low", low)
        object.__setattr__(self, "high", high)
        lows, highs = (bound if isinstance(bound, tuple) else (bound,) for bound in (low, high))
        if not all(-math.inf < value <= 0 for value in lows) or not all(0 <= value < math.inf for value in highs):
            raise ValueError(f"low must be at most 0 and high at least 0, both finite, got {self.low} and {self.high}")
        if max(map(abs, (*lows, *highs)), default=0) == 0:
            raise ValueError(f"low and high must leave room between them, got {self.low} and {self.high}")
        check_number("stabilizer", self.stabilizer, _SIZE)

    @property
    def groups(self) -> tuple[Group, ...]:
        terms = (Term(), Term(self.low, "positive", -1.0), Term(self.high, "negative", -1.0))
        return (Group(terms, stabilizer=self.stabilizer),)


epsilon, gamma, alpha_beta, z_plus, flat, w_square = Epsilon(), Gamma(), AlphaBeta(), ZPlus(), Flat(), WSquare()
