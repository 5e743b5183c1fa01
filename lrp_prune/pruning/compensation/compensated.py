"""What a compensation came to, in figures and in words."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from lrp_prune.relevance.unscored import patterns_of


@dataclass
class Compensated:
    """What was compensated.

    Args:
        errors: of each weight, the squared error of its outputs that the mask adds to the least squares without one, before and
            after.
        left_out: weights that are only masked, each with the reason.
        damped: weights of layers whose inputs differ so little that the damping had to be raised, each with by what.
        unweighed: weights for which all tokens counted alike although relevance was to weigh them, as theirs is not known there.
        as_one: modules that read something of others beside what these give (an attribute, an object they write into), so that
            the model was gone through as one and not block by block: more memory, and more time for each layer.
        held: weights that few samples say little of, which are held to the dense ones by more damping than 0.01, and
            by how much (``damping=None``).
        few: weights whose layer had less than twice as many rows of inputs (tokens, places) as inputs: both numbers.
        samples: reference samples that were gone through, of all processes.
        seconds: how long it took.
    """

    errors: dict[str, tuple[float, float]] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    damped: dict[str, float] = field(default_factory=dict)
    unweighed: list[str] = field(default_factory=list)
    as_one: list[str] = field(default_factory=list)
    held: dict[str, float] = field(default_factory=dict)
    few: dict[str, tuple[int, int]] = field(default_factory=dict)
    samples: int = 0
    seconds: float = 0.0

    def note(self, name: str, before: float, after: float, raised: float) -> None:
        """Add what was done to a weight, or to one of the layers that are stacked in it.

        Args:
            name: the weight's.
            before, after: the squared errors.
            raised: by what the damping was; infinite if no damping was enough, which left rows as the mask made them.
        """
        if math.isinf(raised):
            self.left_out[name] = "has inputs that no damping tells apart in their precision"
            return
        known = self.errors.get(name, (0.0, 0.0))
        self.errors[name] = (known[0] + before, known[1] + after)
        if raised > 1:
            self.damped[name] = max(raised, self.damped.get(name, 1.0))

    def __str__(self) -> str:
        shares = sorted(after / before for before, after in self.errors.values() if before > 0)
        what = f"{len(self.errors)} weights compensated"
        if self.samples:
            what += f" on {self.samples:,} samples in {self.seconds:.3g} s"
        if shares:
            what += f": in the median {shares[len(shares) // 2]:.0%} of the error that masks make in a layer are left"
        if self.damped:
            what += f"; damping was raised, up to {max(self.damped.values()):g} times, for {_listed(list(self.damped))}"
        if self.held:
            what += f"; of few samples, damped by up to {max(self.held.values()):g}: {_listed(list(self.held))}"
        if self.unweighed:
            what += f"; tokens count alike for {_listed(self.unweighed)}"
        if self.as_one:
            what += f"; {self.told_as_one}"
        return f"{what}; only masked: {self.masked_only}" if self.left_out else what

    @property
    def remarks(self) -> list[str]:
        """What is to be known of it before the weights are used."""
        found = [f"not compensated, only masked: {self.masked_only}"] if self.left_out else []
        if self.as_one:
            found.append(f"compensated {self.told_as_one}: more memory, and more time for each layer")
        if self.few:
            rows, inputs = min(self.few.values(), key=lambda both: both[0] / both[1])
            found.append(
                f"compensated on few samples: {_listed(list(self.few))} saw as few as {rows:,} rows for {inputs:,} inputs, so "
                "that much stays as it is in the dense model: more batches (twice as many tokens, or places, as inputs at least) "
                "make up for more. With a small damping of one's own it may be worse than the masks alone"
            )
        return found

    @property
    def told_as_one(self) -> str:
        """Why the model was gone through as one."""
        return f"as one and not block by block, since {_listed(self.as_one)} read something of others beside what these give"

    @property
    def masked_only(self) -> str:
        """What was left out, with each reason."""
        told = []
        for reason in dict.fromkeys(self.left_out.values()):
            told.append(f"{_listed([name for name, why in self.left_out.items() if why == reason])} ({reason})")
        return "; ".join(told)


def _listed(names: Sequence[str]) -> str:
    found = patterns_of(names)
    return f"{', '.join(found[:3])}{', ...' if len(found) > 3 else ''}"
