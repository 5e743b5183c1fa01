"""Correction: two relevances in, a reversible patch out."""

from lrp_prune.correction.contrast import Contrast
from lrp_prune.correction.corrections import Corrections
from lrp_prune.correction.entries import Entries
from lrp_prune.correction.folder import load_patches, save_patches
from lrp_prune.correction.guard import Guard
from lrp_prune.correction.patch import Patch
from lrp_prune.correction.search import Automatic, Search, Trial, search_amount

__all__ = [
    "Automatic",
    "Contrast",
    "Corrections",
    "Entries",
    "Guard",
    "Patch",
    "Search",
    "Trial",
    "load_patches",
    "save_patches",
    "search_amount",
]
