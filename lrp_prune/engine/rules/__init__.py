"""Rules: how one operation hands relevance to its inputs. One file a family; :data:`RULES` is the list of those with a name."""

from lrp_prune.engine.call import Call, detached, is_activation
from lrp_prune.engine.rule import Own, Rule, Stop, gradient, skip, stop
from lrp_prune.engine.rules.attention import (
    Attention,
    attention_gradient,
    attention_to_values,
    attention_uniform,
)
from lrp_prune.engine.rules.declared import (
    AlphaBeta,
    Epsilon,
    Flat,
    Gamma,
    WSquare,
    ZBox,
    ZPlus,
    alpha_beta,
    epsilon,
    flat,
    gamma,
    w_square,
    z_plus,
)
from lrp_prune.engine.rules.elementwise import Identity, Shares, identity, stop_gate, uniform
from lrp_prune.engine.rules.linear import Terms
from lrp_prune.engine.rules.normalization import ConstantStatistic, constant_statistic, plain_normalization
from lrp_prune.engine.rules.pooling import Proportional, Winner, proportional, winner
from lrp_prune.engine.rules.scales import norm_pool, plain_scale, scale, stop_denominator
from lrp_prune.engine.rules.softmax import AttentionZPlus, SoftmaxZPlus, attention_by_z_plus, softmax_by_z_plus
from lrp_prune.engine.rules.sums import EpsilonSum, EqualShares, SizeShares, epsilon_sum, equal_shares, size_shares
from lrp_prune.engine.rules.terms import Group, Term

RULES: dict[str, Rule] = {
    "gradient": gradient,
    "identity": identity,
    "uniform": uniform,
    "stop": stop,
    "stop_gate": stop_gate,
    "scale": scale,
    "stop_denominator": stop_denominator,
    "constant_statistic": constant_statistic,
    "attention_uniform": attention_uniform,
    "attention_to_values": attention_to_values,
    "attention_gradient": attention_gradient,
    "skip": skip,
    "gamma": gamma,
    "alpha_beta": alpha_beta,
    "epsilon": epsilon,
    "z_plus": z_plus,
    "flat": flat,
    "w_square": w_square,
    "winner": winner,
    "proportional": proportional,
    "epsilon_sum": epsilon_sum,
    "equal_shares": equal_shares,
    "size_shares": size_shares,
    "softmax_z_plus": softmax_by_z_plus,
    "attention_z_plus": attention_by_z_plus,
}
"""Rules by name, so that a composite can be written in a configuration file."""

PLAIN: dict[str, Rule] = {
    "attention": attention_gradient,
    "dropout": skip,
    "normalization": plain_normalization,
    "statistic": plain_scale,
}
"""What the plain gradient is of kinds of operation that have more to mind than their gradient."""

__all__ = [
    "PLAIN",
    "RULES",
    "AlphaBeta",
    "Attention",
    "AttentionZPlus",
    "Call",
    "ConstantStatistic",
    "Epsilon",
    "EpsilonSum",
    "EqualShares",
    "Flat",
    "Gamma",
    "Group",
    "Identity",
    "Own",
    "Proportional",
    "Rule",
    "Shares",
    "SizeShares",
    "SoftmaxZPlus",
    "Stop",
    "Term",
    "Terms",
    "WSquare",
    "Winner",
    "ZBox",
    "ZPlus",
    "alpha_beta",
    "attention_gradient",
    "attention_to_values",
    "attention_uniform",
    "constant_statistic",
    "detached",
    "epsilon",
    "flat",
    "gamma",
    "gradient",
    "identity",
    "is_activation",
    "norm_pool",
    "scale",
    "skip",
    "stop",
    "stop_denominator",
    "stop_gate",
    "uniform",
    "w_square",
    "z_plus",
]
