"""What can be done to a stage beyond least squares, while its inputs and its dense outputs are at hand."""

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from torch import Tensor, nn


class Refining(Protocol):
    """What is done to each stage after its weights are masked and updated."""

    updates: bool
    """Whether its weights are to be updated before, by the compensation."""

    def restored(self, name: str, held: Mapping[str, nn.Parameter]) -> bool:
        """Whether the stage was done before, and has its weights of then again."""

    def refine(
        self, name: str, stage: nn.Module, held: Mapping[str, nn.Parameter], inputs: Callable[[int], Any], outputs: list[Any],
        counted: Callable[[int], Tensor | None],
    ) -> None:  # fmt: skip
        """Train a stage.

        Args:
            name: of the stage.
            stage: masked, and with updated weights.
            held: its parameters, by their names in the model.
            inputs: of a batch what the stage is called with behind the stages before it, as they are by now: arguments by
                position and by name.
            outputs: of each batch what the dense stage gave; like the inputs as :meth:`Given.taken` keeps them.
            counted: of a batch ``[samples, tokens]``, which are no padding; None for all.
        """
