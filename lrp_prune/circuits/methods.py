"""Methods that rank nodes of circuits: those of pruning, and those that only circuits know."""

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, NamedTuple, NoReturn, get_args

from lrp_prune.engine.composites import composite_of
from lrp_prune.pruning.methods import LRP, Gradient, Method, Random, Wanda
from lrp_prune.pruning.methods.propagating import check_collected

_OF_UNITS = ("signed", "abs_sample", "abs_token", "pxp", "squared_token")


def _check_steps(steps: Any, least: int) -> None:
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < least:
        raise ValueError(f"steps must be at least {least}, got {steps}")


@dataclass(frozen=True)
class NodeMethod(Method):
    """A method that scores units of circuits and nothing else, by the formulas of :mod:`lrp_prune.circuits.scores`.

    Args:
        statistic: how tokens and samples are reduced, see :func:`lrp_prune.circuits.discover`.
        skip_first: how many tokens at the beginning of a prompt do not count.
    """

    statistic: Any = None
    skip_first: int = 0

    def __post_init__(self) -> None:
        check_collected(self.statistic, None, self.skip_first)

    def collects(self, kinds: tuple[str, ...]) -> NoReturn:
        """Nothing that pruning could use."""
        raise ValueError(
            f"method {self.name!r} ranks units of circuits: use lrp_prune.circuits.discover, or another method"
        )


@dataclass(frozen=True)
class AttributionPatching(NodeMethod):
    """The change of a unit from the counterfactual prompt, times the gradient (Nanda 2023; Syed et al., arXiv 2310.10348).

    Args:
        statistic, skip_first: see :class:`NodeMethod`.
        steps: of integrated gradients over the embeddings (Hanna et al., arXiv 2403.17806); 0 for the gradient at the clean
            prompt.
    """

    steps: int = 0
    name: ClassVar[str] = "attribution_patching"

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_steps(self.steps, 0)


@dataclass(frozen=True)
class GateIG(NodeMethod):
    """Integrated gradients (arXiv 1703.01365) over gates, from the ablation to the full model.

    Args:
        statistic, skip_first: see :class:`NodeMethod`.
        steps: points on the way; 1 is its middle, which costs one pass.
    """

    steps: int = 1
    name: ClassVar[str] = "gate_ig"

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_steps(self.steps, 1)


@dataclass(frozen=True)
class RelP(NodeMethod):
    """The change of a unit from the counterfactual prompt, times AttnLRP's gradient (after RelP, arXiv 2508.21258)."""

    name: ClassVar[str] = "relp"


@dataclass(frozen=True)
class Activation(NodeMethod):
    """The length of a unit's activation."""

    name: ClassVar[str] = "activation"


NodeMethodName = Literal[
    "attnlrp",
    "cp_lrp",
    "gradient",
    "attribution_patching",
    "attribution_patching_ig",
    "gate_ig",
    "relp",
    "activation",
    "wanda",
    "random",
]
NODE_METHODS: dict[str, Method] = {
    "attnlrp": LRP(composite="attnlrp"),
    "cp_lrp": LRP(composite="cp_lrp"),
    "gradient": Gradient(),
    "attribution_patching": AttributionPatching(),
    "attribution_patching_ig": AttributionPatching(steps=5),
    "gate_ig": GateIG(),
    "relp": RelP(),
    "activation": Activation(),
    "wanda": Wanda(),
    "random": Random(),
}
"""What names stand for."""
assert tuple(NODE_METHODS) == get_args(NodeMethodName)


class Way(NamedTuple):
    """A method as circuits go about it.

    Args:
        name: by which it is told from others.
        composite: by which something is propagated; None if nothing is.
        statistic: how tokens and samples are reduced.
        skip_first: tokens at the beginning that do not count.
        steps: of integrated gradients.
        contrasted: whether it looks at the difference from the counterfactual prompt.
        over_gates: whether it is about one ablation, and goes from it to the model.
        seed: of random scores.
    """

    name: str
    composite: Any
    statistic: str
    skip_first: int
    steps: int = 0
    contrasted: bool = False
    over_gates: bool = False
    seed: int = 0


def method_for(weights: bool, method: "str | Method | None") -> Method:
    """The method that is meant: by name, as an object, or the default.

    Raises:
        ValueError: for an unknown name, or a method that has no scores of such nodes, or a target of its own.

    Example:
        >>> method_for(False, None), method_for(True, None).composite
        (GateIG(statistic=None, skip_first=0, steps=1), 'attnlrp')
    """
    if method is None:
        method = "attnlrp" if weights else "gate_ig"
    if isinstance(method, str):
        if method not in NODE_METHODS:
            raise ValueError(
                f"method must be one of {tuple(NODE_METHODS)} or an object such as GateIG(), got {method!r}"
            )
        method = NODE_METHODS[method]
    if not isinstance(method, Method):
        raise ValueError(f"method must be a name or an object such as GateIG(), got {method!r}")
    if method.target is not None:
        raise ValueError(f"method {method}: what is explained is the task's, leave out its target and pass metric=")
    if weights and isinstance(method, NodeMethod):
        known = tuple(name for name, entry in NODE_METHODS.items() if not isinstance(entry, NodeMethod))
        raise ValueError(f"method {method.name!r} scores units, not weights: use one of {known}")
    if not weights and not isinstance(method, LRP | Gradient | Wanda | Random | NodeMethod):
        raise ValueError(f"method {method.name!r} has no scores of a circuit's units: use one of {tuple(NODE_METHODS)}")
    statistic = getattr(method, "statistic", None)
    if not weights and isinstance(statistic, str) and statistic not in _OF_UNITS:
        raise ValueError(f"statistic must be one of {_OF_UNITS} for units, got {statistic!r}")
    return method


def with_statistic(method: Method, statistic: str) -> Method:
    """The method with this statistic where it leaves it open, and circuits' usual composite."""
    if isinstance(method, LRP) and method.composite is None:
        method = replace(method, composite="attnlrp")
    if isinstance(method, LRP | Gradient | NodeMethod) and method.statistic is None:
        return replace(method, statistic=statistic)
    return method


def way_of(method: Method, statistic: str) -> Way:
    """How circuits go about a method whose :func:`statistic <with_statistic>` is settled."""
    skip_first = getattr(method, "skip_first", 0)
    if isinstance(method, LRP):
        rules = composite_of(method.collects(("neuron",)).composite)
        return Way(rules.name, rules, statistic, skip_first)
    if isinstance(method, AttributionPatching):
        name = "attribution_patching_ig" if method.steps else method.name
        return Way(name, "gradient", statistic, skip_first, method.steps, contrasted=True)
    if isinstance(method, GateIG):
        return Way(method.name, "gradient", statistic, skip_first, method.steps, over_gates=True)
    if isinstance(method, RelP):
        return Way(method.name, "attnlrp", statistic, skip_first, contrasted=True)
    if isinstance(method, Random):
        return Way(method.name, None, statistic, 0, seed=method.seed)
    composite = "gradient" if isinstance(method, Gradient) else None
    return Way(method.name, composite, statistic, skip_first)
