"""Side effects: what a correction is to leave as it is (a suite), how that is measured, and what was found."""

from lrp_prune.effects.answers import Answers, Shown
from lrp_prune.effects.entries import Choice, Entry, Likelihood, Losses, Measured
from lrp_prune.effects.intervals import Interval
from lrp_prune.effects.limits import ALLOWED
from lrp_prune.effects.measuring import side_effects
from lrp_prune.effects.report import Effect, SideEffectError, SideEffects
from lrp_prune.effects.suite import KINDS, Suite
from lrp_prune.effects.windows import windows

__all__ = [
    "ALLOWED",
    "KINDS",
    "Answers",
    "Choice",
    "Effect",
    "Entry",
    "Interval",
    "Likelihood",
    "Losses",
    "Measured",
    "Shown",
    "SideEffectError",
    "SideEffects",
    "Suite",
    "side_effects",
    "windows",
]
