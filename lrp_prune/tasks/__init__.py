"""Tasks: prompts with counterfactuals, answers and metrics, generated for any tokenizer, or read from a table."""

from lrp_prune.tasks.gendered_pronoun import GenderedPronoun
from lrp_prune.tasks.greater_than import GreaterThan
from lrp_prune.tasks.indirect_object import IndirectObject
from lrp_prune.tasks.metrics import METRICS, metric_values
from lrp_prune.tasks.prompts import Prompt
from lrp_prune.tasks.table import TableTask
from lrp_prune.tasks.task import Task

__all__ = [
    "METRICS",
    "GenderedPronoun",
    "GreaterThan",
    "IndirectObject",
    "Prompt",
    "TableTask",
    "Task",
    "metric_values",
]
