"""Circuits: the smallest part of a model that does a task, how to find it, and how good it is."""

from typing import Any

from lrp_prune.circuits.circuit import Circuit, Node, Overlap
from lrp_prune.circuits.discover import discover
from lrp_prune.circuits.evaluate import MIB_SIZES, compare, evaluate, minimality
from lrp_prune.circuits.extracting import keep_only_
from lrp_prune.circuits.methods import NODE_METHODS, Activation, AttributionPatching, GateIG, NodeMethod, RelP
from lrp_prune.circuits.mib import save_mib_graph
from lrp_prune.circuits.ranking import Ranking
from lrp_prune.circuits.result import EvaluationResult
from lrp_prune.circuits.sites import NODE_KINDS, Site, find_sites

__all__ = [
    "MIB_SIZES",
    "NODE_KINDS",
    "NODE_METHODS",
    "Activation",
    "AttributionPatching",
    "Circuit",
    "EvaluationResult",
    "GateIG",
    "GateTraining",
    "Node",
    "NodeMethod",
    "Overlap",
    "Ranking",
    "RelP",
    "Site",
    "compare",
    "discover",
    "evaluate",
    "find_sites",
    "keep_only_",
    "minimality",
    "save_mib_graph",
    "save_report",
]


def __getattr__(name: str) -> Any:
    """``GateTraining`` needs Lightning and ``save_report`` matplotlib: both are imported when asked for."""
    if name == "GateTraining":
        from lrp_prune.circuits.gates import GateTraining

        return GateTraining
    if name == "save_report":
        from lrp_prune.circuits.report import save_report

        return save_report
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
