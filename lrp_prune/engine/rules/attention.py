"""Rules for ``scaled_dot_product_attention``: which share of the gradient each of its inputs gets."""

from dataclasses import dataclass
from typing import Any, ClassVar

from lrp_prune.engine import functional
from lrp_prune.engine.call import Call, detached, is_activation
from lrp_prune.engine.rule import Rule

_BIAS, _DROPOUT = (3, "attn_mask"), (4, "dropout_p")


@dataclass(frozen=True)
class Attention(Rule):
    """Shares of the gradient; 0 for constants, 1 for the plain gradient. Dropout is off.

    Args:
        query: of the queries.
        key: of the keys.
        value: of the values.
        bias: of what is added to the scores, where the model computes it.
    """

    query: float = 1.0
    key: float = 1.0
    value: float = 1.0
    bias: float = 1.0

    kinds: ClassVar[tuple[str, ...] | None] = ("attention",)

    def __call__(self, call: Call) -> Any:
        shares = (self.query, self.key, self.value)
        operands = [_scaled(entry, share) for entry, share in zip(call.operands(), shares, strict=True)]
        others = {_BIAS: _scaled(call.argument(*_BIAS), self.bias), _DROPOUT: 0.0}
        return call.with_arguments(others).with_operands(operands).run()

    @property
    def stops(self) -> bool:
        return 0.0 in (self.query, self.key, self.value)


def _scaled(value: Any, share: float) -> Any:
    if share == 1.0 or not is_activation(value):
        return value
    return functional.scaled_gradient(value, share) if share else detached(value)


attention_gradient = Attention()
attention_uniform = Attention(query=0.25, key=0.25, value=0.5, bias=0.5)
"""Two halved products (AttnLRP, prop. 3.3): q and k by 1/4, a learned bias and v by 1/2."""
attention_to_values = Attention(query=0.0, key=0.0, value=1.0, bias=0.0)
"""The attention pattern is a constant (CP-LRP): all relevance to the values."""
