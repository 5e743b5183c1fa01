"""What pruning has done so far, as it is written into a checkpoint."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lightning.fabric.utilities import rank_zero_warn
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lrp_prune.pruning import Masks

VERSION = 1
_SELECTING = ("total sparsities", "method", "scope")
"""Arguments that masks follow from."""


@dataclass
class PruningState:
    """Rounds that are done, the masks in effect, and masks that wait to be applied.

    Args:
        round: rounds done.
        masks: in effect.
        pending: selected in a validation, to be applied when the next training epoch or batch starts.
        pending_epoch: the epoch of that validation.
        pending_samples: samples they were selected on.
        pending_target: what was explained there, by its name; empty if nothing was, or it is not known.
        delay: epochs or steps by which all rounds come later, since the training had begun without pruning.
    """

    round: int = 0
    masks: Masks | None = None
    pending: Masks | None = None
    pending_epoch: int = -1
    pending_samples: int = 0
    pending_target: str = ""
    delay: int = 0

    def to_dict(self, fingerprint: Mapping[str, str]) -> dict[str, Any]:
        """Tensors and plain values only, since checkpoints are loaded with ``weights_only=True``."""
        return {
            "version": VERSION,
            "round": self.round,
            "masks": self.masks.state_dict() if self.masks is not None else None,
            "pending": self.pending.state_dict() if self.pending is not None else None,
            "pending_epoch": self.pending_epoch,
            "pending_samples": self.pending_samples,
            "pending_target": self.pending_target,
            "delay": self.delay,
            "fingerprint": dict(fingerprint),
        }

    @classmethod
    def from_dict(
        cls, state: Mapping[str, Any], fingerprint: Mapping[str, str], rounds: float = math.inf
    ) -> "PruningState":
        """The state that :meth:`to_dict` gave; warns if it was made with other arguments.

        Masks that wait are those of a round of then: where now there is none, or it would select others, they are left out.

        Args:
            state: what it gave.
            fingerprint: the arguments of now.
            rounds: how many there are by these.

        Raises:
            MisconfigurationException: the state is of another version.
        """
        if state.get("version") != VERSION:
            raise MisconfigurationException(
                f"the checkpoint's pruning state has version {state.get('version')!r}, this lrp-prune reads {VERSION}: "
                f"resume with the lrp-prune that wrote it"
            )
        changed = [
            f"{name}={value} (was {state['fingerprint'].get(name)})"
            for name, value in fingerprint.items()
            if state["fingerprint"].get(name) != value
        ]
        if changed and state["round"] >= rounds:
            rank_zero_warn(
                f"the checkpoint was written with other pruning arguments, and all of its {state['round']} rounds are done: "
                f"nothing more is pruned by {'; '.join(changed)}. To prune further, ask for more rounds, or load its "
                "weights into the module and begin a training without ckpt_path"
            )
        elif changed:
            rank_zero_warn(
                f"the checkpoint was written with other pruning arguments; the {state['round']} rounds that are done "
                f"count, and the rest goes on with {'; '.join(changed)}"
            )
        read = cls(
            round=state["round"],
            masks=Masks.from_state_dict(state["masks"]) if state["masks"] is not None else None,
            delay=state["delay"],
        )
        selects_others = any(state["fingerprint"].get(name) != fingerprint.get(name) for name in _SELECTING)
        if state["pending"] is not None and read.round < rounds and not selects_others:
            read.pending = Masks.from_state_dict(state["pending"])
            read.pending_epoch, read.pending_samples = state["pending_epoch"], state["pending_samples"]
            read.pending_target = state.get("pending_target", "")  # not yet in the first checkpoints
        return read
