"""Models: what a model is whatever is around it, how it is called with a batch, and where its logits are."""

from lrp_prune.models.batches import IGNORED, check_batches, samples_in, to_device
from lrp_prune.models.calling import call_of, labels_of, run
from lrp_prune.models.kinds import Kind
from lrp_prune.models.outputs import Answer, answer_of, logits_for, logits_of
from lrp_prune.models.padding import attended_labels, counted_tokens
from lrp_prune.models.profile import Profile, profile_of
from lrp_prune.models.subject import Subject, forwarded, subject_of

__all__ = [
    "IGNORED",
    "Answer",
    "Kind",
    "Profile",
    "Subject",
    "answer_of",
    "attended_labels",
    "call_of",
    "check_batches",
    "counted_tokens",
    "forwarded",
    "labels_of",
    "logits_for",
    "logits_of",
    "profile_of",
    "run",
    "samples_in",
    "subject_of",
    "to_device",
]
