"""Targets: the value that is explained, as a scalar computed from a model and a batch; by name, inferred, or of one's own."""

from lrp_prune.targets.classes import ClassLabel, MultiLabel
from lrp_prune.targets.differences import LogitDifference
from lrp_prune.targets.inferring import Inferred
from lrp_prune.targets.likelihood import log_likelihood
from lrp_prune.targets.logits import Logit, explaining, predicted, values_of
from lrp_prune.targets.margins import RepetitionMargin, TokenMargin
from lrp_prune.targets.naming import TARGETS, Target, check_suits, checked, describe, in_words
from lrp_prune.targets.repetitions import LoopMargin, RepeatedTokens, repeated, repeats_only
from lrp_prune.targets.spans import AnswerSpan
from lrp_prune.targets.tokens import LastToken, NextToken, TokenLabel
from lrp_prune.targets.values import PredictedValues

__all__ = [
    "TARGETS",
    "AnswerSpan",
    "ClassLabel",
    "Inferred",
    "LastToken",
    "Logit",
    "LogitDifference",
    "LoopMargin",
    "MultiLabel",
    "NextToken",
    "PredictedValues",
    "RepeatedTokens",
    "RepetitionMargin",
    "Target",
    "TokenLabel",
    "TokenMargin",
    "check_suits",
    "checked",
    "describe",
    "explaining",
    "in_words",
    "log_likelihood",
    "predicted",
    "repeated",
    "repeats_only",
    "values_of",
]
