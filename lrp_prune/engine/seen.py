"""The values that a weight has where it is used, which are not always those of the parameter."""

import torch
from torch import Tensor

from lrp_prune.engine.uses import Use
from lrp_prune.without_data import has_data


class Seen:
    """The values of a parameter's entries as they are used, where these are not its own."""

    def __init__(self, parameter: Tensor) -> None:
        self._parameter, self._plain = parameter, False
        self._values: Tensor | None = None

    def add(self, use: Use) -> bool:
        """Take note of a use; False if its values contradict those of another one."""
        layout = use.origin.entries
        assert layout is not None
        if not use.origin.scaled and self._values is None:
            self._plain = True
            return True
        if self._values is None:
            own = self._parameter.detach()
            own = own.to(torch.promote_types(own.dtype, torch.float32))
            self._values = own.clone() if self._plain else torch.full_like(own, torch.nan)
        used = use.weight.detach().to(self._values).reshape(layout.size)
        known, values = layout.once(layout.on(self._values)), layout.once(used)
        agree = known.isnan() | torch.isclose(known, values, rtol=1e-2)
        known.copy_(values)
        return not has_data(agree) or bool(agree.all())

    def values(self) -> Tensor | None:
        """In the parameter's shape; None where all uses were of the parameter itself."""
        return None if self._values is None else self._values.nan_to_num(0.0)
