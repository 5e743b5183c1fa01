"""Local reconstruction: each block of a pruned model is trained to give what it gave."""

from lrp_prune.reconstruction.reconstruct import reconstruct
from lrp_prune.reconstruction.result import Reconstructed

__all__ = ["Reconstructed", "reconstruct"]
