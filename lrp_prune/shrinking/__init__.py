"""Shrinking: masks of units made physical, and files of models that are smaller than their configuration says.

Traced units (``units``) and what heads are made by (``heads``) give what can go (``removal``); cuts of parameters (``cuts``)
and numbers of modules (``attributes``, ``sites``) make the smaller model, which is tried (``taking``) and compared (``proof``).
"""

from lrp_prune.shrinking.files import load_shrunk
from lrp_prune.shrinking.report import Layer, Shrunk, Totals
from lrp_prune.shrinking.shrink import shrink

__all__ = ["Layer", "Shrunk", "Totals", "load_shrunk", "shrink"]
