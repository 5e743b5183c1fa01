"""What a local reconstruction came to, in figures and in words."""

from dataclasses import dataclass, field


@dataclass
class Reconstructed:
    """What was reconstructed.

    Args:
        errors: of each stage (a block that repeats, or a layer beside them), the mean squared error of its outputs on samples
            that are held out, as a share of their variance, before its training and after.
        taken_back: stages whose training did not help there, and that have the weights from before it.
        left_out: weights that are only masked, each with the reason.
        seconds: how long it took.
    """

    errors: dict[str, tuple[float, float]] = field(default_factory=dict)
    taken_back: list[str] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0

    def __str__(self) -> str:
        shares = sorted(after / before for before, after in self.errors.values() if before > 0)
        what = f"{len(self.errors)} stages reconstructed in {self.seconds:.3g} s"
        if shares:
            what += f": in the median {shares[len(shares) // 2]:.0%} of the error on held-out samples are left"
        if self.taken_back:
            what += f"; taken back, as training did not help: {', '.join(self.taken_back)}"
        if self.left_out:
            what += f"; only masked: {', '.join(f'{name} ({reason})' for name, reason in self.left_out.items())}"
        return what
