"""Whether relevance of a model can be trusted: conservation, operations without a rule, what has no relevance at all."""

from lrp_prune.auditing.auditing import audit
from lrp_prune.auditing.passages import Passage
from lrp_prune.auditing.report import AuditReport, Remark

__all__ = ["AuditReport", "Passage", "Remark", "audit"]
