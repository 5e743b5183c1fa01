"""Correction: two relevances in, a reversible patch out."""

from lrp_prune.correction.behaviour import Behaviour
from lrp_prune.correction.beside import random_like, side_effects_of
from lrp_prune.correction.conditional import ConditionalPatch
from lrp_prune.correction.conditions import ActivationAbove, Condition, Learned
from lrp_prune.correction.contrast import Contrast
from lrp_prune.correction.correcting import Corrected, correct
from lrp_prune.correction.corrections import Corrections
from lrp_prune.correction.entries import Entries
from lrp_prune.correction.folder import load_patches, save_patches
from lrp_prune.correction.guard import Guard
from lrp_prune.correction.patch import Patch
from lrp_prune.correction.reading import load_patch, patch_of
from lrp_prune.correction.search import Automatic, search_amount
from lrp_prune.correction.several import together
from lrp_prune.correction.trials import Search, Trial

__all__ = [
    "ActivationAbove",
    "Automatic",
    "Behaviour",
    "Condition",
    "ConditionalPatch",
    "Contrast",
    "Corrected",
    "Corrections",
    "Entries",
    "Guard",
    "Learned",
    "Patch",
    "Search",
    "Trial",
    "correct",
    "load_patch",
    "load_patches",
    "patch_of",
    "random_like",
    "save_patches",
    "search_amount",
    "side_effects_of",
    "together",
]
